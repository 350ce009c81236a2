"""2:4 compression of a backend, held against PyTorch's CUTLASS conversion: bit for bit."""

import itertools

import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

SPECIAL = (0.0, -0.0, 1.0, -1.0, 2.0, -3.0, torch.inf, -torch.inf, torch.nan, -torch.nan)


def pruned_to_2to4(weight):
    """Return the hard 2:4 form.

    A pruned weight leaves a zero of its sign, as weight * mask does, and unlike it also where the
    weight is infinite.
    """
    groups = weight.unflatten(-1, (-1, 4))
    order = groups.abs().sort(dim=-1, stable=True).indices
    pruned = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    return torch.where(pruned, torch.zeros_like(groups).copysign(groups), groups).flatten(-2)


def assert_same_compression(compressed, expected):
    """Check bit for bit, but for a NaN any NaN: torch.gather on a CPU rewrites their payloads."""
    for actual, tensor in zip(compressed, expected, strict=True):
        assert actual.dtype == tensor.dtype
        assert actual.is_contiguous()
        assert torch.equal(actual.isnan(), tensor.isnan())
        number = ~tensor.isnan()
        assert torch.equal(actual[number].view(torch.int16), tensor[number].view(torch.int16))


def check_compression(compress, weight):
    expected = sparse_semi_structured_from_dense_cutlass(pruned_to_2to4(weight.contiguous()))
    assert_same_compression(compress(weight), expected)


def every_group(dtype):
    """Return all groups of 4 from ten values: every order, every tie, zeros and NaNs."""
    groups = torch.tensor(list(itertools.product(SPECIAL, repeat=4)), dtype=dtype)
    rows = -(-groups.numel() // (64 * 32)) * 32
    return groups.flatten().repeat(2)[: rows * 64].view(rows, 64).contiguous()
