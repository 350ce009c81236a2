"""Channel pruning: whole channels are masked, by their norms."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from pdp_kernels.distributed import sums
from pdp_kernels.distributed.shards import is_distributed
from pdp_kernels.functional.hard_mask import hard_mask
from pdp_kernels.functional.soft_mask import (
    autocast_dtype,
    gradient_temperature_of,
    temperature_of,
)
from pdp_kernels.functional.threshold import threshold_of
from pdp_kernels.functional.validation import (
    NORMS,
    check_dim,
    check_one_given,
    check_one_of,
    check_out_dtype,
    check_plain_weight,
    check_threshold,
    check_weight,
)
from pdp_kernels.ops.autograd import mask_channels

Norm = Literal["l2", "rms"]


@overload
def pdp_mask_channel(
    weight: Tensor,
    sparsity: float | Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    dim: int = 0,
    tau: float | Tensor | None = None,
    relative_tau: float | Tensor | None = None,
    gradient_tau: float | Tensor | None = None,
    norm: Norm = "l2",
    out_dtype: torch.dtype | None = None,
    return_mask: Literal[False] = False,
) -> Tensor: ...


@overload
def pdp_mask_channel(
    weight: Tensor,
    sparsity: float | Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    dim: int = 0,
    tau: float | Tensor | None = None,
    relative_tau: float | Tensor | None = None,
    gradient_tau: float | Tensor | None = None,
    norm: Norm = "l2",
    out_dtype: torch.dtype | None = None,
    return_mask: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def pdp_mask_channel(
    weight: Tensor,
    sparsity: float | Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    dim: int = 0,
    tau: float | Tensor | None = None,
    relative_tau: float | Tensor | None = None,
    gradient_tau: float | Tensor | None = None,
    norm: Norm = "l2",
    out_dtype: torch.dtype | None = None,
    return_mask: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def pdp_mask_channel(
    weight: Tensor,
    sparsity: float | Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    dim: int = 0,
    tau: float | Tensor | None = None,
    relative_tau: float | Tensor | None = None,
    gradient_tau: float | Tensor | None = None,
    norm: Norm = "l2",
    out_dtype: torch.dtype | None = None,
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the weight with whole channels masked, with the analytic gradient through their norms.

    `pdp_mask` with the norm s_c of a channel W_c in place of |w| (arXiv 2305.11203, section 3.4):
    t is the midpoint between the k-th and k+1-th of the C norms, k = floor(r C + 1/2), and:

        m_c = sigmoid((s_c^2 - t^2) / tau)                                     (Eq. 1)
        w_hat_c = m_c W_c
        dW_c = m_c g_c + 2/tau m_c (1 - m_c) <g_c, W_c> W_c                    (Eq. 2)

    (the second term over the fan-in for norm="rms"). t is a constant. The weight is read once for
    the norms and once for w_hat; the backward reads gradient and weight at most twice. Only the
    weight, its C norms and two scalars are saved for backward.

    Where batch norm follows a layer, mask the inputs of the layer after it (dim=1): batch norm
    would scale a masked output up again.

    Args:
        weight: any shape with at least one dimension; float64, float32, bfloat16 or float16. Dense
            layouts are read in place for any dim, others are copied once. DTensors are refused.
        sparsity: the fraction of channels to prune, a number in [0, 1] or a 0-d floating point
            tensor on the weight's device.
        threshold: t, shape (), in units of the norm: `pdp_threshold(channel_norms(weight), r)`, or
            an element of `pdp_thresholds` of the norms of many layers.
        dim: the dimension of the channels: 0 for outputs, 1 for inputs of Linear and convolution
            layers.
        tau: the temperature, as in `pdp_mask`, in units of the norm squared.
        relative_tau: the relative temperature, as in `pdp_mask`.
        gradient_tau: the temperature of Eq. 2, as in `pdp_mask`.
        norm: "l2", or "rms", which is l2 / sqrt(fan-in), so that one tau suits layers of any size.
        out_dtype: the dtype of w_hat (and of the mask), as in `pdp_mask`.
        return_mask: also return m, (C,).

    Returns:
        w_hat, of the weight's shape and (for dense layouts) strides. With return_mask
        (w_hat, m), differentiable through both. It cannot be differentiated twice. A channel of
        zeros gets no gradient through its norm. A NaN makes its whole channel NaN. A channel with
        an inf is kept, unless t is inf too (then it is NaN); its gradient is NaN.

    Raises:
        TypeError: a weight, threshold, sparsity, temperature or out_dtype of the wrong type or
            dtype; a DTensor; dim no int.
        ValueError: as `pdp_mask`; no such dim; an unknown norm.

    Examples:
        >>> weight = torch.tensor([[3.0, 4.0], [0.3, 0.4], [6.0, 8.0]])
        >>> pdp_mask_channel(weight, 1 / 3)
        tensor([[3., 4.],
                [0., 0.],
                [6., 8.]])
    """
    check_plain_weight("weight", weight)
    check_dim("weight", weight, dim)
    check_one_of("norm", norm, NORMS)
    check_out_dtype(out_dtype)
    check_one_given(sparsity, threshold)
    temperature, relative = temperature_of(weight, tau, relative_tau)
    of_gradient = gradient_temperature_of(weight, gradient_tau, temperature)
    if sparsity is None:
        check_threshold(threshold, temperature.dtype, weight.device)
    dim, rms = dim % weight.dim(), norm == "rms"
    norms = torch.ops.pdp.channel_norms(weight.detach(), dim, rms)
    if sparsity is not None:
        threshold = threshold_of(norms, sparsity)
    if out_dtype is None:
        out_dtype = autocast_dtype(weight)
    w_hat, mask = mask_channels(
        weight, norms, threshold, temperature, of_gradient, dim, relative, rms, out_dtype
    )
    return (w_hat, mask) if return_mask else w_hat


