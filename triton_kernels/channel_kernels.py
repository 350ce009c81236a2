"""Kernels of channel masks: products and their sums, masks, gradients. See channel_tiles.py.

The equations are those of pdp_kernels/ops/reference.py.
"""

import triton
import triton.language as tl
from pdp_kernels.triton_kernels.channel_tiles import (
    SIZES,
    UNALIGNED,
    VECTOR,
    add_products,
    channel_of_lanes,
    edges_of,
    edges_of_last_row,
    range_of_program,
    read_pair,
    read_tiles,
    tile_at,
    walk_of_program,
)
from pdp_kernels.triton_kernels.soft_mask import (
    mask_and_slope,
    mask_exponent,
    power_of_two,
    scale_and_temperature,
    soft_mask_value,
    store,
)


@triton.jit
def _lift_of(norm):
    """Return the power of two by which a channel is multiplied before its factor in dW.

    The factor, which is divided by it, may be out of float32's range where its product is not. In
    float64 the norm goes out of range first.
    """
    return 1.0 if norm.dtype == tl.float64 else power_of_two(norm)


@triton.jit
def _scale_of_products(norm, WIDE: tl.constexpr):
    """Return the power of two by which products in float32 are multiplied."""
    return 1.0 if WIDE else power_of_two(norm)


