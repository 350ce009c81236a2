"""A pytest plugin under which 'cuda' is a fake device in the memory of the CPU.

`python -m pytest -m gpu -p instruments.fake_cuda` runs the bodies of the GPU tests on a machine
without a GPU. So a test's own mistake costs no GPU time: a tensor left on the host, a wait that is
forbidden, a stream that does not wait for another, a graph whose results are read before it is
replayed. The kernels are the native ones of the CPU; their results are not tested here.

Sizes beyond 2^31 become small (`BEYOND_INT32` of a test module). Tests without a meaning here are
skipped by name, with the reason. --parameter-sets N runs only N parameter sets of each test that
runs on a CPU too, including the first and the last.
"""

import re
from collections import defaultdict
from collections.abc import Generator

import pytest

from instruments.fake_cuda.calls import DEVICE
from instruments.fake_cuda.device import DeviceWork
from instruments.fake_cuda.torch_cuda import PATCHES

# Patterns of the names of tests that have no meaning here, and why.
MEANINGLESS = {
    r"\bnccl\b": "NCCL moves memory of GPUs",
    r"::test_linear_gives_what_the_dense_one_gave": "sparse tensor cores multiply",
    r"::test_norms_of_channels_are_two_kernels": "an operator is one launch",
}


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    PATCHES.put(PATCHES.values)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parameter-sets", type=int, default=None, help=__doc__.rpartition("\n\n")[2])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _choose_sets(config, items)
    for item in items:
        for pattern, reason in MEANINGLESS.items():
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.skip(reason=reason))
        if hasattr(item.module, "BEYOND_INT32"):
            item.module.BEYOND_INT32 = 2**13


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    DEVICE.reset()
    with DeviceWork(DEVICE):
        return (yield)


def _choose_sets(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--parameter-sets")
    if wanted is None:
        return
    by_test = defaultdict(list)
    for item in items:
        by_test[item.nodeid.partition("[")[0]].append(item)
    chosen = set()
    for sets in by_test.values():
        file = sets[0].getparent(pytest.Module)
        needs_gpu = any(mark.name == "gpu" for mark in file.own_markers)
        count = len(sets) if needs_gpu else min(wanted, len(sets))
        chosen.update(sets[place * (len(sets) - 1) // max(1, count - 1)] for place in range(count))
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]
