"""The soft mask: masked weight and analytic gradient."""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

from pdp_kernels.distributed.shards import is_distributed, map_shards
from pdp_kernels.functional.threshold import threshold_of
from pdp_kernels.functional.validation import (
    check_one_given,
    check_out_dtype,
    check_temperature,
    check_threshold,
    check_weight,
)
from pdp_kernels.ops.autograd import mask_weight
from pdp_kernels.ops.reference import threshold_dtype

PAPER_TAU = 1e-4  # arXiv 2305.11203


@overload
def pdp_mask(
    weight: Tensor,
    sparsity: float | Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    tau: float | Tensor | None = None,
    relative_tau: float | Tensor | None = None,
    gradient_tau: float | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_mask: Literal[False] = False,
) -> Tensor: ...


@overload
def pdp_mask(
    weight: Tensor,
    sparsity: float | Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    tau: float | Tensor | None = None,
    relative_tau: float | Tensor | None = None,
    gradient_tau: float | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_mask: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def pdp_mask(
    weight: Tensor,
    sparsity: float | Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    tau: float | Tensor | None = None,
    relative_tau: float | Tensor | None = None,
    gradient_tau: float | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_mask: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def pdp_mask(
    weight: Tensor,
    sparsity: float | Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    tau: float | Tensor | None = None,
    relative_tau: float | Tensor | None = None,
    gradient_tau: float | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the masked weight w_hat = m(w) w, with the paper's analytic gradient.

    With the weight's threshold t, the temperature tau and the gradient g of w_hat:

        m(w)  = sigmoid((w^2 - t^2) / tau)                 (Eq. 1 of arXiv 2305.11203)
        dw    = g (m + 2 w^2 / tau  m (1 - m))             (Eq. 2; t is a constant)

    Computes in float32 (float64 for float64 weights), whatever the storage dtype. Forward and
    backward are one pass over the weight each. Only the weight, t and tau are saved for backward.

    Args:
        weight: any shape, 0-d and empty included; float64, float32, bfloat16 or float16. Dense
            layouts (channels_last too) are processed in place, others are copied once. For a
            DTensor (see `pdp_thresholds`) every rank masks its own shard.
        sparsity: the fraction to prune, a number in [0, 1] or a 0-d floating point tensor on the
            weight's device. `pdp_threshold` then finds t on every call.
        threshold: t, shape (), as `pdp_threshold` returns it: float64 for float64 weights, else
            float32, on the weight's device. t = -inf keeps all weights, +inf prunes all.
        tau: the temperature, in units of w^2: a positive number, or a 0-d floating point tensor on
            the weight's device. A tensor is read on the device alone (unchecked), so that a
            schedule needs neither recompilation nor another graph capture. Default 1e-4, as in
            the paper.
        relative_tau: c, instead of tau: tau = c t^2, so that the mask depends on w / t alone and
            not on the scale of the layer. At t = 0 every w != 0 is kept. A number or a 0-d tensor.
        gradient_tau: the temperature of Eq. 2, if the gradient is to be smoother than the mask;
            relative to t^2 if that is the mask's. A number or a 0-d tensor. Default the mask's.
        out_dtype: the dtype of w_hat (and of the mask). The gradient has the weight's dtype.
            Default: the autocast dtype under autocast (not for float64 weights), else the weight's.
        return_mask: also return m.

    Returns:
        w_hat, of the weight's shape and (for dense layouts) strides; a DTensor of the weight's
        placements for a DTensor. With return_mask (w_hat, m), differentiable through both. It
        cannot be differentiated twice.

        A NaN or inf weight gives NaN at most at its own position, unless so many weights are not
        finite that the threshold is not: v_{k+1} = inf gives t = inf, v_{k+1} = NaN gives t = NaN.

    Raises:
        TypeError: a weight, threshold, sparsity, temperature or out_dtype of the wrong type or
            dtype.
        ValueError: both or neither of sparsity and threshold; both tau and relative_tau; a sparsity
            outside [0, 1] or NaN; a temperature that is not positive and finite; a sparsity, a
            threshold or a temperature of the wrong shape, on another device, or that requires a
            gradient; a DTensor as in `pdp_thresholds`.

    Examples:
        >>> weight = torch.tensor([0.1, -0.2, 0.3, -0.4], requires_grad=True)
        >>> w_hat = pdp_mask(weight, 0.5)
        >>> w_hat.detach()
        tensor([ 0.0000, -0.0000,  0.3000, -0.4000])
        >>> w_hat.sum().backward()
    """
    check_weight("weight", weight)
    check_out_dtype(out_dtype)
    check_one_given(sparsity, threshold)
    temperature, relative = temperature_of(weight, tau, relative_tau)
    of_gradient = gradient_temperature_of(weight, gradient_tau, temperature)
    if sparsity is not None:
        threshold = threshold_of(weight, sparsity)
    else:
        check_threshold(threshold, temperature.dtype, weight.device)
    if out_dtype is None:
        out_dtype = autocast_dtype(weight)
    constants = (threshold, temperature, of_gradient, None, relative, out_dtype, return_mask)
    w_hat, mask = masked_weight(weight, constants)
    return (w_hat, mask) if return_mask else w_hat


def masked_weight(weight: Tensor, constants: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Return (w_hat, mask): `MaskedWeight` of a weight, or of each shard of a DTensor."""
    if is_distributed(weight):
        return map_shards(lambda shard: mask_weight(shard, *constants), weight)
    return mask_weight(weight, *constants)


def temperature_of(
    weight: Tensor, tau: float | Tensor | None, relative_tau: float | Tensor | None
) -> tuple[Tensor, bool]:
    """Return the temperature as a checked 0-d tensor, and whether it is relative to t^2."""
    if tau is not None and relative_tau is not None:
        raise ValueError("at most one of tau and relative_tau must be given, got both")
    relative = relative_tau is not None
    name, value = ("relative_tau", relative_tau) if relative else ("tau", tau)
    if value is None:
        value = PAPER_TAU
    return _as_temperature(name, value, weight), relative


def gradient_temperature_of(
    weight: Tensor, gradient_tau: float | Tensor | None, temperature: Tensor
) -> Tensor | None:
    """Return the temperature of the gradient as a checked 0-d tensor; None for the mask's."""
    if gradient_tau is None or gradient_tau is temperature:
        return None
    return _as_temperature("gradient_tau", gradient_tau, weight)


def _as_temperature(name: str, value: float | Tensor, weight: Tensor) -> Tensor:
    dtype = threshold_dtype((weight,))
    check_temperature(name, value, dtype, weight.device)
    if isinstance(value, Tensor):
        return value if value.dtype == dtype else value.to(dtype)
    return torch.full((), float(value), dtype=dtype, device=weight.device)


def autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """Return the dtype of w_hat under autocast, which leaves float64 alone; None outside of it."""
    if weight.is_cpu or weight.is_cuda:
        # device.type makes a string on each call, which takes longer than all the rest.
        device_type = "cpu" if weight.is_cpu else "cuda"
    else:
        device_type = weight.device.type
        if not is_autocast_available(device_type):
            return None
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
