"""PDP in plain PyTorch: the baseline of pdp_kernels.

Arithmetic is float32 (float64 for float64 weights) for every storage dtype: in bfloat16 the mask
would exceed its tolerance.
"""

import torch
import torch._dynamo.config
import torch._inductor.config
from torch import Tensor

from benchmarks.batches import prune_count
from benchmarks.masks import Mask


def topk_threshold(weight: Tensor, sparsity: float) -> Tensor:
    """Return the midpoint of the top n - k and the bottom k, as in Algorithm 1, lines 14-16."""
    magnitude = weight.detach().abs().flatten()
    n, k = magnitude.numel(), prune_count(magnitude.numel(), sparsity)
    kept = torch.topk(magnitude, n - k, sorted=False).values.min()
    pruned = torch.topk(magnitude, k, largest=False, sorted=False).values.max()
    return _midpoint(pruned, kept)


def one_topk_threshold(weight: Tensor, sparsity: float) -> Tensor:
    """Return the threshold by one topk call on the shorter side, whose last two values count."""
    magnitude = weight.detach().abs().flatten()
    n, k = magnitude.numel(), prune_count(magnitude.numel(), sparsity)
    kept_is_shorter = n - k < k
    count = min(n - k, k) + 1
    values = torch.topk(magnitude, count, largest=kept_is_shorter).values
    return _midpoint(values[-2], values[-1])


def kthvalue_threshold(weight: Tensor, sparsity: float) -> Tensor:
    """Return the threshold by two kthvalue calls: O(n) each, in one block of a GPU."""
    magnitude = weight.detach().abs().flatten()
    k = prune_count(magnitude.numel(), sparsity)
    return _midpoint(magnitude.kthvalue(k).values, magnitude.kthvalue(k + 1).values)


def sort_threshold(weight: Tensor, sparsity: float) -> Tensor:
    """Return the threshold from two elements of a full sort."""
    magnitude = weight.detach().abs().flatten()
    k = prune_count(magnitude.numel(), sparsity)
    values = magnitude.sort().values
    return _midpoint(values[k - 1], values[k])


def soft_mask(weight: Tensor, threshold: Tensor, mask: Mask) -> Tensor:
    """Return the masked weight, Eq. 1; autograd derives the backward."""
    return masked_weight(weight, threshold, mask.tau, mask.relative, mask.out_dtype)


def masked_weight(
    weight: Tensor,
    threshold: Tensor,
    tau: float | Tensor,
    relative: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return the masked weight, Eq. 1, from arguments that torch.compile understands.

    Args:
        weight: Any shape.
        threshold: Broadcasts with the weight.
        tau: Temperature.
        relative: Whether tau is in units of the squared threshold.
        out_dtype: Dtype of the result.
    """
    w = weight if weight.dtype == torch.float64 else weight.float()
    if relative:
        tau = tau * threshold * threshold
    mask = torch.sigmoid((w * w - threshold * threshold) / tau)
    return (mask * w).to(out_dtype)


# Worker processes of the compiler would still be starting while the first rows are timed.
torch._inductor.config.compile_threads = 1

# Kernels have their number of threads built in. The compiler's cache on disk returns those of
# another number, unless the configuration says the number.
torch._inductor.config.cpp.threads = torch.get_num_threads()

# Beyond the limit functions would run uncompiled. One graph for each mask and dtype is intended.
torch._dynamo.config.recompile_limit = 32
torch._dynamo.config.fail_on_recompile_limit_hit = True

# One kernel for all sizes: a static one would be compiled for each layer shape.
_compiled = torch.compile(masked_weight, dynamic=True)
_autotuned = torch.compile(masked_weight, dynamic=True, mode="max-autotune-no-cudagraphs")


def compiled_soft_mask(weight: Tensor, threshold: Tensor, mask: Mask) -> Tensor:
    """Return the same through torch.compile."""
    flat = _compiled(weight.flatten(), threshold, mask.tau, mask.relative, mask.out_dtype)
    return flat.view_as(weight)


def autotuned_soft_mask(weight: Tensor, threshold: Tensor, mask: Mask) -> Tensor:
    """Return the same through torch.compile in max-autotune mode, without CUDA graphs."""
    flat = _autotuned(weight.flatten(), threshold, mask.tau, mask.relative, mask.out_dtype)
    return flat.view_as(weight)


def _midpoint(low: Tensor, high: Tensor) -> Tensor:
    return (low.float() + high.float()) / 2
