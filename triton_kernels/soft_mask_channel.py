"""Channel masks on GPUs.

The norms take one read of the weight, and w_hat one read and one write. The backward reads gradient
and weight once if a channel fits into the registers of a program, else twice. The equations are
those of pdp_kernels/ops/reference.py.

In storage order a dense weight is outer x channels x inner: the dimensions with a larger stride
than the channels', the channels, and the dimensions with a smaller one. A tile has CHANNELS
channels and INNER neighbours in one outer row. The tiles of the same channels are numbered along
the inner dimension, then the outer one.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from pdp_kernels.triton_kernels.soft_mask import (
    in_order_of,
    mask_and_slope,
    mask_exponent,
    scale_and_temperature,
    soft_mask_value,
    store,
)
from torch import Tensor

from pdp_kernels.ops import reference

# Elements per tile, and the largest channel that a program keeps in registers. Not yet measured on
# a GPU.
BLOCK = 1024
WHOLE_CHANNEL = 8192
ELEMENTS_PER_WARP = 512

# Tiles that one program sums: few partial sums, and enough programs to fill a GPU.
TILES_PER_PIECE = 16


class Layout(NamedTuple):
    """The memory layout of a dense weight, and its tiles."""

    outer: int
    channels: int
    inner: int
    tile_channels: int
    tile_inner: int

    @classmethod
    def of(cls, ordered: Tensor, dim: int, block: int | None = None) -> "Layout":
        block = block or BLOCK
        numel, channels = ordered.numel(), ordered.shape[dim]
        # The stride of a dimension of size 1 is arbitrary.
        inner = ordered.stride(dim) if channels > 1 else numel
        tile_inner = min(block, triton.next_power_of_2(inner))
        tile_channels = min(block // tile_inner, triton.next_power_of_2(channels))
        return cls(numel // (channels * inner), channels, inner, tile_channels, tile_inner)

    @property
    def channel_size(self) -> int:
        return self.outer * self.inner

    @property
    def tiles(self) -> int:
        return self.outer * triton.cdiv(self.inner, self.tile_inner)

    @property
    def channel_blocks(self) -> int:
        return triton.cdiv(self.channels, self.tile_channels)

    @property
    def arguments(self) -> dict[str, int]:
        """The arguments that every kernel over tiles takes."""
        return {
            "channels": self.channels,
            "inner": self.inner,
            "CHANNELS": self.tile_channels,
            "INNER": self.tile_inner,
            "num_warps": max(4, self.tile_channels * self.tile_inner // ELEMENTS_PER_WARP),
        }


@triton.jit
def _place(channels, CHANNELS: tl.constexpr):
    """Return the index of this program's tile or piece, its channels, and which of them exist."""
    blocks = tl.cdiv(channels, CHANNELS)
    channel = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    return tl.program_id(0) // blocks, channel.to(tl.int64), channel < channels


