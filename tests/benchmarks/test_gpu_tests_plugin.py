"""benchmarks/gpu_tests.py, the plugin for tests on a GPU, with a device that a test can lose."""

import pytest

from tests.support.pytest_run import run_pytest

pytestmark = pytest.mark.slow  # six processes import torch

# A device that a test "loses", for the process it runs in.
CONFTEST = """
import os, torch
from benchmarks import gpu_tests

torch.cuda.is_initialized = lambda: True
torch.cuda.empty_cache = lambda: None
gpu_tests.device_is_lost = lambda device: "LOST" in os.environ
"""

TESTS = """
import os, time
import pytest

# First, when both workers run.
@pytest.mark.large
@pytest.mark.parametrize("number", range(4))
def test_large(number):
    with open(os.environ["FOLDER"] + "/times", "a") as file:
        print("begin", file=file, flush=True)
        time.sleep(0.2)
        print("end", file=file)

@pytest.mark.parametrize("number", range(10))
def test_before(number):
    pass

def test_fault():
    os.environ["LOST"] = "1"

def test_hang():
    time.sleep(3600)

def test_wrong():
    assert 1 + 1 == 3

@pytest.mark.parametrize("number", range(10))
def test_after(number):
    pass
"""


@pytest.fixture(scope="module")
def tests_run(tmp_path_factory):
    """TESTS on two workers with the plugin: what pytest printed, what --failures has, and when the
    large ones ran."""
    folder = tmp_path_factory.mktemp("tests")
    words = ("-n", "2", "-p", "benchmarks.gpu_tests", "--test-limit", "3")
    words += ("--failures", str(folder / "failures"))
    output = run_pytest(folder, TESTS, *words, conftest=CONFTEST)
    return output, (folder / "failures").read_text(), (folder / "times").read_text()


def test_a_lost_device_costs_one_test(tests_run):
    output, failures, _ = tests_run
    # test_fault passed before it was found to be the one: it counts twice.
    assert "3 failed, 25 passed" in output
    assert "test_fault: the device is lost to this process" in output
    assert "crashed while running 'test_it.py::test_fault'" in failures


def test_a_test_that_hangs_costs_one_test(tests_run):
    output, failures, _ = tests_run
    assert "in test_hang" in output  # the stack
    assert "crashed while running 'test_it.py::test_hang'" in failures


def test_a_failure_is_written_once(tests_run):
    _, failures, _ = tests_run
    assert failures.count("test_wrong (call)") == failures.count("assert (1 + 1) == 3") == 1


def test_large_tests_run_one_at_a_time(tests_run):
    assert tests_run[2].split() == ["begin", "end"] * 4
