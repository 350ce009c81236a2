"""A kernel that adds up products of two pairs of tiles, as the kernels of channels do."""

import triton
import triton.language as tl
from pdp_kernels.triton_kernels.channel_tiles import add_products


@triton.jit
def products_kernel(left_ptr, right_ptr, sums_ptr, errors_ptr, scale, tile: tl.constexpr):
    lanes = tl.arange(0, tile)
    sums, errors = tl.load(sums_ptr + lanes), tl.load(errors_ptr + lanes)
    left, right = tl.load(left_ptr + lanes), tl.load(right_ptr + lanes)
    more_left, more_right = tl.load(left_ptr + tile + lanes), tl.load(right_ptr + tile + lanes)
    sums, errors = add_products(sums, errors, ((left, right), (more_left, more_right)), scale)
    tl.store(sums_ptr + lanes, sums)
    tl.store(errors_ptr + lanes, errors)
