"""Triton compiles each kernel of channel masks once for a pair of dtypes, for all sizes."""

from functools import partial

import pytest
import torch

from tests.support.masks import REAL
from tests.support.parameters import by_turns
from tests.support.triton_variants import count_variants
from tests.support.weights import DTYPES

# Runs that a program walks along, shorter and longer than the backward keeps, and short runs: sizes
# that 16 divides and others, sizes of 1, more than 2^31 elements.
BY_ROW = [((64, 64), 0), ((1, 8191), 0), ((17, 8192), 0), ((3, 8193), 0), ((5, 1 << 30), 0)]
BY_ROW += [((6, 4, 512), 1), ((5, 3, 301), 1)]
BY_COLUMN = [
    ((64, 64), 1),
    ((1, 15), 1),
    ((4099, 1021), 1),
    ((1 << 22, 513), 1),
    ((8, 16, 3, 3), 1),
]
BY_COLUMN += [((1300,), 0), ((33, 9), 0)]

ALWAYS = ("channel_norms_kernel", "channel_pulls_kernel", "soft_mask_channel_fwd_kernel")
EXPECTED = {
    # The products sum squares, for the norms, and products with the gradient.
    "column": dict.fromkeys((*ALWAYS, "soft_mask_channel_bwd_kernel"), 1)
    | {"channel_products_kernel": 2},
    "row": dict.fromkeys((*ALWAYS, "soft_mask_channel_bwd_kernel"), 1)
    | {"channel_products_kernel": 2, "soft_mask_channel_bwd_whole_kernel": 1},
}


def mask(shapes, dtype, out_dtype, relative):
    """Mask weights of all shapes, at any address, with norms and thresholds out of a table."""
    from pdp_kernels.triton_kernels import soft_mask_channel

    table = torch.empty(4, dtype=REAL[dtype], device="meta")
    for shape, dim in shapes:
        for first, t in enumerate(table):
            numel = torch.Size(shape).numel()
            weight = torch.empty(numel + first, dtype=dtype, device="meta")[first:].view(shape)
            norms = soft_mask_channel.channel_norms(weight, dim, True)
            norms = torch.empty(len(norms) + first, dtype=norms.dtype, device="meta")[first:]
            rest = (weight, norms, t, t, dim, relative)
            w_hat, mask = soft_mask_channel.soft_mask_channel(*rest, out_dtype)
            soft_mask_channel.soft_mask_channel_backward(w_hat, mask, *rest, True)


PAIRS = by_turns(DTYPES, DTYPES, [False, True])
STEPS = {
    f"{kind}: {dtype} to {out_dtype}, relative = {relative}": partial(
        mask, shapes, dtype, out_dtype, relative
    )
    for kind, shapes in (("row", BY_ROW), ("column", BY_COLUMN))
    for dtype, out_dtype, relative in PAIRS
}


def test_each_kernel_has_one_variant_for_all_sizes_strides_and_addresses():
    pytest.importorskip("triton")
    counts = count_variants(f"{__name__}:STEPS")
    assert counts == {name: EXPECTED[name.partition(":")[0]] for name in STEPS}