@triton.jit
def _unscaled(products, norm, WIDE: tl.constexpr):
    """Return the products without their _scale_of_products."""
    return products if WIDE else products * power_of_two(power_of_two(norm)).to(tl.float64)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def channel_products_kernel(
    left_ptr,
    right_ptr,
    norms_ptr,
    sums_ptr,
    channels: tl.int64,
    inner: tl.int64,
    numel: tl.int64,
    stride: tl.int64,
    steps: tl.int32,
    SQUARES: tl.constexpr,
    WIDE: tl.constexpr,
    BY_ROW: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Write float64 partial sums: one of a program by row, one of each column else.

    SQUARES: of right^2. Else of left * right, times _scale_of_products.
    """
    begin, end = range_of_program(channels, inner, numel, BY_ROW)
    walk = walk_of_program(begin, end, stride, BY_ROW, TILE, GROUPS)
    scale = 1.0
    if not SQUARES:
        channel = channel_of_lanes(channels, inner, BY_ROW, TILE)
        scale = _scale_of_products(tl.load(norms_ptr + channel), WIDE)
    dtype: tl.constexpr = tl.float64 if SQUARES or WIDE else tl.float32
    both: tl.constexpr = not SQUARES
    sums, errors = tl.zeros(walk[2].shape, dtype), tl.zeros(walk[2].shape, dtype)
    place = tl.program_id(1) * steps * (GROUPS * UNROLL)
    last = place + steps * (GROUPS * UNROLL)
    while place < last:
        tiles = read_tiles(left_ptr, right_ptr, walk, place, BY_ROW, TILE, GROUPS, UNROLL, both)
        sums, errors = add_products(sums, errors, tiles, scale)
        place += GROUPS * UNROLL
    if BY_ROW:
        total = tl.sum(sums.to(tl.float64)) + tl.sum(errors).to(tl.float64)
        if (begin % VECTOR != 0 or end % VECTOR != 0) and tl.program_id(1) == 0:
            offsets, inside = edges_of(begin, end)
            pair = read_pair(left_ptr, right_ptr, offsets, inside, both)
            total += tl.sum(pair[0].to(tl.float64) * pair[1].to(tl.float64)) * scale
        piece = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(sums_ptr + piece, total)
    else:
        if end % VECTOR != 0:
            rows = steps * (GROUPS * UNROLL)
            offsets, inside = edges_of_last_row(end, stride, rows, TILE, GROUPS)
            pair = read_pair(left_ptr, right_ptr, offsets, inside, both)
            sums, errors = add_products(sums, errors, (pair,), scale)
        columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
        first = tl.program_id(1).to(tl.int64) * (stride // VECTOR) * VECTOR
        inside = columns // VECTOR < (stride // VECTOR).to(tl.int32)
        total = tl.sum(sums.to(tl.float64) + errors.to(tl.float64), axis=0)
        tl.store(sums_ptr + first + columns, total, mask=inside)


@triton.jit
def _sum_terms(sums_ptr, channels, inner, terms, channel, exists, TERMS: tl.constexpr):
    """Return the sums over each channel of partial sums, stored as (outer, channels, inner).

    terms: outer * inner.
    """
    total = tl.zeros((channel.shape[0], TERMS), tl.float64)
    first = 0
    while first < terms:
        term = first + tl.arange(0, TERMS).to(tl.int64)
        rows = (term // inner)[None, :] * channels + channel[:, None]
        inside = exists[:, None] & (term < terms)[None, :]
        total += tl.load(sums_ptr + rows * inner + (term % inner)[None, :], mask=inside, other=0)
        first += TERMS
    return tl.sum(total, axis=1)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def channel_norms_kernel(
    sums_ptr,
    norms_ptr,
    channels: tl.int64,
    inner: tl.int64,
    terms: tl.int64,
    divisor: tl.int64,
    CHANNELS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Write the roots of the sums of each channel over the divisor."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    squares = _sum_terms(sums_ptr, channels, inner, terms, channel, exists, TERMS)
    norms = tl.sqrt(squares / divisor.to(tl.float64))
    tl.store(norms_ptr + channel, norms.to(norms_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _mask_and_pull(norm, t, tau, products, divisor, RELATIVE: tl.constexpr, TINY: tl.constexpr):
    """Return m, the lift, and the factor of the lifted W in dW.

    The factor, 2/tau m (1 - m) (<g, W> + g_m) / divisor / lift, is computed in float64: in a layer
    of small weights, 2/tau of a relative temperature overflows float32. A channel of zeros gets no
    gradient through its norm.
    """
    scale, tau = scale_and_temperature(t, tau, RELATIVE, TINY)
    m, slope = mask_and_slope(mask_exponent(norm, t, scale, tau, RELATIVE))
    pull = 2 * slope.to(tl.float64) * products
    divisor = tau.to(tl.float64) * divisor.to(tl.float64)
    if RELATIVE:
        if t.dtype == tl.float64:
            pull = pull / scale / scale
        else:  # float64 holds the square of a float32
            scale = scale.to(tl.float64)
            divisor *= scale * scale
    lift = _lift_of(norm)
    divisor *= lift
    return m, lift, tl.where(norm == 0, 0.0, pull / divisor).to(t.dtype)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def channel_pulls_kernel(
    sums_ptr,
    grad_mask_ptr,
    norms_ptr,
    threshold_ptr,
    tau_ptr,
    masks_ptr,
    lifts_ptr,
    pulls_ptr,
    channels: tl.int64,
    inner: tl.int64,
    terms: tl.int64,
    divisor: tl.int64,
    RELATIVE: tl.constexpr,
    FROM_W_HAT: tl.constexpr,
    FROM_MASK: tl.constexpr,
    WIDE: tl.constexpr,
    TINY: tl.constexpr,
    CHANNELS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Write m, the lift, and the factor of the lifted W in dW of each channel."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    norm = tl.load(norms_ptr + channel, mask=exists, other=0)
    products = tl.zeros((CHANNELS,), tl.float64)
    if FROM_W_HAT:
        products += _sum_terms(sums_ptr, channels, inner, terms, channel, exists, TERMS)
        products = _unscaled(products, norm, WIDE)
    if FROM_MASK:
        products += tl.load(grad_mask_ptr + channel, mask=exists, other=0).to(tl.float64)
    t, tau = tl.load(threshold_ptr), tl.load(tau_ptr)
    m, lift, pull = _mask_and_pull(norm, t, tau, products, divisor, RELATIVE, TINY)
    tl.store(masks_ptr + channel, m, mask=exists)
    tl.store(lifts_ptr + channel, lift, mask=exists)
    tl.store(pulls_ptr + channel, pull, mask=exists)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def soft_mask_channel_fwd_kernel(
    weight_ptr,
    norms_ptr,
    threshold_ptr,
    tau_ptr,
    w_hat_ptr,
    mask_ptr,
    channels: tl.int64,
    inner: tl.int64,
    numel: tl.int64,
    stride: tl.int64,
    steps: tl.int32,
    RELATIVE: tl.constexpr,
    TINY: tl.constexpr,
    BY_ROW: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    begin, end = range_of_program(channels, inner, numel, BY_ROW)
    t, tau = tl.load(threshold_ptr), tl.load(tau_ptr)
    channel = channel_of_lanes(channels, inner, BY_ROW, TILE)
    m = soft_mask_value(tl.load(norms_ptr + channel), t, tau, RELATIVE, TINY)
    if tl.program_id(1) == 0:
        if BY_ROW:
            store(mask_ptr + channel, m, tl.program_id(0) < channels)
        else:
            columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
            store(mask_ptr + channel, m, columns == channel * inner)
    walk = walk_of_program(begin, end, stride, BY_ROW, TILE, 1)
    place = tl.program_id(1) * steps * UNROLL
    last = place + steps * UNROLL
    while place < last:
        tiles = read_tiles(weight_ptr, weight_ptr, walk, place, BY_ROW, TILE, 1, UNROLL, False)
        for i in tl.static_range(UNROLL):
            offsets, inside = tile_at(walk, place + i, BY_ROW, TILE)
            store(w_hat_ptr + offsets, m * tiles[i][0].to(m.dtype), inside)
        place += UNROLL
    if (begin % VECTOR != 0 or end % VECTOR != 0) and tl.program_id(1) == 0:
        offsets, inside = edges_of(begin, end)
        w = tl.load(weight_ptr + offsets, mask=inside).to(m.dtype)
        if BY_ROW:
            store(w_hat_ptr + offsets, m * w, inside)
        elif tl.program_id(0) == 0:
            norm = tl.load(norms_ptr + offsets // inner % channels, mask=inside, other=0)
            own = soft_mask_value(norm, t, tau, RELATIVE, TINY)
            store(w_hat_ptr + offsets, own * w, inside)


@triton.jit
def _write_grad(ptr, pair, m, pull, lift, offsets, inside, FROM_W_HAT: tl.constexpr):
    """Write dW = m g + pull (lift W) of a pair (g, W) at the offsets that are inside.

    Which product is fused with the sum is said here, so that edges get the same bits as tiles.
    """
    grad = pull * (pair[1].to(pull.dtype) * lift)
    if FROM_W_HAT:
        grad = tl.fma(m, pair[0].to(m.dtype), grad)
    store(ptr + offsets, grad, inside)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def soft_mask_channel_bwd_kernel(
    grad_w_hat_ptr,
    weight_ptr,
    masks_ptr,
    lifts_ptr,
    pulls_ptr,
    grad_ptr,
    channels: tl.int64,
    inner: tl.int64,
    numel: tl.int64,
    stride: tl.int64,
    steps: tl.int32,
    FROM_W_HAT: tl.constexpr,
    BY_ROW: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Write dW from the masks, lifts and factors of the channels."""
    begin, end = range_of_program(channels, inner, numel, BY_ROW)
    channel = channel_of_lanes(channels, inner, BY_ROW, TILE)
    m, pull = tl.load(masks_ptr + channel), tl.load(pulls_ptr + channel)
    lift = tl.load(lifts_ptr + channel)
    walk = walk_of_program(begin, end, stride, BY_ROW, TILE, 1)
    place = tl.program_id(1) * steps * UNROLL
    last = place + steps * UNROLL
    while place < last:
        tiles = read_tiles(
            grad_w_hat_ptr, weight_ptr, walk, place, BY_ROW, TILE, 1, UNROLL, FROM_W_HAT
        )
        for i in tl.static_range(UNROLL):
            offsets, inside = tile_at(walk, place + i, BY_ROW, TILE)
            _write_grad(grad_ptr, tiles[i], m, pull, lift, offsets, inside, FROM_W_HAT)
        place += UNROLL
    if (begin % VECTOR != 0 or end % VECTOR != 0) and tl.program_id(1) == 0:
        offsets, inside = edges_of(begin, end)
        pair = read_pair(grad_w_hat_ptr, weight_ptr, offsets, inside, FROM_W_HAT)
        if BY_ROW:
            _write_grad(grad_ptr, pair, m, pull, lift, offsets, inside, FROM_W_HAT)
        elif tl.program_id(0) == 0:
            own = offsets // inner % channels
            m_own, pull_own = tl.load(masks_ptr + own, inside), tl.load(pulls_ptr + own, inside)
            lift_own = tl.load(lifts_ptr + own, inside)
            _write_grad(grad_ptr, pair, m_own, pull_own, lift_own, offsets, inside, FROM_W_HAT)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def soft_mask_channel_bwd_whole_kernel(
    grad_w_hat_ptr,
    grad_mask_ptr,
    weight_ptr,
    norms_ptr,
    threshold_ptr,
    tau_ptr,
    grad_ptr,
    inner: tl.int64,
    steps: tl.int32,
    divisor: tl.int64,
    RELATIVE: tl.constexpr,
    FROM_MASK: tl.constexpr,
    WIDE: tl.constexpr,
    TINY: tl.constexpr,
    TILE: tl.constexpr,
    HELD: tl.constexpr,
):
    """Write dW of a channel that is one run, of which HELD tiles stay in registers."""
    begin, end = range_of_program(tl.num_programs(0), inner, inner, True)
    walk = walk_of_program(begin, end, TILE, True, TILE, 1)
    held = read_tiles(grad_w_hat_ptr, weight_ptr, walk, 0, True, TILE, 1, HELD, True)
    offsets, at_edge = edges_of(begin, end)
    edge = read_pair(grad_w_hat_ptr, weight_ptr, offsets, at_edge, True)
    norm = tl.load(norms_ptr + tl.program_id(0))
    scale = _scale_of_products(norm, WIDE)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    sums, errors = tl.zeros((TILE,), dtype), tl.zeros((TILE,), dtype)
    sums, errors = add_products(sums, errors, held, scale)
    place = HELD
    while place < steps:
        tiles = read_tiles(grad_w_hat_ptr, weight_ptr, walk, place, True, TILE, 1, 1, True)
        sums, errors = add_products(sums, errors, tiles, scale)
        place += 1
    products = tl.sum(sums.to(tl.float64)) + tl.sum(errors).to(tl.float64)
    products = _unscaled(products, norm, WIDE)
    products += tl.sum(edge[0].to(tl.float64) * edge[1].to(tl.float64))
    if FROM_MASK:
        products += tl.load(grad_mask_ptr + tl.program_id(0)).to(tl.float64)

    t, tau = tl.load(threshold_ptr), tl.load(tau_ptr)
    m, lift, pull = _mask_and_pull(norm, t, tau, products, divisor, RELATIVE, TINY)
    for i in tl.static_range(HELD):
        held_offsets, inside = tile_at(walk, i, True, TILE)
        _write_grad(grad_ptr, held[i], m, pull, lift, held_offsets, inside, True)
    place = HELD
    while place < steps:
        tiles = read_tiles(grad_w_hat_ptr, weight_ptr, walk, place, True, TILE, 1, 1, True)
        own_offsets, inside = tile_at(walk, place, True, TILE)
        _write_grad(grad_ptr, tiles[0], m, pull, lift, own_offsets, inside, True)
        place += 1
    _write_grad(grad_ptr, edge, m, pull, lift, offsets, at_edge, True)
