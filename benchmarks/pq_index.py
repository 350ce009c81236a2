"""The PQ Index of every weight: in PyTorch ops, ours, and beside them a plain sum, the roof."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.batches import Batch
from benchmarks.oracle import CHUNK
from pdp_kernels import pq_index

P, Q = 0.5, 1.0

# Errors allowed in an index, and in a sum relative to that of magnitudes. bfloat16: eager rounds
# each root to 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}

Answer = dict[str, Sequence[Tensor]]


def eager_index(weight: Tensor) -> Tensor:
    """I = 1 - d^(1/q - 1/p) ||w||_p / ||w||_q, with its two sums in float32."""
    magnitude = weight.detach().abs()
    norm_p = magnitude.pow(P).sum(dtype=torch.float32) ** (1 / P)
    norm_q = magnitude.pow(Q).sum(dtype=torch.float32) ** (1 / Q)
    return 1 - weight.numel() ** (1 / Q - 1 / P) * norm_p / norm_q


def eager(batch: Batch) -> Callable[[], Answer]:
    return lambda: {"index": [eager_index(weight) for weight in batch.weights]}


def ours(batch: Batch) -> Callable[[], Answer]:
    return lambda: {"index": pq_index(batch.weights, P, Q).unbind()}


def plain_sum(batch: Batch) -> Callable[[], Answer]:
    """What reading the weights once costs in PyTorch."""
    weights = [weight.detach() for weight in batch.weights]
    return lambda: {"sum": [weight.sum(dtype=torch.float32) for weight in weights]}


PROVIDERS = {"eager": eager, "sum": plain_sum, "ours": ours}


def check(batch: Batch, answer: Answer) -> str | None:
    """Each index, or each sum, against float64."""
    ((kind, values),) = answer.items()
    for number, (weight, got) in enumerate(zip(batch.weights, values, strict=True)):
        total = size = roots = 0.0
        for part in weight.detach().flatten().split(CHUNK[weight.device.type]):
            w = part.double()
            total += w.sum().item()
            size += w.abs().sum().item()
            roots += w.abs().sqrt().sum().item()
        want, scale = (total, size) if kind == "sum" else (1 - roots**2 / size / weight.numel(), 1)
        if not abs(got.item() - want) <= TOLERANCE[weight.dtype] * scale:
            return f"{kind} of tensor {number} is {got.item():.9g}, not {want:.9g}"
    return None
