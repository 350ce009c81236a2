"""Every operator works on the current stream, and on the device of its tensors."""

import pytest
import torch

from pdp_kernels import build_info, ops, pdp_threshold
from tests.gpu.operations import call, matrices, side_stream

pytestmark = pytest.mark.gpu

# Some 30 ms, in which a host launches hundreds of kernels.
CYCLES = 50_000_000


def test_every_backend_is_live():
    assert all(build_info()["backends"].values()), build_info()["reasons"]


@pytest.mark.parametrize("name", ops.schemas.SCHEMAS)
def test_waits_for_what_its_own_stream_is_still_writing(name):
    sources = [matrix.cuda() for matrix in matrices(name)]
    expected = call(name, *sources)  # compiled and loaded by now
    stream = side_stream()
    with torch.cuda.stream(stream):
        inputs = [torch.zeros_like(source) for source in sources]
        torch.cuda._sleep(CYCLES)
        for late, source in zip(inputs, sources, strict=True):
            late.copy_(source)
        found = call(name, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, found, expected))


def test_two_streams_at_once():
    weights = [torch.randn(1 << 20, device="cuda") for _ in range(2)]
    expected = [pdp_threshold(weight, 0.9) for weight in weights]
    streams = [side_stream() for _ in weights]
    for _ in range(20):
        found = []
        for weight, stream in zip(weights, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(pdp_threshold(weight, 0.9))
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ops.schemas.SCHEMAS)
def test_serves_a_second_device_while_the_first_is_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    expected = call(name, *(matrix.to("cuda:0") for matrix in matrices(name)))
    torch.manual_seed(0)
    with torch.cuda.device(0):
        found = call(name, *(matrix.to("cuda:1") for matrix in matrices(name)))
    for result, own in zip(found, expected, strict=True):
        assert result.device == torch.device("cuda", 1)
        assert torch.equal(result.cpu(), own.cpu())
