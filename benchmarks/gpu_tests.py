"""pytest plugin for tests on a GPU: `pytest -m gpu -p benchmarks.gpu_tests`.

A test after which the device is lost ends its process: the worker of pytest-xdist that takes its
place goes on with the next test, where otherwise every later one would fail. So does a test that
takes longer than --test-limit, with the stacks of all threads. Tests marked `large` run one at a
time over all workers, and give their memory back. What fails is appended to --failures at once.
"""

import faulthandler
import fcntl
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks.environment import device_is_lost

STATUS = 70  # of a process whose device is lost

_STDERR = pytest.StashKey[int]()


def pytest_addoption(parser):
    group = parser.getgroup("gpu")
    group.addoption("--test-limit", type=float, default=120, metavar="SECONDS")
    group.addoption("--failures", type=Path, metavar="FILE")


def pytest_configure(config):
    config.stash[_STDERR] = os.dup(2)  # while a test runs, 2 leads into its captured output
    path = config.getoption("--failures")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Failures(path))


class Failures:
    """Reports of what failed, in a file. Workers send theirs to the process that has this."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.failed:
            with self.path.open("a") as file:
                print(f"{report.nodeid} ({report.when})\n{report.longreprtext}\n", file=file)


def pytest_unconfigure(config):
    os.close(config.stash[_STDERR])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    alone = item.get_closest_marker("large") is not None
    with open(Path(tempfile.gettempdir(), "pdp_large_test"), "w") as lock:
        if alone:
            fcntl.flock(lock, fcntl.LOCK_EX)
        limit = item.config.getoption("--test-limit")
        faulthandler.dump_traceback_later(limit, exit=True, file=item.config.stash[_STDERR])
        result = yield
        faulthandler.cancel_dump_traceback_later()
        if torch.cuda.is_initialized():
            if device_is_lost(torch.device("cuda")):
                end_process(item)
            if alone:
                torch.cuda.empty_cache()
    return result


def end_process(item):
    """Before pytest-xdist hears that the test is done: so it counts as the one that did it."""
    text = f"{item.nodeid}: the device is lost to this process\n"
    os.write(item.config.stash[_STDERR], text.encode())
    sys.stdout.flush()
    os._exit(STATUS)
