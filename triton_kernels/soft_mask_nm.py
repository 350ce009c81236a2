"""N:M masks on GPUs: every group of M weights is a layer of its own, held in registers.

The equations are those of pdp_kernels/ops/reference.py. The backward computes the thresholds again
instead of reading them, so that N:M masks move as many bytes as plain soft masks.

A kernel for 16-bit weights has few instructions to spend before they, and not memory, bound its
time. So what depends on the group alone is computed once for all members, without a division.
"""

import torch
import triton
import triton.language as tl
from pdp_kernels.triton_kernels.groups import (
    group_kernel,
    group_places,
    load_members,
    sort_members,
    store_members,
    tiling,
)
from pdp_kernels.triton_kernels.soft_mask import (
    in_order_of,
    lift_and_curvature,
    lifted_mask_slopes,
    lifted_mask_value,
    power_of_two,
    reciprocal,
    soft_mask_slopes,
    soft_mask_value,
)
from torch import Tensor

# Elements per program, 16 for each thread. On an H100 2:4 masks of 10^8 weights run at 3.0 TB/s,
# forward and backward, as a copy does. Other sizes are not yet measured.
BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def _load_count(pruned_ptr, M: tl.constexpr):
    """Return how many of each group are pruned, from 0 to M."""
    return tl.minimum(tl.maximum(tl.load(pruned_ptr), 0), M).to(tl.int32)


@triton.jit
def _magnitude_keys(members, M: tl.constexpr):
    """Return integers that sort as |w| does. NaN is above infinity."""
    INTEGER: tl.constexpr = tl.int64 if members[0].dtype == tl.float64 else tl.int32
    keys = ()
    for j in tl.static_range(M):
        keys = keys + (tl.abs(members[j]).to(INTEGER, bitcast=True),)
    return keys


@triton.jit
def _order_statistics(members, pruned, M: tl.constexpr):
    """Return the k-th and k+1-th smallest magnitude of each group, k = pruned."""
    dtype: tl.constexpr = members[0].dtype
    keys = sort_members(_magnitude_keys(members, M), M)
    low = keys[0]
    high = keys[min(1, M - 1)]
    for j in tl.static_range(2, M):
        low = tl.where(pruned >= j, keys[j - 1], low)
        high = tl.where(pruned >= j, keys[j], high)
    return low.to(dtype, bitcast=True), high.to(dtype, bitcast=True)


@triton.jit
def _midpoint(low, high):
    return tl.where(high > 1, 0.5 * low + 0.5 * high, 0.5 * (low + high))


@triton.jit
def _unless_none_or_all(t, pruned, M: tl.constexpr):
    """Return t, or -inf if no member of a group is pruned, +inf if all are."""
    extreme = tl.where(pruned == 0, float("-inf"), float("inf"))
    return tl.where((pruned > 0) & (pruned < M), t, extreme.to(t.dtype))


@triton.jit
def _lifted_threshold(low, high, tau, RELATIVE: tl.constexpr, TINY: tl.constexpr):
    """Return lift, t lift, and 2 / ((q lift)^2 tau'), as lift_and_curvature does for one t.

    The lift takes t below 4 before it is squared. An infinite t has any finite q, and t = 0 the
    largest curvature.
    """
    if RELATIVE:
        lift = power_of_two(high)
        t = 0.5 * (low * lift + high * lift)
        curvature = 2.0 / tau * reciprocal(tl.minimum(t * t, 16.0))
        # Not a minimum: the interpreter's keeps NaN, though t is inf where all are pruned.
        return lift, t, tl.where(curvature < 2.0 / TINY, curvature, 2.0 / TINY)
    else:
        t = _midpoint(low, high)
        lift, curvature = lift_and_curvature(t, tau, RELATIVE, TINY)
        return lift, t, curvature


@triton.jit
def _mask_values(members, pruned, tau, M: tl.constexpr, RELATIVE: tl.constexpr, TINY: tl.constexpr):
    """Return m of each member."""
    low, high = _order_statistics(members, pruned, M)
    masks = ()
    if members[0].dtype == tl.float64:
        t = _unless_none_or_all(_midpoint(low, high), pruned, M)
        for j in tl.static_range(M):
            masks = masks + (soft_mask_value(members[j], t, tau, RELATIVE, TINY),)
    else:
        lift, t, curvature = _lifted_threshold(low, high, tau, RELATIVE, TINY)
        t = _unless_none_or_all(t, pruned, M)
        for j in tl.static_range(M):
            masks = masks + (lifted_mask_value(members[j], lift, t, curvature),)
    return masks


