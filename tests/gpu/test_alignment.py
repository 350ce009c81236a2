"""Equal bits whether or not addresses and sizes are those that Triton has wide loads for."""

import pytest
import torch

from tests.gpu.operations import TRITON, call, matrices

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", TRITON)
def test_unaligned_addresses_change_nothing(name):
    aligned = [matrix.cuda() for matrix in matrices(name)]
    expected = call(name, *aligned)
    for offset in (1, 4):
        unaligned = []
        for matrix in aligned:
            storage = torch.zeros(matrix.numel() + offset, dtype=matrix.dtype, device="cuda")
            unaligned.append(storage[offset:].view(matrix.shape).copy_(matrix))
        assert all(map(torch.equal, call(name, *unaligned), expected))


@pytest.mark.parametrize("name", [name for name in TRITON if name != "compress_2to4"])
def test_sizes_that_16_does_not_divide_change_nothing(name):
    """Rows are channels and hold groups, so each is masked independently."""
    weight, grad = (matrix.cuda() for matrix in matrices(name, columns=36))
    expected = call(name, weight, grad)
    found = call(name, weight[:-1], grad[:-1])
    for result, own in zip(found, expected, strict=True):
        assert torch.equal(result, own[:-1])
