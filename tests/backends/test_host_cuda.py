"""The CUDA model sees kernels' mistakes, and its counters count what known kernels do."""

import pytest

from instruments.build import CXX
from instruments.host_build import CountingBuild, KernelError

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


@pytest.fixture
def host(cuda):
    return cuda.host


@pytest.fixture(scope="session")
def counting():
    return CountingBuild()


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("early exit", "a barrier that some threads of the block miss"),
        ("lonely lane", "a warp operation that some lanes miss"),
        ("shared overrun", "a store beyond the shared memory of the block"),
        ("overrun", "a store beyond an allocation"),
        ("misaligned", "a misaligned load"),
    ],
)
def test_a_mistake_is_an_error(host, kernel, message):
    with pytest.raises(KernelError, match=message):
        host.self_test(kernel)


def test_a_kernel_runs_after_one_that_failed(host):
    with pytest.raises(KernelError):
        host.self_test("early exit")
    assert host.self_test("one word")[7] != host.self_test("copy")[7]


def test_shared_memory_begins_with_noise(host):
    assert host.self_test("unset shared memory")[0] != 0


def test_atomics_of_all_threads_add_up(host):
    before, after = host.self_test("copy")[7], host.self_test("one word")[7]
    assert after - before == 64


def test_bytes_are_counted_by_launch_kernel_and_buffer(counting):
    counts = counting.count(lambda: counting.self_test("copy", "one word"))
    copy, one_word = counts.bytes
    assert copy == (1, "copy_kernel", "memory", 256, 256, 0)
    assert one_word == (2, "one_word_kernel", "memory", 0, 0, 64)
    assert counts.moved() == counts.moved("memory") == 512
    assert counts.launches == 2


@pytest.mark.parametrize(
    ("kernel", "kind", "shared", "cost"),
    [
        ("copy", "load", False, 4),  # 128 neighbouring bytes
        ("strided", "load", False, 32),
        ("one word", "atomic", False, 1),
        ("one bank", "store", True, 32),
        ("one shared word", "atomic", True, 1),
    ],
)
def test_sectors_and_passes_of_a_request(counting, kernel, kind, shared, cost):
    counts = counting.count(lambda: counting.self_test(kernel), trace=True)
    (request,) = (r for r in counts.requests if (r.kind, r.shared) == (kind, shared))
    assert request.count == 2  # of two warps
    assert request.cost == 2 * cost


def test_a_read_only_load_of_what_a_kernel_wrote_is_seen(counting):
    def stale_loads(*kernels):
        return counting.count(lambda: counting.self_test(*kernels)).stale_loads

    assert stale_loads("read only") == 0
    assert stale_loads("copy", "read only") == 64