@triton.jit
def _mask_slopes(members, pruned, tau, M: tl.constexpr, RELATIVE: tl.constexpr, TINY: tl.constexpr):
    """Return the derivatives of w_hat and of m for each member."""
    low, high = _order_statistics(members, pruned, M)
    of_w_hat = ()
    of_mask = ()
    if members[0].dtype == tl.float64:
        t = _unless_none_or_all(_midpoint(low, high), pruned, M)
        for j in tl.static_range(M):
            w_hat_slope, mask_slope = soft_mask_slopes(members[j], t, tau, RELATIVE, TINY)
            of_w_hat = of_w_hat + (w_hat_slope,)
            of_mask = of_mask + (mask_slope,)
    else:
        lift, t, curvature = _lifted_threshold(low, high, tau, RELATIVE, TINY)
        t = _unless_none_or_all(t, pruned, M)
        for j in tl.static_range(M):
            w_hat_slope, mask_slope = lifted_mask_slopes(members[j], lift, t, curvature)
            of_w_hat = of_w_hat + (w_hat_slope,)
            of_mask = of_mask + (mask_slope,)
    return of_w_hat, of_mask


@triton.jit
def _products(left, right):
    """Return the products of two lists of vectors."""
    results = ()
    for j in tl.static_range(len(left)):
        results = results + (left[j] * right[j],)
    return results


@group_kernel("weight_ptr", "tau_ptr", "pruned_ptr", "w_hat_ptr", "mask_ptr")
def _soft_mask_nm_fwd_kernel(
    weight_ptr,
    tau_ptr,
    pruned_ptr,
    w_hat_ptr,
    mask_ptr,
    rows: tl.int64,
    stride,
    width,
    rows_per_tile,
    reciprocal_width,
    RELATIVE: tl.constexpr,
    WITH_MASK: tl.constexpr,
    TINY: tl.constexpr,
    M: tl.constexpr,
    GROUPS: tl.constexpr,
    ACCESS: tl.constexpr,
):
    places = group_places(rows, stride, width, rows_per_tile, reciprocal_width, M, GROUPS, ACCESS)
    tau = tl.load(tau_ptr)
    w = load_members(weight_ptr, places, tau.dtype, M, ACCESS)
    m = _mask_values(w, _load_count(pruned_ptr, M), tau, M, RELATIVE, TINY)
    store_members(w_hat_ptr, _products(m, w), places, ACCESS)
    if WITH_MASK:
        store_members(mask_ptr, m, places, ACCESS)


@group_kernel("grad_w_hat_ptr", "grad_mask_ptr", "weight_ptr", "tau_ptr", "pruned_ptr", "grad_ptr")
def _soft_mask_nm_bwd_kernel(
    grad_w_hat_ptr,
    grad_mask_ptr,
    weight_ptr,
    tau_ptr,
    pruned_ptr,
    grad_ptr,
    rows: tl.int64,
    stride,
    width,
    rows_per_tile,
    reciprocal_width,
    RELATIVE: tl.constexpr,
    FROM_W_HAT: tl.constexpr,
    FROM_MASK: tl.constexpr,
    TINY: tl.constexpr,
    M: tl.constexpr,
    GROUPS: tl.constexpr,
    ACCESS: tl.constexpr,
):
    places = group_places(rows, stride, width, rows_per_tile, reciprocal_width, M, GROUPS, ACCESS)
    tau = tl.load(tau_ptr)
    w = load_members(weight_ptr, places, tau.dtype, M, ACCESS)
    of_w_hat, of_mask = _mask_slopes(w, _load_count(pruned_ptr, M), tau, M, RELATIVE, TINY)
    if FROM_W_HAT:
        of_w_hat = _products(of_w_hat, load_members(grad_w_hat_ptr, places, tau.dtype, M, ACCESS))
    if FROM_MASK:
        of_mask = _products(of_mask, load_members(grad_mask_ptr, places, tau.dtype, M, ACCESS))
    if FROM_W_HAT and FROM_MASK:
        grad = ()
        for j in tl.static_range(M):
            grad = grad + (of_w_hat[j] + of_mask[j],)
    else:
        grad = of_w_hat if FROM_W_HAT else of_mask
    store_members(grad_ptr, grad, places, ACCESS)


@triton.jit
def _exact_key(w):
    """Return the bits of |w|, as an integer of at least 32 bits; all NaN map to infinity's + 1."""
    BITS: tl.constexpr = w.dtype.primitive_bitwidth
    INFINITY: tl.constexpr = (1 << (BITS - 1)) - (1 << w.dtype.fp_mantissa_width)
    if BITS == 16:
        bits = w.to(tl.int16, bitcast=True).to(tl.int32)
    elif BITS == 32:
        bits = w.to(tl.int32, bitcast=True)
    else:
        bits = w.to(tl.int64, bitcast=True)
    return tl.minimum(bits & ((1 << (BITS - 1)) - 1), INFINITY + 1)


