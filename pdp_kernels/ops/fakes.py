"""The fake of every operator: empty results of the right shape, dtype, strides and device."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pdp_kernels.ops.reference import DIGIT_BITS, threshold_dtype


def on_one_device(fake: Callable[..., Any]) -> Callable[..., Any]:
    """Return a fake that refuses tensors on several devices, as kernels do.

    One tensor on the meta device is enough for the dispatcher to call a fake. For a weight that is
    elsewhere the empty results would be taken for real ones.
    """
    names = list(inspect.signature(fake).parameters)

    @functools.wraps(fake)
    def checked(*args: Any) -> Any:
        tensors = list(_tensors(zip(names, args, strict=True)))
        first, device = tensors[0][0], tensors[0][1].device
        for name, tensor in tensors:
            if tensor.device != device:
                raise ValueError(
                    f"{name} must be on the device of {first}, {device}, got {tensor.device}"
                )
        return fake(*args)

    return checked


def _tensors(arguments: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments:
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, Tensor):
                yield name, each


def prune_counts(weights: Sequence[Tensor], sparsities: Sequence[float]) -> Tensor:
    return weights[0].new_empty(len(weights), dtype=torch.int64)


def thresholds(weights: Sequence[Tensor], prune_counts: Tensor) -> Tensor:
    return weights[0].new_empty(len(weights), dtype=threshold_dtype(weights))


def digit_counts(weights: Sequence[Tensor], prefixes: Tensor, digit: int) -> tuple[Tensor, Tensor]:
    bins = 1 << DIGIT_BITS[weights[0].element_size()][digit]
    return prefixes.new_empty(len(weights), bins), torch.empty_like(prefixes)


def hard_mask(weight: Tensor, prune_count: Tensor) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.bool)


def soft_mask(
    weight: Tensor,
    threshold: Tensor,
    tau: Tensor,
    relative: bool,
    out_dtype: torch.dtype | None,
    return_mask: bool,
) -> tuple[Tensor, Tensor]:
    w_hat = torch.empty_like(weight, dtype=out_dtype)
    return w_hat, torch.empty_like(w_hat) if return_mask else w_hat.new_empty(0)


def soft_mask_backward(
    grad_w_hat: Tensor | None,
    grad_mask: Tensor | None,
    weight: Tensor,
    threshold: Tensor,
    tau: Tensor,
    relative: bool,
) -> Tensor:
    return torch.empty_like(weight)


def soft_mask_list(
    weights: Sequence[Tensor],
    thresholds: Tensor,
    taus: Tensor,
    relative: bool,
    out_dtype: torch.dtype | None,
) -> list[Tensor]:
    return [torch.empty_like(weight, dtype=out_dtype) for weight in weights]


def soft_mask_list_backward(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    thresholds: Tensor,
    taus: Tensor,
    relative: bool,
) -> list[Tensor]:
    return [
        weight.new_empty(0) if grad is None else torch.empty_like(weight)
        for grad, weight in zip(grads, weights, strict=True)
    ]


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
    return soft_mask(weight, tau, tau, relative, out_dtype, return_mask)


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
    return torch.empty_like(weight)


def hard_mask_nm(weight: Tensor, m: int, pruned: Tensor, dim: int) -> Tensor:
    return torch.empty_like(weight, dtype=torch.bool)


def compress_2to4(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    values = weight.new_empty(rows, cols // 2)
    return values, weight.new_empty(rows, cols // 16, dtype=torch.int16)


def channel_norms(weight: Tensor, dim: int, rms: bool) -> Tensor:
    return weight.new_empty(weight.shape[dim], dtype=threshold_dtype([weight]))


def soft_mask_channel(
    weight: Tensor,
    norms: Tensor,
    threshold: Tensor,
    tau: Tensor,
    dim: int,
    relative: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    w_hat = torch.empty_like(weight, dtype=out_dtype)
    return w_hat, w_hat.new_empty(weight.shape[dim])


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
    return torch.empty_like(weight)


def power_sums(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    p: float,
    q: float,
    per_row: bool,
) -> Tensor:
    groups = sum(weight.shape[0] for weight in weights) if per_row else len(weights)
    return weights[0].new_empty(groups, 3, dtype=torch.float64)
