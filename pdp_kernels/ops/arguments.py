"""Checks of the arguments that the Triton kernels rely on, for direct callers of torch.ops.pdp.

A wrong argument raises an error instead of an illegal memory access. The function for an operator
has its name and its arguments. csrc/arguments.h has the same checks for the native operators. The
public functions check more, before they call an operator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pdp_kernels.ops.reference import threshold_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_GROUP = 32  # members of an N:M group
# The smallest 16-bit matrix that torch.sparse.SparseSemiStructuredTensorCUTLASS accepts.
COMPRESSED_ROWS, COMPRESSED_COLUMNS = 32, 64


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


# Every mask runs the next five. They write a message only if it is needed.


def _check_weight(weight: Tensor) -> None:
    if weight.dtype not in DTYPES:
        raise ValueError(f"weight must be floating point, got {weight.dtype}")


def _check_values(
    name: str, values: Tensor, dtype: torch.dtype, count: int, weight: Tensor
) -> None:
    if values.dtype != dtype:
        raise ValueError(f"{name} must have dtype {dtype}, got {values.dtype}")
    if values.numel() != count:
        raise ValueError(f"{name} must have {count} elements, got {values.numel()}")
    _check_device(name, values, weight)


def _check_like(weight: Tensor, **gradients: Tensor | None) -> None:
    for name, values in gradients.items():
        if values is None:
            continue
        if values.dtype not in DTYPES:
            raise ValueError(f"{name} must be floating point, got {values.dtype}")
        if values.shape != weight.shape:
            raise ValueError(
                f"{name} must have the weight's shape {tuple(weight.shape)}, "
                f"got {tuple(values.shape)}"
            )
        _check_device(name, values, weight)


def _check_device(name: str, values: Tensor, weight: Tensor) -> None:
    if values.device != weight.device:
        raise ValueError(
            f"{name} must be on the weight's device {weight.device}, got {values.device}"
        )


def _check_scalars(weight: Tensor, **scalars: Tensor) -> None:
    _check_weight(weight)
    dtype = threshold_dtype((weight,))
    for name, value in scalars.items():
        _check_values(name, value, dtype, 1, weight)


def _check_list(weights: Sequence[Tensor], **values: Tensor) -> None:
    _require(len(weights) > 0, "weights must not be empty, got none")
    dtype = threshold_dtype(weights[:1])
    for weight in weights:
        _check_weight(weight)
        _require(
            weight.device == weights[0].device,
            f"weights must be on one device, got {weights[0].device} and {weight.device}",
        )
        _require(
            threshold_dtype([weight]) == dtype,
            "weights must be all of float64 or none, because their thresholds have one dtype; got "
            f"{weights[0].dtype} and {weight.dtype}",
        )
    for name, value in values.items():
        _require(value.dim() == 1, f"{name} must have one dimension, got {value.dim()}")
        _check_values(name, value, dtype, len(weights), weights[0])


def _check_dim(weight: Tensor, dim: int) -> None:
    _require(0 <= dim < weight.dim(), f"dim must be in [0, {weight.dim()}), got {dim}")


def _check_groups(weight: Tensor, m: int, pruned: Tensor, dim: int) -> None:
    _check_weight(weight)
    _check_dim(weight, dim)
    _require(
        1 <= m <= MAX_GROUP and weight.shape[dim] % m == 0,
        f"m must be in [1, {MAX_GROUP}] and divide the size along dim, got {m}",
    )
    _check_values("pruned", pruned, torch.int64, 1, weight)


def _check_channels(weight: Tensor, dim: int, norms: Tensor, **scalars: Tensor) -> None:
    _check_scalars(weight, **scalars)
    _check_dim(weight, dim)
    _check_values("norms", norms, threshold_dtype([weight]), weight.shape[dim], weight)


def soft_mask(
    weight: Tensor,
    threshold: Tensor,
    tau: Tensor,
    relative: bool,
    out_dtype: torch.dtype | None,
    return_mask: bool,
) -> None:
    _check_scalars(weight, threshold=threshold, tau=tau)


def soft_mask_backward(
    grad_w_hat: Tensor | None,
    grad_mask: Tensor | None,
    weight: Tensor,
    threshold: Tensor,
    tau: Tensor,
    relative: bool,
) -> None:
    _check_scalars(weight, threshold=threshold, tau=tau)
    _check_like(weight, grad_w_hat=grad_w_hat, grad_mask=grad_mask)


def soft_mask_list(
    weights: Sequence[Tensor],
    thresholds: Tensor,
    taus: Tensor,
    relative: bool,
    out_dtype: torch.dtype | None,
) -> None:
    _check_list(weights, thresholds=thresholds, taus=taus)


def soft_mask_list_backward(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    thresholds: Tensor,
    taus: Tensor,
    relative: bool,
) -> None:
    _check_list(weights, thresholds=thresholds, taus=taus)
    _require(
        len(grads) == len(weights), f"grads must have {len(weights)} elements, got {len(grads)}"
    )
    for grad, weight in zip(grads, weights, strict=True):
        _check_like(weight, grads=grad)


def soft_mask_nm(
    weight: Tensor,
    tau: Tensor,
    m: int,
    pruned: Tensor,
    dim: int,
    relative: bool,
    out_dtype: torch.dtype | None,
    return_mask: bool,
) -> None:
    _check_scalars(weight, tau=tau)
    _check_groups(weight, m, pruned, dim)


def soft_mask_nm_backward(
    grad_w_hat: Tensor | None,
    grad_mask: Tensor | None,
    weight: Tensor,
    tau: Tensor,
    m: int,
    pruned: Tensor,
    dim: int,
    relative: bool,
) -> None:
    _check_scalars(weight, tau=tau)
    _check_groups(weight, m, pruned, dim)
    _check_like(weight, grad_w_hat=grad_w_hat, grad_mask=grad_mask)


def hard_mask_nm(weight: Tensor, m: int, pruned: Tensor, dim: int) -> None:
    _check_groups(weight, m, pruned, dim)


def compress_2to4(weight: Tensor) -> None:
    _require(
        weight.dtype in (torch.bfloat16, torch.float16),
        f"weight must have dtype torch.bfloat16 or torch.float16, got {weight.dtype}",
    )
    _require(
        weight.dim() == 2
        and weight.shape[0] % COMPRESSED_ROWS == 0
        and weight.shape[1] % COMPRESSED_COLUMNS == 0,
        f"weight must have shape (rows, cols), rows divisible by {COMPRESSED_ROWS} and cols by "
        f"{COMPRESSED_COLUMNS}, got {tuple(weight.shape)}",
    )


def channel_norms(weight: Tensor, dim: int, rms: bool) -> None:
    _check_weight(weight)
    _check_dim(weight, dim)


def soft_mask_channel(
    weight: Tensor,
    norms: Tensor,
    threshold: Tensor,
    tau: Tensor,
    dim: int,
    relative: bool,
    out_dtype: torch.dtype | None,
) -> None:
    _check_channels(weight, dim, norms, threshold=threshold, tau=tau)


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
) -> None:
    _check_channels(weight, dim, norms, threshold=threshold, tau=tau)
    _check_like(weight, grad_w_hat=grad_w_hat)
    if grad_mask is not None:
        _check_values("grad_mask", grad_mask, grad_mask.dtype, weight.shape[dim], weight)
