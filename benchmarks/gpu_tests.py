"""pytest plugin for tests on a GPU: `pytest -m gpu -p benchmarks.gpu_tests`.

A test that loses the device ends its process. pytest-xdist starts another worker for the next test;
otherwise every later test would fail. A test that takes longer than --test-limit ends its process
too, after printing the stacks of all threads. Tests marked `large` run one at a time over all
workers, and release their memory. Failures are appended to --failures at once.
"""

import faulthandler
import fcntl
import os
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from benchmarks.environment import device_is_lost

STATUS = 70  # exit status of a process whose device is lost

_STDERR = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--test-limit", type=float, default=120, metavar="SECONDS")
    group.addoption("--failures", type=Path, metavar="FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STDERR] = os.dup(2)  # pytest captures descriptor 2 during a test
    path = config.getoption("--failures")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Failures(path))


class Failures:
    """Writes failures to a file. Workers send their reports to the process with this plugin."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with self.path.open("a") as file:
                print(f"{report.nodeid} ({report.when})\n{report.longreprtext}\n", file=file)


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[_STDERR])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
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


def end_process(item: pytest.Item) -> None:
    """Exit before pytest-xdist hears that the test is done, so that it blames this test."""
    text = f"{item.nodeid}: the device is lost to this process\n"
    os.write(item.config.stash[_STDERR], text.encode())
    sys.stdout.flush()
    os._exit(STATUS)
