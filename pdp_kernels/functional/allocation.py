"""How many weights of each layer are pruned under one global budget."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pdp_kernels.distributed.order_statistics import select_key
from pdp_kernels.distributed.shards import ShardedList
from pdp_kernels.functional.validation import check_ratio, check_weights
from pdp_kernels.ops.reference import magnitude_keys, threshold_dtype


@torch.no_grad()
def global_prune_counts(
    weights: Sequence[Tensor], sparsity: float, *, max_layer_sparsity: float = 1.0
) -> list[int]:
    """Return how many weights of each layer fall under one threshold over all layers.

    With k = floor(r N + 1/2) for the N weights of all layers together (Algorithm 1, lines 8-9 of
    arXiv 2305.11203)::

        k_i = the number of weights of layer i among the k of least magnitude;  sum k_i = k

    exactly: of weights tied at the boundary those of earlier layers are pruned first. A layer whose
    k_i exceeds its cap floor(max_layer_sparsity n_i) is pruned up to its cap, and the rest of the
    budget is allocated again over the layers below theirs.

    The k-th magnitude is found digit by digit, by counting. The weights are never concatenated,
    nor gathered from the ranks that share one. This reads each weight a few times and waits for
    the device; it is meant to be called once.

    Args:
        weights: L tensors of any shapes and any mix of float64, float32, bfloat16 and float16, on
            any devices; DTensors as in `pdp_thresholds`.
        sparsity: r, the fraction of all weights to prune, in [0, 1].
        max_layer_sparsity: the largest fraction of any one layer to prune, in [0, 1].

    Returns:
        The k_i, a list of L ints.

    Raises:
        TypeError: as `pdp_thresholds`.
        ValueError: as `pdp_thresholds`; caps that leave less than k to prune.

    Example:
        >>> layers = [torch.tensor([1.0, -2.0, 3.0, -4.0]), torch.tensor([5.0, 6.0])]
        >>> global_prune_counts(layers, 0.5)
        [3, 0]
        >>> global_prune_counts(layers, 0.5, max_layer_sparsity=0.5)
        [2, 1]
    """
    check_weights("weights", weights, one_device=False)
    check_ratio("sparsity", sparsity)
    check_ratio("max_layer_sparsity", max_layer_sparsity)
    sizes = [weight.numel() for weight in weights]
    budget, caps = check_budget(sizes, sparsity, max_layer_sparsity)
    dtype = threshold_dtype(weights)
    counts: dict[int, int] = {}
    while len(counts) < len(sizes):
        free = [layer for layer in range(len(sizes)) if layer not in counts]
        left = budget - sum(counts.values())
        allocated = _counts_below([weights[layer] for layer in free], left, dtype)
        found = dict(zip(free, allocated, strict=True))
        capped = {layer: caps[layer] for layer, count in found.items() if count > caps[layer]}
        counts |= capped or found
    return [counts[layer] for layer in range(len(sizes))]


def check_budget(
    sizes: Sequence[int], sparsity: float, max_layer_sparsity: float
) -> tuple[int, list[int]]:
    """Return how many weights to prune in all, and at most in each layer."""
    budget = math.floor(sparsity * sum(sizes) + 0.5)
    caps = [math.floor(max_layer_sparsity * size) for size in sizes]
    if sum(caps) < budget:
        raise ValueError(
            f"max_layer_sparsity must leave {budget} to prune for sparsity = {sparsity}, "
            f"got {max_layer_sparsity}, which leaves {sum(caps)}"
        )
    return budget, caps


def _counts_below(weights: Sequence[Tensor], count: int, dtype: torch.dtype) -> list[int]:
    """Return how many of each weight are among the `count` of least magnitude of all together."""
    if count == 0:
        return [0] * len(weights)
    listed = ShardedList(weights)
    shards = dict(enumerate(listed.shards))
    keys = {index: functools.partial(_keys, shard, dtype) for index, shard in shards.items()}
    largest, left = select_key(keys, count, torch.finfo(dtype).bits - 1, listed)
    counted = listed.all_reduce(
        {index: _below_and_tied(shard, dtype, largest) for index, shard in shards.items()}
    )
    counts = []
    for index in shards:
        below, tied = counted[index].tolist()
        taken = min(tied, left)
        left -= taken
        counts.append(below + taken)
    return counts


def _keys(shard: Tensor, dtype: torch.dtype) -> Tensor:
    return magnitude_keys(shard.to(dtype))


def _below_and_tied(shard: Tensor, dtype: torch.dtype, key: int) -> Tensor:
    """Count the keys below a given one, and those equal to it, (2,)."""
    keys = _keys(shard, dtype)
    return torch.stack([(keys < key).sum(), (keys == key).sum()])
