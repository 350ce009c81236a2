"""The PQ Index of every weight: in PyTorch ops, ours, and a plain sum as the roof."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.batches import Batch
from benchmarks.oracle import CHUNK
from pdp_kernels import pq_index

P, Q = 0.5, 1.0

# Allowed error of an index, and of a sum relative to the sum of magnitudes. In bfloat16 eager
# rounds each root to 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}

Answer = dict[str, Sequence[Tensor]]


def eager_index(weight: Tensor) -> Tensor:
    """Return I = 1 - d^(1/q - 1/p) ||w||_p / ||w||_q, with sums in float32."""
    magnitude = weight.detach().abs()
    norm_p = magnitude.pow(P).sum(dtype=torch.float32) ** (1 / P)
    norm_q = magnitude.pow(Q).sum(dtype=torch.float32) ** (1 / Q)
    return 1 - weight.numel() ** (1 / Q - 1 / P) * norm_p / norm_q


def eager(batch: Batch) -> Callable[[], Answer]:
    """Provide the indices in PyTorch ops."""
    return lambda: {"index": [eager_index(weight) for weight in batch.weights]}


def ours(batch: Batch) -> Callable[[], Answer]:
    """Provide the indices by `pq_index`."""
    return lambda: {"index": pq_index(batch.weights, P, Q).unbind()}


def plain_sum(batch: Batch) -> Callable[[], Answer]:
    """Provide PyTorch's sums, which read the weights once."""
    weights = [weight.detach() for weight in batch.weights]
    return lambda: {"sum": [weight.sum(dtype=torch.float32) for weight in weights]}


PROVIDERS = {"eager": eager, "sum": plain_sum, "ours": ours}


def check(batch: Batch, answer: Answer) -> str | None:
    """Return what is wrong with the indices or sums against float64, or None."""
    ((kind, values),) = answer.items()
    for number, (weight, got) in enumerate(zip(batch.weights, values, strict=True)):
        total = magnitudes = roots = 0.0
        for chunk in weight.detach().flatten().split(CHUNK[weight.device.type]):
            w = chunk.double()
            total += w.sum().item()
            magnitudes += w.abs().sum().item()
            roots += w.abs().sqrt().sum().item()
        exact_index = 1 - roots**2 / magnitudes / weight.numel()
        want, scale = (total, magnitudes) if kind == "sum" else (exact_index, 1)
        if not abs(got.item() - want) <= TOLERANCE[weight.dtype] * scale:
            return f"{kind} of tensor {number} is {got.item():.9g}, not {want:.9g}"
    return None
