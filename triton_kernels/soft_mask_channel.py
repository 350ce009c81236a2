"""Channel masks on GPUs.

The norms take one read of the weight, and w_hat one read and one write. The backward reads gradient
and weight once if a channel is one run of at most WHOLE_CHANNEL elements, else twice: for <g, W>,
then for dW. The norms take two launches, the forward one, the backward one or three.
"""

import math
from typing import NamedTuple

import torch
import triton
from pdp_kernels.triton_kernels.channel_kernels import (
    channel_norms_kernel,
    channel_products_kernel,
    channel_pulls_kernel,
    soft_mask_channel_bwd_kernel,
    soft_mask_channel_bwd_whole_kernel,
    soft_mask_channel_fwd_kernel,
)
from pdp_kernels.triton_kernels.channel_tiles import VECTOR
from pdp_kernels.triton_kernels.soft_mask import in_order_of
from torch import Tensor

from pdp_kernels.ops import reference

# A warp has UNROLL tiles in flight. A program is one warp, or for sums by column GROUPS of them,
# each with TILES_PER_PIECE tiles or more: each column of a program writes a sum of 8 bytes. WARPS
# are 16 for each of 132 multiprocessors. On an H100 norms, threshold, forward and backward
# of 10^8 float32 weights run at 2.8 TB/s together, of bfloat16 at 2.7, where a copy has 3.0. Other
# sizes are not yet measured.
ELEMENTS_PER_WARP = 256
UNROLL = 4
GROUPS = 8
TILES_PER_PIECE = 16
WARPS = 2048

# The shortest runs that programs walk along. Shorter ones would leave most lanes idle.
BY_ROW_FROM = 64
MOST_COLUMNS = 2**28  # their numbers, of up to VECTOR rows together, have 32 bits

# The longest channel that the backward reads once, and the tiles of it that 4 warps keep in
# registers. They read the rest again, at once: from a cache.
WHOLE_CHANNEL = 8192
WHOLE_TILE = 1024
WHOLE_WARPS = 4
HELD = 4

# Channels, and partial sums of each, that a program adds up at a time.
SUMMED_CHANNELS = 32
SUMMED_TERMS = 32


