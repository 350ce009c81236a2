"""What the tests of sharded weights and models share."""

import torch
import torch.distributed as dist

from pdp_kernels.ops.reference import INTEGERS

COLLECTIVES = (
    "all_reduce",
    "all_gather_into_tensor",
    "all_to_all_single",
    "all_gather",
    "broadcast",
)


def global_tensor(value):
    """Return the global weight of a DTensor, or a plain tensor as it is, on the CPU."""
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu()


def assert_same_bits(value, other, where):
    """Check two tensors bit for bit; any NaN equals any other."""
    assert value.dtype == other.dtype, where
    assert value.shape == other.shape, where
    if value.is_floating_point():
        value, other = (torch.where(v.isnan(), torch.nan, v) for v in (value, other))
        integers = INTEGERS[value.element_size()]
        value, other = value.contiguous().view(integers), other.contiguous().view(integers)
    assert torch.equal(value, other), where


def with_collectives(function):
    """Return what a function returns, and the tensors that it hands to collectives."""
    sent = []

    def recorder(collective):
        def record(tensor, *arguments, **options):
            sent.append(tensor)
            return collective(tensor, *arguments, **options)

        return record

    originals = {name: getattr(dist, name) for name in COLLECTIVES}
    try:
        for name, original in originals.items():
            setattr(dist, name, recorder(original))
        return function(), sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
