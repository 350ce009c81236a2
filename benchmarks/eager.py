"""PDP written in PyTorch alone: what pdp_kernels is measured against.

Arithmetic is float32 whatever the storage dtype; in bfloat16 the mask would miss its tolerance.
"""

import torch
import torch._inductor.config
from torch import Tensor

from benchmarks.batches import prune_count
from benchmarks.truth import TAU


def topk_threshold(weight: Tensor, sparsity: float) -> Tensor:
    """Algorithm 1, lines 14-16, as printed: between the top n - k and the bottom k."""
    magnitude = weight.detach().abs().flatten()
    n, k = magnitude.numel(), prune_count(magnitude.numel(), sparsity)
    kept = torch.topk(magnitude, n - k, sorted=False).values.min()
    pruned = torch.topk(magnitude, k, largest=False, sorted=False).values.max()
    return _midpoint(pruned, kept)


def one_topk_threshold(weight: Tensor, sparsity: float) -> Tensor:
    """One topk call on the shorter side: its last two values are the two order statistics."""
    magnitude = weight.detach().abs().flatten()
    n, k = magnitude.numel(), prune_count(magnitude.numel(), sparsity)
    kept_is_shorter = n - k < k
    count = min(n - k, k) + 1
    values = torch.topk(magnitude, count, largest=kept_is_shorter).values
    return _midpoint(values[-2], values[-1])


def kthvalue_threshold(weight: Tensor, sparsity: float) -> Tensor:
    """Two kthvalue calls: O(n) each."""
    magnitude = weight.detach().abs().flatten()
    k = prune_count(magnitude.numel(), sparsity)
    return _midpoint(magnitude.kthvalue(k).values, magnitude.kthvalue(k + 1).values)


def sort_threshold(weight: Tensor, sparsity: float) -> Tensor:
    """A full sort, of which two elements are read."""
    magnitude = weight.detach().abs().flatten()
    k = prune_count(magnitude.numel(), sparsity)
    values = magnitude.sort().values
    return _midpoint(values[k - 1], values[k])


def soft_mask(weight: Tensor, threshold: Tensor) -> Tensor:
    """The masked weight, Eq. 1; autograd derives its backward."""
    w = weight.float()
    mask = torch.sigmoid((w * w - threshold * threshold) / TAU)
    return (mask * w).to(weight.dtype)


# Worker processes of the compiler would go on starting up while the first rows are timed.
torch._inductor.config.compile_threads = 1

# One kernel for all sizes: a static one would be compiled anew for each layer shape.
_compiled = torch.compile(soft_mask, dynamic=True)
_autotuned = torch.compile(soft_mask, dynamic=True, mode="max-autotune-no-cudagraphs")


def compiled_soft_mask(weight: Tensor, threshold: Tensor) -> Tensor:
    """`soft_mask` and its backward through torch.compile."""
    return _compiled(weight.flatten(), threshold).view_as(weight)


def autotuned_soft_mask(weight: Tensor, threshold: Tensor) -> Tensor:
    """The same, compiled as torch.compile's max-autotune mode does it, without CUDA graphs."""
    return _autotuned(weight.flatten(), threshold).view_as(weight)


def _midpoint(low: Tensor, high: Tensor) -> Tensor:
    return (low.float() + high.float()) / 2
