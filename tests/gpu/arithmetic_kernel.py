"""A Triton kernel with nothing but the two inexact operations of the masks."""

import triton
import triton.language as tl


@triton.jit
def divide_and_exponentiate(
    x_ptr, y_ptr, quotient_ptr, exponential_ptr, numel, block: tl.constexpr
):
    offsets = tl.program_id(0) * block + tl.arange(0, block)
    inside = offsets < numel
    x = tl.load(x_ptr + offsets, mask=inside)
    y = tl.load(y_ptr + offsets, mask=inside)
    tl.store(quotient_ptr + offsets, x / y, mask=inside)
    tl.store(exponential_ptr + offsets, tl.exp(-tl.abs(x)), mask=inside)