def channel_norms(weight: Tensor, dim: int = 0, norm: Norm = "l2") -> Tensor:
    """Return the norm of every channel along dim, in one read of the weight.

    The norms take the place of |w| where channels are pruned (section 3.4 of arXiv 2305.11203):

        s_c = sqrt(sum of w^2 over channel c)             "l2"
        s_c = sqrt(sum of w^2 over channel c / fan-in)    "rms"

    Squares are summed in float64, so that those of float32 weights neither over- nor underflow: a
    norm is inf only from 3.4e38 on. Squares of float64 weights below 1e-154 or above 1e154 do.

    Args:
        weight: as in `pdp_mask_channel`; or a DTensor as in `pdp_thresholds`.
        dim: the dimension of the channels.
        norm: "l2" or "rms".

    Returns:
        The norms, shape (C,), float64 for float64 weights, else float32; constants for autograd.
        For a DTensor those of the global weight, on every rank: bit for bit, except where shards
        cut channels (along another dimension than dim), whose squares are summed in another order.

    Raises:
        TypeError: a weight of the wrong type or dtype; dim no int.
        ValueError: no such dim; an unknown norm; a DTensor as in `pdp_thresholds`.

    Examples:
        >>> channel_norms(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        tensor([5.0000, 0.5000])
    """
    check_weight("weight", weight)
    check_dim("weight", weight, dim)
    check_one_of("norm", norm, NORMS)
    return find_norms([weight.detach()], [dim % weight.dim()], norm == "rms")[0]


def find_norms(weights: Sequence[Tensor], dims: Sequence[int], rms: bool) -> list[Tensor]:
    """Return the channel norms of each weight, of the global one if it is sharded.

    Plain weights come detached.
    """
    if any(map(is_distributed, weights)):
        return sums.channel_norms(weights, dims, rms)
    return [
        torch.ops.pdp.channel_norms(weight, dim, rms)
        for weight, dim in zip(weights, dims, strict=True)
    ]


def hard_mask_channel(
    weight: Tensor, sparsity: float | Tensor, dim: int = 0, norm: Norm = "l2"
) -> Tensor:
    """Return the mask that prunes exactly the k = floor(r C + 1/2) channels of least norm.

    `hard_mask` of the `channel_norms` (section 3.4 of arXiv 2305.11203). Of equal norms the lowest
    index is pruned first; NaN counts as the largest norm. The masked weight is
    ``weight * mask.view(-1, 1, 1, 1)`` for a convolution's output channels.

    Args:
        weight: as in `channel_norms`.
        sparsity: the fraction r of channels to prune, a number in [0, 1] or a 0-d floating point
            tensor on the weight's device.
        dim: the dimension of the channels.
        norm: "l2" or "rms".

    Returns:
        A bool mask of shape (C,); True where the channel is kept.

    Raises:
        TypeError: as `channel_norms`; a sparsity that is no number.
        ValueError: as `channel_norms`; a sparsity outside [0, 1] or NaN.

    Examples:
        >>> hard_mask_channel(torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 5.0]]), 2 / 3)
        tensor([False, False,  True])
    """
    return hard_mask(channel_norms(weight, dim, norm), sparsity)
