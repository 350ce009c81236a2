"""Soft masks of a list of weights by the kernels of soft_mask, one launch for each weight.

These serve a GPU where the CUDA module, which takes one launch for the list, is not there.
"""

from collections.abc import Sequence

import torch
from pdp_kernels.triton_kernels.soft_mask import soft_mask, soft_mask_backward
from torch import Tensor


def soft_mask_list(
    weights: Sequence[Tensor],
    thresholds: Tensor,
    taus: Tensor,
    relative: bool,
    out_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Implement pdp::soft_mask_list; arguments as reference.soft_mask_list."""
    layers = zip(weights, thresholds.unbind(), taus.unbind(), strict=True)
    return [soft_mask(*layer, relative, out_dtype, False)[0] for layer in layers]


def soft_mask_list_backward(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    thresholds: Tensor,
    taus: Tensor,
    relative: bool,
) -> list[Tensor]:
    """Implement pdp::soft_mask_list_backward; arguments as reference.soft_mask_list_backward."""
    layers = zip(grads, weights, thresholds.unbind(), taus.unbind(), strict=True)
    return [
        weight.new_empty(0)
        if grad is None
        else soft_mask_backward(grad, None, weight, threshold, tau, relative)
        for grad, weight, threshold, tau in layers
    ]
