"""PDP written in PyTorch alone: what pdp_kernels is measured against.

Arithmetic is float32 whatever the storage dtype; in bfloat16 the mask would miss its tolerance.
"""

import torch
import torch._dynamo.config
import torch._inductor.config
from torch import Tensor

from benchmarks.batches import prune_count
from benchmarks.masks import Mask


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
    """Two kthvalue calls: O(n) each, by one block of a GPU."""
    magnitude = weight.detach().abs().flatten()
    k = prune_count(magnitude.numel(), sparsity)
    return _midpoint(magnitude.kthvalue(k).values, magnitude.kthvalue(k + 1).values)


def sort_threshold(weight: Tensor, sparsity: float) -> Tensor:
    """A full sort, of which two elements are read."""
    magnitude = weight.detach().abs().flatten()
    k = prune_count(magnitude.numel(), sparsity)
    values = magnitude.sort().values
    return _midpoint(values[k - 1], values[k])


def soft_mask(weight: Tensor, threshold: Tensor, mask: Mask) -> Tensor:
    """The masked weight, Eq. 1; autograd derives its backward."""
    return _soft_mask(weight, threshold, mask.tau, mask.relative, mask.out_dtype)


def _soft_mask(
    weight: Tensor,
    threshold: Tensor,
    tau: float | Tensor,
    relative: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    w = weight.float()
    if relative:
        tau = tau * threshold * threshold
    mask = torch.sigmoid((w * w - threshold * threshold) / tau)
    return (mask * w).to(out_dtype)


# Worker processes of the compiler would go on starting up while the first rows are timed.
torch._inductor.config.compile_threads = 1

# Past the limit functions would run uncompiled: one graph for each mask and dtype is meant.
torch._dynamo.config.recompile_limit = 32
torch._dynamo.config.fail_on_recompile_limit_hit = True

# One kernel for all sizes: a static one would be compiled anew for each layer shape.
_compiled = torch.compile(_soft_mask, dynamic=True)
_autotuned = torch.compile(_soft_mask, dynamic=True, mode="max-autotune-no-cudagraphs")


def compiled_soft_mask(weight: Tensor, threshold: Tensor, mask: Mask) -> Tensor:
    """`soft_mask` and its backward through torch.compile."""
    flat = _compiled(weight.flatten(), threshold, mask.tau, mask.relative, mask.out_dtype)
    return flat.view_as(weight)


def autotuned_soft_mask(weight: Tensor, threshold: Tensor, mask: Mask) -> Tensor:
    """The same, compiled as torch.compile's max-autotune mode does it, without CUDA graphs."""
    flat = _autotuned(weight.flatten(), threshold, mask.tau, mask.relative, mask.out_dtype)
    return flat.view_as(weight)


def _midpoint(low: Tensor, high: Tensor) -> Tensor:
    return (low.float() + high.float()) / 2
