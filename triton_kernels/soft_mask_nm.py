"""N:M masks on GPUs: every group of M weights is a layer of its own, held in registers.

The equations are those of pdp_kernels/ops/reference.py. The backward computes the thresholds again
instead of reading them, so that N:M masks move as many bytes as plain soft masks. The members of a
group are `stride` elements apart: the kernels read any dimension of a dense layout in place.
"""

import torch
import triton
import triton.language as tl
from pdp_kernels.triton_kernels.soft_mask import (
    in_order_of,
    soft_mask_slopes,
    soft_mask_value,
    store,
)
from torch import Tensor

# Elements per program. Not yet measured on a GPU.
BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _offsets(stride, M: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr):
    """Return the offsets of this program's groups, (GROUPS, PADDED), and which are members."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group % stride
    first = (group - inside) * M + inside
    member = tl.arange(0, PADDED)[None, :]
    # int64, because the last member may be more than 2^31 elements behind the first.
    return first[:, None] + member.to(tl.int64) * stride, member < M


@triton.jit
def _magnitude_keys(w, is_member):
    """Return integers that sort as |w| does.

    The key of every NaN is infinity's plus 1. Padding, which fills a group up to a power of two,
    has a key above that.
    """
    if w.dtype == tl.float64:
        keys = tl.abs(w).to(tl.int64, bitcast=True)
        keys = tl.minimum(keys, 0x7FF0000000000001)
        return tl.where(is_member, keys, 0x7FF0000000000002)
    else:
        keys = tl.abs(w).to(tl.int32, bitcast=True)
        keys = tl.minimum(keys, 0x7F800001)
        return tl.where(is_member, keys, 0x7F800002)


@triton.jit
def _column(sorted_keys, index):
    """Return column `index` of the sorted keys, (GROUPS, 1)."""
    columns = tl.arange(0, sorted_keys.shape[1])[None, :]
    return tl.sum(tl.where(columns == index, sorted_keys, 0), axis=1, keep_dims=True)


@triton.jit
def _group_thresholds(w, is_member, PRUNED: tl.constexpr):
    """Return t of each group, (GROUPS, 1): the midpoint of the PRUNED-th and next magnitude."""
    if PRUNED == 0:
        return tl.full((w.shape[0], 1), float("-inf"), w.dtype)
    else:
        keys = tl.sort(_magnitude_keys(w, is_member), dim=1)
        low = _column(keys, PRUNED - 1).to(w.dtype, bitcast=True)
        high = _column(keys, PRUNED).to(w.dtype, bitcast=True)
        return tl.where(high > 1, 0.5 * low + 0.5 * high, 0.5 * (low + high))


@triton.jit
def _soft_mask_nm_fwd_kernel(
    weight_ptr,
    tau_ptr,
    w_hat_ptr,
    mask_ptr,
    numel,
    stride,
    M: tl.constexpr,
    PRUNED: tl.constexpr,
    RELATIVE: tl.constexpr,
    WITH_MASK: tl.constexpr,
    TINY: tl.constexpr,
    PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    offsets, is_member = _offsets(stride, M, PADDED, GROUPS)
    inside = (offsets < numel) & is_member
    tau = tl.load(tau_ptr)
    w = tl.load(weight_ptr + offsets, mask=inside, other=0).to(tau.dtype)
    t = _group_thresholds(w, is_member, PRUNED)
    m = soft_mask_value(w, t, tau, RELATIVE, TINY)
    store(w_hat_ptr + offsets, m * w, inside)
    if WITH_MASK:
        store(mask_ptr + offsets, m, inside)


@triton.jit
def _soft_mask_nm_bwd_kernel(
    grad_w_hat_ptr,
    grad_mask_ptr,
    weight_ptr,
    tau_ptr,
    grad_ptr,
    numel,
    stride,
    M: tl.constexpr,
    PRUNED: tl.constexpr,
    RELATIVE: tl.constexpr,
    FROM_W_HAT: tl.constexpr,
    FROM_MASK: tl.constexpr,
    TINY: tl.constexpr,
    PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    offsets, is_member = _offsets(stride, M, PADDED, GROUPS)
    inside = (offsets < numel) & is_member
    tau = tl.load(tau_ptr)
    w = tl.load(weight_ptr + offsets, mask=inside, other=0).to(tau.dtype)
    t = _group_thresholds(w, is_member, PRUNED)
    w_hat_slope, mask_slope = soft_mask_slopes(w, t, tau, RELATIVE, TINY)
    grad = tl.zeros_like(w)
    if FROM_W_HAT:
        grad += tl.load(grad_w_hat_ptr + offsets, mask=inside, other=0).to(w.dtype) * w_hat_slope
    if FROM_MASK:
        grad += tl.load(grad_mask_ptr + offsets, mask=inside, other=0).to(w.dtype) * mask_slope
    store(grad_ptr + offsets, grad, inside)


@triton.jit
def _hard_mask_nm_kernel(
    weight_ptr,
    kept_ptr,
    numel,
    stride,
    M: tl.constexpr,
    PRUNED: tl.constexpr,
    PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    offsets, is_member = _offsets(stride, M, PADDED, GROUPS)
    inside = (offsets < numel) & is_member
    w = tl.load(weight_ptr + offsets, mask=inside, other=0)
    if w.dtype != tl.float64:
        w = w.to(tl.float32)
    keys = _magnitude_keys(w, is_member)
    if PRUNED == 0:
        kept = keys >= 0
    else:
        kth = _column(tl.sort(keys, dim=1), PRUNED - 1)
        below = tl.sum((keys < kth).to(tl.int32), axis=1, keep_dims=True)
        tied = (keys == kth).to(tl.int32)
        # Ties are pruned in order of index, until PRUNED members are pruned.
        kept = (keys > kth) | ((tied > 0) & (tl.cumsum(tied, axis=1) > PRUNED - below))
    tl.store(kept_ptr + offsets, kept, mask=inside)


def _grid(numel: int, m: int) -> tuple[tuple[int], dict[str, int]]:
    """Return the launch grid, and the numbers of groups and columns per program."""
    padded = triton.next_power_of_2(m)
    groups = BLOCK // padded
    return (triton.cdiv(numel // m, groups),), {"PADDED": padded, "GROUPS": groups}


def soft_mask_nm(
    weight: Tensor,
    tau: Tensor,
    m: int,
    pruned: int,
    dim: int,
    relative: bool,
    out_dtype: torch.dtype | None,
    return_mask: bool,
) -> tuple[Tensor, Tensor]:
    """Implement pdp::soft_mask_nm; arguments as reference.soft_mask_nm."""
    w_hat = torch.empty_like(weight, dtype=out_dtype, requires_grad=False)
    mask = torch.empty_like(w_hat) if return_mask else w_hat.new_empty(0)
    if weight.numel() > 0:
        grid, sizes = _grid(weight.numel(), m)
        with torch.cuda.device_of(weight):
            _soft_mask_nm_fwd_kernel[grid](
                in_order_of(w_hat, weight),
                tau,
                w_hat,
                mask,
                weight.numel(),
                w_hat.stride(dim),
                M=m,
                PRUNED=pruned,
                RELATIVE=relative,
                WITH_MASK=return_mask,
                TINY=torch.finfo(tau.dtype).tiny,
                num_warps=NUM_WARPS,
                **sizes,
            )
    return w_hat, mask


def soft_mask_nm_backward(
    grad_w_hat: Tensor | None,
    grad_mask: Tensor | None,
    weight: Tensor,
    tau: Tensor,
    m: int,
    pruned: int,
    dim: int,
    relative: bool,
) -> Tensor:
    """Implement pdp::soft_mask_nm_backward; arguments as reference.soft_mask_nm_backward."""
    grad = torch.empty_like(weight, requires_grad=False)
    if weight.numel() > 0:
        grid, sizes = _grid(weight.numel(), m)
        with torch.cuda.device_of(weight):
            _soft_mask_nm_bwd_kernel[grid](
                grad if grad_w_hat is None else in_order_of(grad, grad_w_hat),
                grad if grad_mask is None else in_order_of(grad, grad_mask),
                in_order_of(grad, weight),
                tau,
                grad,
                weight.numel(),
                grad.stride(dim),
                M=m,
                PRUNED=pruned,
                RELATIVE=relative,
                FROM_W_HAT=grad_w_hat is not None,
                FROM_MASK=grad_mask is not None,
                TINY=torch.finfo(tau.dtype).tiny,
                num_warps=NUM_WARPS,
                **sizes,
            )
    return grad


def hard_mask_nm(weight: Tensor, m: int, pruned: int, dim: int) -> Tensor:
    """Implement pdp::hard_mask_nm; arguments as reference.hard_mask_nm."""
    kept = torch.empty_like(weight, dtype=torch.bool, requires_grad=False)
    if weight.numel() > 0:
        grid, sizes = _grid(weight.numel(), m)
        with torch.cuda.device_of(weight):
            _hard_mask_nm_kernel[grid](
                in_order_of(kept, weight),
                kept,
                weight.numel(),
                kept.stride(dim),
                M=m,
                PRUNED=pruned,
                num_warps=NUM_WARPS,
                **sizes,
            )
    return kept