@triton.jit
def _is_first(key, later_key):
    """Return -1 if the member is pruned before one of a later index, else 0.

    Of comparisons, in place of the sign of a difference, LLVM would put vectors of bits together.
    """
    return ((key - later_key - 1) >> (key.dtype.primitive_bitwidth - 1)).to(tl.int32)


@group_kernel("weight_ptr", "pruned_ptr", "kept_ptr")
def _hard_mask_nm_kernel(
    weight_ptr,
    pruned_ptr,
    kept_ptr,
    rows: tl.int64,
    stride,
    width,
    rows_per_tile,
    reciprocal_width,
    M: tl.constexpr,
    GROUPS: tl.constexpr,
    ACCESS: tl.constexpr,
):
    places = group_places(rows, stride, width, rows_per_tile, reciprocal_width, M, GROUPS, ACCESS)
    pruned = _load_count(pruned_ptr, M)
    w = load_members(weight_ptr, places, weight_ptr.dtype.element_ty, M, ACCESS)
    keys = ()
    for j in tl.static_range(M):
        keys = keys + (_exact_key(w[j]),)
    # Up to M = 8 ranks take fewer instructions than sorted keys and a count of ties do.
    kept = ()
    for j in tl.static_range(M):
        rank = tl.zeros(keys[j].shape, tl.int32)
        for i in tl.static_range(M):
            if i < j:
                rank -= _is_first(keys[i], keys[j])
            if i > j:
                rank += 1 + _is_first(keys[j], keys[i])
        kept = kept + (rank >= pruned,)
    store_members(kept_ptr, kept, places, ACCESS)


def soft_mask_nm(
    weight: Tensor,
    tau: Tensor,
    m: int,
    pruned: Tensor,
    dim: int,
    relative: bool,
    out_dtype: torch.dtype | None,
    return_mask: bool,
) -> tuple[Tensor, Tensor]:
    """Implement pdp::soft_mask_nm; arguments as reference.soft_mask_nm."""
    w_hat = torch.empty_like(weight, dtype=out_dtype, requires_grad=False)
    mask = torch.empty_like(w_hat) if return_mask else w_hat.new_empty(0)
    if weight.numel() > 0:
        weight = in_order_of(w_hat, weight)
        tiles = tiling(m, dim, [w_hat, weight, mask], BLOCK, NUM_WARPS)
        with torch.cuda.device_of(weight):
            _soft_mask_nm_fwd_kernel[tiles.grid](
                weight,
                tau,
                pruned,
                w_hat,
                mask,
                RELATIVE=relative,
                WITH_MASK=return_mask,
                TINY=torch.finfo(tau.dtype).tiny,
                num_warps=NUM_WARPS,
                **tiles.arguments,
            )
    return w_hat, mask


def soft_mask_nm_backward(
    grad_w_hat: Tensor | None,
    grad_mask: Tensor | None,
    weight: Tensor,
    tau: Tensor,
    m: int,
    pruned: Tensor,
    dim: int,
    relative: bool,
) -> Tensor:
    """Implement pdp::soft_mask_nm_backward; arguments as reference.soft_mask_nm_backward."""
    if grad_w_hat is None and grad_mask is None:
        return torch.zeros_like(weight, requires_grad=False)
    grad = torch.empty_like(weight, requires_grad=False)
    if weight.numel() > 0:
        weight = in_order_of(grad, weight)
        of_w_hat = grad if grad_w_hat is None else in_order_of(grad, grad_w_hat)
        of_mask = grad if grad_mask is None else in_order_of(grad, grad_mask)
        tiles = tiling(m, dim, [grad, weight, of_w_hat, of_mask], BLOCK, NUM_WARPS)
        with torch.cuda.device_of(weight):
            _soft_mask_nm_bwd_kernel[tiles.grid](
                of_w_hat,
                of_mask,
                weight,
                tau,
                pruned,
                grad,
                RELATIVE=relative,
                FROM_W_HAT=grad_w_hat is not None,
                FROM_MASK=grad_mask is not None,
                TINY=torch.finfo(tau.dtype).tiny,
                num_warps=NUM_WARPS,
                **tiles.arguments,
            )
    return grad


def hard_mask_nm(weight: Tensor, m: int, pruned: Tensor, dim: int) -> Tensor:
    """Implement pdp::hard_mask_nm; arguments as reference.hard_mask_nm."""
    kept = torch.empty_like(weight, dtype=torch.bool, requires_grad=False)
    if weight.numel() > 0:
        weight = in_order_of(kept, weight)
        tiles = tiling(m, dim, [kept, weight], BLOCK, NUM_WARPS)
        with torch.cuda.device_of(weight):
            _hard_mask_nm_kernel[tiles.grid](
                weight, pruned, kept, num_warps=NUM_WARPS, **tiles.arguments
            )
    return kept