class Layout(NamedTuple):
    """The memory layout of a dense weight."""

    outer: int
    channels: int
    inner: int

    @classmethod
    def of(cls, ordered: Tensor, dim: int) -> "Layout":
        numel, channels = ordered.numel(), ordered.shape[dim]
        # The stride of a dimension of size 1 is arbitrary.
        inner = ordered.stride(dim) if channels > 1 else numel
        return cls(numel // (channels * inner), channels, inner)

    @property
    def channel_size(self) -> int:
        return self.outer * self.inner

    @property
    def by_row(self) -> bool:
        return self.inner >= BY_ROW_FROM or self.channels * self.inner >= MOST_COLUMNS


class Walk(NamedTuple):
    """Programs that walk over a weight, and their partial sums (see channel_tiles.py).

    Attributes:
        grid: rows or strips of columns, and the pieces of each.
        sums: the layout of the partial sums over each channel.
        room: the elements that hold them.
        arguments: what every kernel over tiles takes.
    """

    grid: tuple[int, int]
    sums: Layout
    room: int
    arguments: dict[str, int]

    @classmethod
    def over(cls, layout: Layout, groups: int = 1) -> "Walk":
        outer, channels, inner = layout
        numel, row = outer * channels * inner, channels * inner
        if layout.by_row:
            stride, starts = ELEMENTS_PER_WARP, outer * channels
            most = triton.cdiv(inner, stride * UNROLL)
            least = 1
        else:
            vector: int = VECTOR.value
            aligned = math.lcm(row, vector)
            stride = aligned * triton.cdiv(ELEMENTS_PER_WARP, aligned)
            stride = min(stride, triton.cdiv(numel, vector) * vector)
            starts = triton.cdiv(stride, ELEMENTS_PER_WARP)
            most = triton.cdiv(numel, stride * UNROLL * groups)
            least = triton.cdiv(TILES_PER_PIECE, UNROLL)
        steps = min(most, max(least, triton.cdiv(starts * most * groups, WARPS)))
        pieces = triton.cdiv(most, steps)
        if layout.by_row:
            sums, room = Layout(outer, channels, pieces), starts * pieces
        else:
            rows = outer if stride >= numel else pieces * (stride // row)
            sums, room = Layout(rows, channels, inner), pieces * stride
        arguments = {
            "channels": channels,
            "inner": inner,
            "numel": numel,
            "stride": stride,
            "steps": steps,
            "BY_ROW": layout.by_row,
            "TILE": ELEMENTS_PER_WARP,
            "UNROLL": UNROLL,
            "num_warps": groups,
        }
        return cls((starts, pieces), sums, room, arguments)


def _dense(weight: Tensor) -> Tensor:
    """Return the weight, or a copy unless it is dense. The stride of a size of 1 is arbitrary."""
    layout = torch.empty_like(weight, device="meta").stride()
    dimensions = zip(weight.shape, weight.stride(), layout, strict=True)
    kept = all(size == 1 or own == other for size, own, other in dimensions)
    return weight if kept else weight.contiguous()


def _aligned(values: Tensor) -> Tensor:
    """Return the values at an address that vectors can be read from."""
    return values if values.data_ptr() % 16 == 0 else values.clone()


def _partial_sums(
    left: Tensor, right: Tensor, norms: Tensor, layout: Layout, squares: bool
) -> tuple[Tensor, Layout]:
    """Return float64 partial sums of left * right over each channel, and their layout."""
    groups = 1 if layout.by_row else GROUPS
    walk = Walk.over(layout, groups)
    sums = right.new_empty(walk.room, dtype=torch.float64)
    channel_products_kernel[walk.grid](
        left,
        right,
        norms,
        sums,
        SQUARES=squares,
        WIDE=torch.float64 in (left.dtype, right.dtype),
        GROUPS=groups,
        **walk.arguments,
    )
    return sums, walk.sums


def _summing(layout: Layout, sums: Layout, rms: bool) -> dict[str, int]:
    """Return the arguments of a kernel that adds up partial sums."""
    return {
        "channels": sums.channels,
        "inner": sums.inner,
        "terms": sums.channel_size,
        "divisor": layout.channel_size if rms else 1,
        "CHANNELS": SUMMED_CHANNELS,
        "TERMS": SUMMED_TERMS,
    }


def channel_norms(weight: Tensor, dim: int, rms: bool) -> Tensor:
    """Implement pdp::channel_norms; arguments as reference.channel_norms."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    norms = weight.new_empty(weight.shape[dim], dtype=dtype)
    if weight.numel() == 0:
        return norms.zero_()
    weight = _aligned(_dense(weight))
    layout = Layout.of(weight, dim)
    with torch.cuda.device_of(weight):
        sums, of_sums = _partial_sums(weight, weight, norms, layout, squares=True)
        channel_norms_kernel[(triton.cdiv(layout.channels, SUMMED_CHANNELS),)](
            sums, norms, **_summing(layout, of_sums, rms)
        )
    return norms


def soft_mask_channel(
    weight: Tensor,
    norms: Tensor,
    threshold: Tensor,
    tau: Tensor,
    dim: int,
    relative: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Implement pdp::soft_mask_channel; arguments as reference.soft_mask_channel."""
    w_hat = torch.empty_like(weight, dtype=out_dtype, requires_grad=False)
    mask = w_hat.new_empty(weight.shape[dim])
    if weight.numel() == 0:  # channels without weights have a mask too
        return reference.soft_mask_channel(weight, norms, threshold, tau, dim, relative, out_dtype)
    walk = Walk.over(Layout.of(w_hat, dim))
    with torch.cuda.device_of(weight):
        soft_mask_channel_fwd_kernel[walk.grid](
            _aligned(in_order_of(w_hat, weight)),
            norms.contiguous(),
            threshold,
            tau,
            w_hat,
            mask,
            RELATIVE=relative,
            TINY=torch.finfo(threshold.dtype).tiny,
            **walk.arguments,
        )
    return w_hat, mask


def soft_mask_channel_backward(
    grad_w_hat: Tensor | None,
    grad_mask: Tensor | None,
    weight: Tensor,
    norms: Tensor,
    threshold: Tensor,
    tau: Tensor,
    dim: int,
    relative: bool,
    rms: bool,
) -> Tensor:
    """Implement pdp::soft_mask_channel_backward; arguments as in the reference."""
    grad = torch.empty_like(weight, requires_grad=False)
    if weight.numel() == 0:
        return grad
    layout = Layout.of(grad, dim)
    weight, norms = _aligned(in_order_of(grad, weight)), norms.contiguous()
    g = grad if grad_w_hat is None else _aligned(in_order_of(grad, grad_w_hat))
    g_mask = norms if grad_mask is None else grad_mask.contiguous()
    options = {
        "RELATIVE": relative,
        "FROM_MASK": grad_mask is not None,
        "WIDE": torch.float64 in (g.dtype, weight.dtype),
        "TINY": torch.finfo(threshold.dtype).tiny,
    }
    with torch.cuda.device_of(weight):
        if (
            grad_w_hat is not None
            and layout.outer == 1
            and BY_ROW_FROM <= layout.inner <= WHOLE_CHANNEL
        ):
            soft_mask_channel_bwd_whole_kernel[(layout.channels,)](
                g,
                g_mask,
                weight,
                norms,
                threshold,
                tau,
                grad,
                inner=layout.inner,
                steps=max(HELD, triton.cdiv(layout.inner, WHOLE_TILE)),
                divisor=layout.channel_size if rms else 1,
                TILE=WHOLE_TILE,
                HELD=HELD,
                num_warps=WHOLE_WARPS,
                **options,
            )
            return grad
        masks, lifts, pulls = (torch.empty_like(norms) for _ in range(3))
        sums, of_sums = pulls, layout
        if grad_w_hat is not None:
            sums, of_sums = _partial_sums(g, weight, norms, layout, squares=False)
        channel_pulls_kernel[(triton.cdiv(layout.channels, SUMMED_CHANNELS),)](
            sums,
            g_mask,
            norms,
            threshold,
            tau,
            masks,
            lifts,
            pulls,
            FROM_W_HAT=grad_w_hat is not None,
            **options,
            **_summing(layout, of_sums, rms),
        )
        walk = Walk.over(layout)
        soft_mask_channel_bwd_kernel[walk.grid](
            g,
            weight,
            masks,
            lifts,
            pulls,
            grad,
            FROM_W_HAT=grad_w_hat is not None,
            **walk.arguments,
        )
    return grad
