"""The soft mask: masked weight and analytic gradient."""

import torch
from torch import Tensor

from pdp_kernels.distributed.shards import map_shards
from pdp_kernels.functional.threshold import pdp_threshold
from pdp_kernels.functional.validation import (
    check_one_given,
    check_out_dtype,
    check_temperature,
    check_threshold,
    check_weight,
)
from pdp_kernels.ops.autograd import MaskedWeight
from pdp_kernels.ops.reference import threshold_dtype

PAPER_TAU = 1e-4  # that of arXiv 2305.11203


def pdp_mask(
    weight: Tensor,
    sparsity: float | Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    tau: float | Tensor | None = None,
    relative_tau: float | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The masked weight w_hat = m(w) w, with the analytic gradient of the paper.

    ::

        m(w)  = sigmoid((w^2 - t^2) / tau)                 (Eq. 1 of arXiv 2305.11203)
        dw    = g (m + 2 w^2 / tau  m (1 - m))             (Eq. 2; t is a constant)

    Computed in float32 (float64 for float64 weights) whatever the storage dtype; forward and
    backward are one pass over the weight each, and only the weight, t and tau are kept between.

    Shapes and dtypes:
        weight: any shape, 0-d and empty included; float64, float32, bfloat16 or float16. Dense
            layouts (channels_last too) are processed in place, others copied once. Of a DTensor
            (see `pdp_thresholds`) every rank masks its own part, and w_hat is placed alike.
        sparsity: the share to prune, a number in [0, 1] or a 0-d tensor; t is then found by
            `pdp_threshold` on every call.
        threshold: t, shape (), as `pdp_threshold` returns it (float64 for float64 weights, else
            float32, on the weight's device). t = -inf keeps all weights, +inf prunes all.
        tau: the temperature, in units of w^2: a positive number, or a 0-d floating point tensor
            on the weight's device, which is read on the device alone (unchecked), so that a
            schedule needs neither recompilation nor another graph capture. Default 1e-4, the
            paper's.
        relative_tau: c instead of tau: tau = c t^2, so that the mask depends on w / t alone and
            not on the scale of the layer. At t = 0 every w != 0 is kept. A number or 0-d tensor.
        out_dtype: the dtype of w_hat (and mask); the gradient comes back in the weight's dtype.
            Default: the autocast dtype under autocast (float64 weights excepted), else the
            weight's dtype.
        return_mask: also return m.

    Returns:
        w_hat, of the weight's shape and (for dense layouts) strides; with return_mask
        (w_hat, m), differentiable through both. It cannot be differentiated twice.

    A NaN or inf weight gives NaN at most at its own place, unless so many are not finite that
    the threshold itself is not: v_{k+1} = inf gives t = inf and v_{k+1} = NaN gives t = NaN.

    Raises:
        TypeError: a weight, threshold, ratio, temperature or out_dtype of the wrong type or dtype.
        ValueError: both or neither of sparsity and threshold; both tau and relative_tau; sparsity
            outside [0, 1] or NaN; a temperature not positive and finite; a threshold or a
            temperature of the wrong shape, on another device, or that requires a gradient.

    Example:
        >>> weight = torch.tensor([0.1, -0.2, 0.3, -0.4], requires_grad=True)
        >>> w_hat = pdp_mask(weight, 0.5)
        >>> w_hat.detach()
        tensor([ 0.0000, -0.0000,  0.3000, -0.4000])
        >>> w_hat.sum().backward()
    """
    check_weight("weight", weight)
    check_out_dtype(out_dtype)
    check_one_given(sparsity, threshold)
    dtype = threshold_dtype([weight])
    temperature, relative = temperature_of(weight, tau, relative_tau)
    if threshold is None:
        threshold = pdp_threshold(weight, sparsity)
    else:
        check_threshold(threshold, dtype, weight.device)
    if out_dtype is None:
        out_dtype = autocast_dtype(weight)
    w_hat, mask = map_shards(
        lambda part: MaskedWeight.apply(
            part, threshold, temperature, None, relative, out_dtype, return_mask
        ),
        weight,
    )
    return (w_hat, mask) if return_mask else w_hat


def temperature_of(
    weight: Tensor, tau: float | Tensor | None, relative_tau: float | Tensor | None
) -> tuple[Tensor, bool]:
    """The temperature as a checked 0-d tensor, and whether it is relative to t^2."""
    if tau is not None and relative_tau is not None:
        raise ValueError("at most one of tau and relative_tau must be given, got both")
    relative = relative_tau is not None
    name, value = ("relative_tau", relative_tau) if relative else ("tau", tau)
    if value is None:
        value = PAPER_TAU
    dtype = threshold_dtype([weight])
    check_temperature(name, value, dtype, weight.device)
    if isinstance(value, Tensor):
        return value.to(dtype), relative
    return torch.full((), value, dtype=dtype, device=weight.device), relative


def autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """The dtype w_hat gets under autocast, which leaves float64 alone; None outside of it."""
    device_type = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
