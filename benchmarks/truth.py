"""Each provider's answer held against float64 formulas that share no code with the package."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.batches import Batch

# Error allowed in the mask, and in dw/g relative to 1 + dw/g: z = (w^2 - t^2) / tau in float32 is
# rounded by about 2^-23 w^2 / tau, up to 1e-3 for weights near 1; and a result in bfloat16 is
# rounded once more, by up to half a unit in its last place, 2^-8 of it.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-3 + 2**-8}

# Elements compared at a time: float64 temporaries that stay in a CPU's cache and that PyTorch does
# not hand to other threads, or that fill a GPU.
CHUNK = {"cpu": 2**15, "cuda": 2**24}

# (w, t, g, tau) in float64 -> (right answer, the size that the tolerance is relative to)
Formula = Callable[[Tensor, Tensor, Tensor, float | Tensor], tuple[Tensor, Tensor]]


def check_thresholds(batch: Batch, thresholds: Sequence[Tensor]) -> str | None:
    """What is wrong with the thresholds, or None: they must be exact."""
    for index, (got, want) in enumerate(zip(thresholds, batch.thresholds, strict=True)):
        if got.item() != want.item():
            return f"threshold of tensor {index} is {got.item()!r}, not {want.item()!r}"
    return None


def check_forward(batch: Batch, masked: Sequence[Tensor]) -> str | None:
    """What is wrong with the masked weights, or None."""
    return _compare("w_hat", batch, masked, batch.mask.out_dtype, _masked_weight)


def check_backward(batch: Batch, gradients: Sequence[Tensor]) -> str | None:
    """What is wrong with the gradients with respect to the weights, or None."""
    return _compare("gradient", batch, gradients, batch.weights[0].dtype, _gradient)


def check_forward_backward(
    batch: Batch, outputs: tuple[Sequence[Tensor], Sequence[Tensor]]
) -> str | None:
    """What is wrong with the pair (masked weights, gradients), or None."""
    masked, gradients = outputs
    return check_forward(batch, masked) or check_backward(batch, gradients)


def check_copy(batch: Batch, copies: Sequence[Tensor]) -> str | None:
    """Whether the copies are copies."""
    same = all(map(torch.equal, batch.weights, copies))
    return None if same else "the copy differs from its source"


def check_sums(batch: Batch, sums: Sequence[Tensor]) -> str | None:
    """Whether the sums are right but for rounding."""
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
    name: str, batch: Batch, outputs: Sequence[Tensor], dtype: torch.dtype, formula: Formula
) -> str | None:
    tensors = zip(batch.weights, batch.thresholds, batch.grads, outputs, strict=True)
    for index, (weight, threshold, grad, output) in enumerate(tensors):
        if output.shape != weight.shape or output.dtype != dtype:
            return f"{name} of tensor {index} is {tuple(output.shape)} in {output.dtype}"
        t = threshold.double()
        tau = batch.mask.temperature(t)
        chunk = CHUNK[weight.device.type]
        flat = (tensor.detach().flatten().split(chunk) for tensor in (weight, grad, output))
        for w, g, got in zip(*flat, strict=True):
            want, size = formula(w.double(), t, g.double(), tau)
            right = (got.double() - want).abs() <= TOLERANCE[dtype] * size
            if not right.all():
                at = int(right.logical_not().int().argmax())
                return (
                    f"{name} of tensor {index} is {got[at].item():.6g}, not {want[at].item():.6g}, "
                    f"for w = {w[at].item():.6g}, t = {threshold.item():.6g}"
                )
    return None
