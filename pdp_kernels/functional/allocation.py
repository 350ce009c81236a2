"""How much each layer loses under one global budget."""

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
    """How many weights of each layer fall under one threshold over all layers.

    With k = floor(r N + 1/2) of the N weights of all layers together (Algorithm 1, lines 8-9 of
    arXiv 2305.11203)::

        k_i = how many of layer i are among the k of least magnitude;  sum k_i = k

    exactly: of weights tied at the boundary those of the earlier layers are pruned first. Where a
    layer would lose more than its cap floor(max_layer_sparsity n_i), it loses its cap, and the
    rest of the budget is shared out again over the layers below theirs.

    The k-th magnitude is found digit by digit, by counting: the weights are never put together in
    one tensor, nor gathered from the ranks that share one. A few reads of each and a few values
    read back to the host: meant to be called once.

    Shapes and dtypes:
        weights: L tensors of any shapes and any mix of float64, float32, bfloat16 and float16, on
            any devices; DTensors as in `pdp_thresholds`.
        sparsity: r, in [0, 1].
        max_layer_sparsity: in [0, 1].

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
    counts = {}
    while len(counts) < len(sizes):
        free = [layer for layer in range(len(sizes)) if layer not in counts]
        left = budget - sum(counts.values())
        shares = _counts_below([weights[layer] for layer in free], left, dtype)
        found = dict(zip(free, shares, strict=True))
        capped = {layer: caps[layer] for layer, count in found.items() if count > caps[layer]}
        counts |= capped or found
    return [counts[layer] for layer in range(len(sizes))]


def check_budget(
    sizes: Sequence[int], sparsity: float, max_layer_sparsity: float
) -> tuple[int, list[int]]:
    """How many are to be pruned in all, and at most of each layer."""
    budget = math.floor(sparsity * sum(sizes) + 0.5)
    caps = [math.floor(max_layer_sparsity * size) for size in sizes]
    if sum(caps) < budget:
        raise ValueError(
            f"max_layer_sparsity must leave {budget} to prune for sparsity = {sparsity}, "
            f"got {max_layer_sparsity}, which leaves {sum(caps)}"
        )
    return budget, caps


def _counts_below(weights: Sequence[Tensor], count: int, dtype: torch.dtype) -> list[int]:
    """How many of each weight are among the `count` of least magnitude of all together."""
    if count == 0:
        return [0] * len(weights)
    sharded = ShardedList(weights)
    keys = {
        index: functools.partial(_keys, part, dtype) for index, part in enumerate(sharded.shards)
    }
    largest, left = select_key(keys, count, torch.finfo(dtype).bits - 1, sharded)
    counted = {
        index: _below_and_tied(part, dtype, largest) for index, part in enumerate(sharded.shards)
    }
    counted = sharded.all_reduce(counted)
    counts = []
    for index in range(len(weights)):
        below, tied = counted[index].tolist()
        taken = min(tied, left)
        left -= taken
        counts.append(below + taken)
    return counts


def _keys(part: Tensor, dtype: torch.dtype) -> Tensor:
    return magnitude_keys(part.to(dtype))


def _below_and_tied(part: Tensor, dtype: torch.dtype, key: int) -> Tensor:
    """How many keys are below a given one, and how many are equal to it."""
    keys = _keys(part, dtype)
    return torch.stack([(keys < key).sum(), (keys == key).sum()])