@triton.jit
def _offsets(tile, channel, exists, channels, inner, INNER: tl.constexpr):
    """Return the offsets of a tile's elements, (CHANNELS, INNER), and which of them exist."""
    inner_tiles = tl.cdiv(inner, INNER)
    tile = tile.to(tl.int64)
    column = (tile % inner_tiles) * INNER + tl.arange(0, INNER)
    run = (tile // inner_tiles) * channels + channel
    offsets = run[:, None] * inner + column[None, :]
    return offsets, exists[:, None] & (column < inner)[None, :]


@triton.jit
def _products_kernel(
    left_ptr,
    right_ptr,
    sums_ptr,
    channels,
    inner,
    tiles,
    TILES: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Write sums[piece, channel] of left * right, in float64.

    float64 holds the product of two float32 numbers exactly, and no square leaves its range.
    """
    piece, channel, exists = _place(channels, CHANNELS)
    sums = tl.zeros((CHANNELS, INNER), tl.float64)
    for index in range(TILES):
        tile = piece * TILES + index
        offsets, inside = _offsets(tile, channel, exists, channels, inner, INNER)
        inside = inside & (tile < tiles)
        left = tl.load(left_ptr + offsets, mask=inside, other=0).to(tl.float64)
        right = tl.load(right_ptr + offsets, mask=inside, other=0).to(tl.float64)
        sums += left * right
    tl.store(sums_ptr + piece.to(tl.int64) * channels + channel, tl.sum(sums, axis=1), mask=exists)


@triton.jit
def _soft_mask_channel_fwd_kernel(
    weight_ptr,
    norms_ptr,
    threshold_ptr,
    tau_ptr,
    w_hat_ptr,
    mask_ptr,
    channels,
    inner,
    RELATIVE: tl.constexpr,
    TINY: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    tile, channel, exists = _place(channels, CHANNELS)
    t = tl.load(threshold_ptr)
    norm = tl.load(norms_ptr + channel, mask=exists, other=0)
    m = soft_mask_value(norm, t, tl.load(tau_ptr), RELATIVE, TINY)
    if tile == 0:
        store(mask_ptr + channel, m, exists)
    offsets, inside = _offsets(tile, channel, exists, channels, inner, INNER)
    w = tl.load(weight_ptr + offsets, mask=inside).to(t.dtype)
    store(w_hat_ptr + offsets, m[:, None] * w, inside)


@triton.jit
def _soft_mask_channel_bwd_kernel(
    grad_w_hat_ptr,
    grad_mask_ptr,
    weight_ptr,
    norms_ptr,
    threshold_ptr,
    tau_ptr,
    products_ptr,
    grad_ptr,
    channels,
    inner,
    divisor,
    RELATIVE: tl.constexpr,
    FROM_W_HAT: tl.constexpr,
    FROM_MASK: tl.constexpr,
    WHOLE: tl.constexpr,
    TINY: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Write dW = m g + pull W. WHOLE: a tile holds whole channels, and this kernel sums <g, W>."""
    tile, channel, exists = _place(channels, CHANNELS)
    offsets, inside = _offsets(tile, channel, exists, channels, inner, INNER)
    t, tau = tl.load(threshold_ptr), tl.load(tau_ptr)
    w = tl.load(weight_ptr + offsets, mask=inside, other=0).to(t.dtype)
    norm = tl.load(norms_ptr + channel, mask=exists, other=0)
    scale, tau = scale_and_temperature(t, tau, RELATIVE, TINY)
    z = mask_exponent(norm, t, scale, tau, RELATIVE)
    m, slope = mask_and_slope(z)
    # Where the slope underflows to 0 its factor may overflow, and 0 * inf is NaN.
    ratio = norm / scale if RELATIVE else norm
    factor = tl.where(slope == 0, 0.0, 2 * ratio / tau * slope).to(tl.float64)

    through_mask = tl.zeros((CHANNELS,), tl.float64)
    grad = tl.zeros_like(w)
    if FROM_W_HAT:
        g = tl.load(grad_w_hat_ptr + offsets, mask=inside, other=0).to(t.dtype)
        grad += m[:, None] * g
        if WHOLE:
            through_mask += tl.sum(g.to(tl.float64) * w.to(tl.float64), axis=1)
        else:
            through_mask += tl.load(products_ptr + channel, mask=exists, other=0)
    if FROM_MASK:
        through_mask += tl.load(grad_mask_ptr + channel, mask=exists, other=0).to(tl.float64)
    # The norm of a channel of zeros has no derivative: no gradient flows through it.
    pull = tl.where(norm == 0, 0.0, factor * through_mask / scale / norm / divisor).to(t.dtype)
    store(grad_ptr + offsets, grad + pull[:, None] * w, inside)


def _products(left: Tensor, right: Tensor, layout: Layout) -> Tensor:
    """Return the sum of left * right over each channel, float64 (C,)."""
    tiles = min(TILES_PER_PIECE, triton.next_power_of_2(layout.tiles))
    pieces = triton.cdiv(layout.tiles, tiles)
    sums = left.new_empty(pieces, layout.channels, dtype=torch.float64)
    _products_kernel[(layout.channel_blocks * pieces,)](
        left, right, sums, tiles=layout.tiles, TILES=tiles, **layout.arguments
    )
    return sums.sum(0) if pieces > 1 else sums[0]


def channel_norms(weight: Tensor, dim: int, rms: bool) -> Tensor:
    """Implement pdp::channel_norms; arguments as reference.channel_norms."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if weight.numel() == 0:
        return weight.new_zeros(weight.shape[dim], dtype=dtype)
    if weight.stride() != torch.empty_like(weight, device="meta").stride():
        weight = weight.contiguous()  # empty_like keeps the strides of every dense layout
    layout = Layout.of(weight, dim)
    with torch.cuda.device_of(weight):
        squares = _products(weight, weight, layout)
    return (squares / layout.channel_size if rms else squares).sqrt().to(dtype)


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
    layout = Layout.of(w_hat, dim)
    with torch.cuda.device_of(weight):
        _soft_mask_channel_fwd_kernel[(layout.channel_blocks * layout.tiles,)](
            in_order_of(w_hat, weight),
            norms.contiguous(),
            threshold,
            tau,
            w_hat,
            mask,
            RELATIVE=relative,
            TINY=torch.finfo(threshold.dtype).tiny,
            **layout.arguments,
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
    whole = layout.outer == 1 and layout.inner <= WHOLE_CHANNEL
    if whole:
        layout = Layout.of(grad, dim, max(BLOCK, triton.next_power_of_2(layout.inner)))
    weight = in_order_of(grad, weight)
    if grad_w_hat is not None:
        grad_w_hat = in_order_of(grad, grad_w_hat)
    with torch.cuda.device_of(weight):
        products = None
        if grad_w_hat is not None and not whole:
            products = _products(grad_w_hat, weight, layout)
        _soft_mask_channel_bwd_kernel[(layout.channel_blocks * layout.tiles,)](
            grad if grad_w_hat is None else grad_w_hat,
            grad if grad_mask is None else grad_mask.contiguous(),
            weight,
            norms.contiguous(),
            threshold,
            tau,
            norms if products is None else products,
            grad,
            divisor=float(layout.channel_size if rms else 1),
            RELATIVE=relative,
            FROM_W_HAT=grad_w_hat is not None,
            FROM_MASK=grad_mask is not None,
            WHOLE=whole,
            TINY=torch.finfo(threshold.dtype).tiny,
            **layout.arguments,
        )
    return grad
