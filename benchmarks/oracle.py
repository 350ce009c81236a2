"""The oracle: float64 formulas that share no code with the package, and checks against them.

A check returns what is wrong with an answer, or None.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.batches import Batch

# Allowed error of the mask, and of dw/g relative to 1 + dw/g: float32 rounds z = (w^2 - t^2) / tau
# by about 2^-23 w^2 / tau, up to 1e-3 for weights near 1. Rounding a result to bfloat16 adds up to
# half a unit in its last place, 2^-8.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-3 + 2**-8}

# Elements compared at a time: on a CPU float64 temporaries stay in the cache and PyTorch uses one
# thread; on a GPU they fill it. Whole groups of 4 weights.
CHUNK = {"cpu": 2**15, "cuda": 2**24}

# (w, t, g, tau) in float64 -> (right answer, scale that the tolerance is relative to)
Formula = Callable[[Tensor, Tensor, Tensor, float | Tensor], tuple[Tensor, Tensor]]

# (w, t) in float64 -> the threshold of each weight, or one for all
Thresholds = Callable[[Tensor, Tensor], Tensor]


def layer_threshold(w: Tensor, t: Tensor) -> Tensor:
    """Return the threshold of the layer, t."""
    return t


def check_thresholds(batch: Batch, thresholds: Sequence[Tensor]) -> str | None:
    """Check that the thresholds are exact."""
    for index, (got, want) in enumerate(zip(thresholds, batch.thresholds, strict=True)):
        if got.item() != want.item():
            return f"threshold of tensor {index} is {got.item()!r}, not {want.item()!r}"
    return None


def check_forward(
    batch: Batch, masked: Sequence[Tensor], thresholds: Thresholds = layer_threshold
) -> str | None:
    """Check the masked weights."""
    return _compare("w_hat", batch, masked, batch.mask.out_dtype, _masked_weight, thresholds)


def check_backward(
    batch: Batch, gradients: Sequence[Tensor], thresholds: Thresholds = layer_threshold
) -> str | None:
    """Check the gradients with respect to the weights."""
    dtype = batch.weights[0].dtype
    return _compare("gradient", batch, gradients, dtype, _gradient, thresholds)


def check_forward_backward(
    batch: Batch,
    answer: tuple[Sequence[Tensor], Sequence[Tensor]],
    thresholds: Thresholds = layer_threshold,
) -> str | None:
    """Check masked weights and gradients.

    Args:
        batch: Weights, their thresholds and gradients of w_hat.
        answer: Masked weights and gradients, each in the shape of its weight.
        thresholds: Computes the thresholds from a chunk of weights and the layer's threshold.

    Returns:
        What is wrong, or None.
    """
    masked, gradients = answer
    wrong = check_forward(batch, masked, thresholds)
    return wrong or check_backward(batch, gradients, thresholds)


def check_copy(batch: Batch, copies: Sequence[Tensor]) -> str | None:
    """Check that the copies equal the weights."""
    same = all(map(torch.equal, batch.weights, copies))
    return None if same else "the copy differs from its source"


def check_sums(batch: Batch, sums: Sequence[Tensor]) -> str | None:
    """Check the sums of the weights up to rounding."""
    for weight, total in zip(batch.weights, sums, strict=True):
        exact = weight.detach().double()
        if not (total.double() - exact.sum()).abs() <= 1e-5 * exact.abs().sum():
            return f"the sum is {total.item():.6g} instead of {exact.sum().item():.6g}"
    return None


def _masked_weight(w: Tensor, t: Tensor, g: Tensor, tau: float | Tensor) -> tuple[Tensor, Tensor]:
    return torch.sigmoid((w * w - t * t) / tau) * w, w.abs()


def _gradient(w: Tensor, t: Tensor, g: Tensor, tau: float | Tensor) -> tuple[Tensor, Tensor]:
    m = torch.sigmoid((w * w - t * t) / tau)
    factor = m + 2 * w * w / tau * m * (1 - m)
    return g * factor, g.abs() * (1 + factor)


def _compare(
    name: str,
    batch: Batch,
    outputs: Sequence[Tensor],
    dtype: torch.dtype,
    formula: Formula,
    thresholds: Thresholds,
) -> str | None:
    """Compare the outputs with the formula, chunk by chunk."""
    tensors = zip(batch.weights, batch.thresholds, batch.grads, outputs, strict=True)
    for index, (weight, threshold, grad, output) in enumerate(tensors):
        if output.shape != weight.shape or output.dtype != dtype:
            return f"{name} of tensor {index} is {tuple(output.shape)} in {output.dtype}"
        chunk = CHUNK[weight.device.type]
        flat = (tensor.detach().flatten().split(chunk) for tensor in (weight, grad, output))
        for w, g, got in zip(*flat, strict=True):
            t = thresholds(w.double(), threshold.double())
            want, scale = formula(w.double(), t, g.double(), batch.mask.temperature(t))
            right = (got.double() - want).abs() <= TOLERANCE[dtype] * scale
            if not right.all():
                at = int(right.logical_not().int().argmax())
                return (
                    f"{name} of tensor {index} is {got[at].item():.6g}, not {want[at].item():.6g}, "
                    f"for w = {w[at].item():.6g}, t = {t.expand_as(w)[at].item():.6g}"
                )
    return None
