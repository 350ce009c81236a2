"""Batches: the weights of one input with exact thresholds and random gradients."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.layer_shapes import make_weights
from benchmarks.masks import Mask

# The smallest inputs rotate over this many batches: more than L2 holds, and quick to make.
MAX_BATCHES = 1024


@dataclass(frozen=True)
class Batch:
    """A list of weights with everything that a step needs."""

    weights: list[Tensor]
    thresholds: list[Tensor]
    """Exact threshold of each weight, shape (), as the package returns it."""
    grads: list[Tensor]
    """Random gradient of each masked weight, in its dtype."""
    sparsity: float
    mask: Mask

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(weight.numel() for weight in self.weights)

    def masked_by(self, name: str, out_dtype: torch.dtype) -> "Batch":
        """Return the same weights with another mask, and gradients in the dtype of w_hat."""
        mask = Mask.of(name, out_dtype, self.weights[0].device)
        return replace(self, mask=mask, grads=[grad.to(out_dtype) for grad in self.grads])

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on a device."""
        moved = replace(
            self,
            weights=[weight.detach().to(device).requires_grad_() for weight in self.weights],
            thresholds=[threshold.to(device) for threshold in self.thresholds],
            grads=[grad.to(device) for grad in self.grads],
        )
        return moved.masked_by(self.mask.name, self.mask.out_dtype)


def make_batches(
    name: str, dtype: torch.dtype, device: torch.device, sparsity: float, seed: int = 0
) -> list[Batch]:
    """Return so many batches of one input that their weights do not fit in the cache."""
    generator = torch.Generator(device).manual_seed(seed)
    first = make_batch(name, dtype, sparsity, generator)
    count = math.ceil(2 * cache_bytes(device) / (first.numel * dtype.itemsize))
    others = range(1, min(count, MAX_BATCHES))
    return [first, *(make_batch(name, dtype, sparsity, generator) for _ in others)]


def make_batch(name: str, dtype: torch.dtype, sparsity: float, generator: torch.Generator) -> Batch:
    """Return a batch on the generator's device, with a relative temperature."""
    weights = [weight.to(dtype, copy=True) for weight in make_weights(name, generator)]
    return batch_of(weights, sparsity, generator)


def make_tiny_batch(
    tensors: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Batch:
    """Return a batch of weights of one shape, half of them pruned, to time the host with."""
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.empty(shape).normal_(std=0.02, generator=generator).to(dtype) for _ in range(tensors)
    ]
    return batch_of(weights, 0.5, generator).to(device)


def batch_of(weights: list[Tensor], sparsity: float, generator: torch.Generator) -> Batch:
    """Return a batch of these weights, with a relative temperature and w_hat in their dtype."""
    return Batch(
        weights=[weight.requires_grad_() for weight in weights],
        thresholds=[exact_threshold(weight, sparsity) for weight in weights],
        grads=[
            torch.empty_like(weight, requires_grad=False).normal_(generator=generator)
            for weight in weights
        ],
        sparsity=sparsity,
        mask=Mask.of("relative", weights[0].dtype, generator.device),
    )


def prune_count(n: int, sparsity: float) -> int:
    """Return the number of pruned weights among n: floor(sparsity * n + 1/2)."""
    return math.floor(sparsity * n + 0.5)


def exact_threshold(weight: Tensor, sparsity: float) -> Tensor:
    """Return the midpoint of the k-th and k+1-th smallest magnitude, by NumPy's partial sort.

    On a GPU a full sort finds it, which saves the transfer of a billion weights to the host.

    Raises:
        ValueError: No weight is pruned, or all are.
    """
    n, k = weight.numel(), prune_count(weight.numel(), sparsity)
    if not 0 < k < n:
        raise ValueError(f"sparsity {sparsity} prunes {k} of {n} weights: nothing to select")
    magnitudes = weight.detach().flatten().float().abs()
    if weight.is_cuda:
        low, high = magnitudes.sort().values[k - 1 : k + 1].double().tolist()
    else:
        import numpy

        two = numpy.partition(magnitudes.numpy(), (k - 1, k))[k - 1 : k + 1]
        low, high = two.astype(numpy.float64)
    return torch.tensor((low + high) / 2, dtype=torch.float32, device=weight.device)


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last cache: L2 of a GPU, L3 of a CPU (64 MiB if unknown)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as file:
            return int(file.read().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 64 * 2**20
