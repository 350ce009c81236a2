"""How many weights of each layer are pruned under one global budget."""

import functools
import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from pdp_kernels.distributed.order_statistics import select_key
from pdp_kernels.distributed.replicas import check_same_on_all_ranks
from pdp_kernels.distributed.shards import ShardedList, is_sharded, local_shard
from pdp_kernels.functional.validation import check_fraction, check_one_of, check_weights
from pdp_kernels.ops.reference import magnitude_keys, threshold_dtype

Allocation = Literal["magnitude", "lamp", "erk", "uniform"]


@torch.no_grad()
def global_prune_counts(
    weights: Sequence[Tensor],
    sparsity: float,
    *,
    allocation: Allocation = "magnitude",
    max_layer_sparsity: float = 1.0,
) -> list[int]:
    """Return how many weights of each layer to prune, under one budget for all layers.

    With k = floor(r N + 1/2) for the N weights of all layers together, the k_i sum to k exactly:

    - "magnitude" (Algorithm 1, lines 8-9 of arXiv 2305.11203): k_i is the number of weights of
      layer i among the k of least magnitude. It compares layers of different scale.
    - "lamp" (Lee et al., ICLR 2021, arXiv 2010.07611): the same with the score of each weight u of
      a layer, w_u^2 / (sum of w_v^2 over the v at or after u in ascending order of magnitudes),
      in place of its magnitude. The largest weight of each layer has the score 1, so that no
      layer is emptied while another one has weights of lower score.
    - "erk" (Evci et al., ICML 2020, arXiv 1911.11134): layer i keeps the fraction
      min(1, e (sum of its dimensions) / (product of its dimensions)), with e such that the budget
      is met. The values of the weights do not matter.
    - "uniform": each layer keeps the same fraction.

    Weights (scores) tied at the boundary are pruned in the order of the layers. "erk" and "uniform"
    round to the layers of largest remainder, ties to earlier layers. A layer whose k_i exceeds its
    cap floor(max_layer_sparsity n_i) is pruned up to its cap, and the rest of the budget is
    allocated again over the layers below theirs.

    "magnitude" finds the k-th magnitude digit by digit, by counting. The weights are never
    concatenated, nor gathered from the ranks that share one. It reads each weight a few times and
    waits for the device; it is meant to be called once. "lamp" sorts each layer, and holds the
    scores of all layers, 8 bytes for each weight, on their devices until it returns.

    Args:
        weights: L tensors of any shapes and any mix of float64, float32, bfloat16 and float16, on
            any devices; DTensors as in `pdp_thresholds`, but not sharded ones for "lamp".
        sparsity: r, the fraction of all weights to prune, in [0, 1].
        allocation: how the layers share the budget.
        max_layer_sparsity: the largest fraction of any one layer to prune, in [0, 1].

    Returns:
        The k_i, a list of L ints.

    Raises:
        TypeError: as `pdp_thresholds`.
        ValueError: as `pdp_thresholds`; caps that leave less than k to prune; another allocation;
            a weight on the meta device for "magnitude" or "lamp"; a sharded weight, NaN or inf for
            "lamp"; weights that are not the same on all ranks that share a DTensor of the list.

    Examples:
        >>> layers = [torch.tensor([1.0, -2.0, 3.0, -4.0]), torch.tensor([5.0, 6.0])]
        >>> global_prune_counts(layers, 0.5)
        [3, 0]
        >>> global_prune_counts(layers, 0.5, max_layer_sparsity=0.5)
        [2, 1]
        >>> global_prune_counts(layers, 0.5, allocation="uniform")
        [2, 1]
    """
    check_weights("weights", weights, one_device=False)
    check_fraction("sparsity", sparsity)
    check_one_of("allocation", allocation, get_args(Allocation))
    check_fraction("max_layer_sparsity", max_layer_sparsity)
    meta = [index for index, weight in enumerate(weights) if weight.is_meta]
    if meta and allocation in ("magnitude", "lamp"):
        raise ValueError(
            f'weights must have values for allocation "{allocation}", got one on the meta device '
            f"for weights[{meta[0]}]"
        )
    return allocate(weights, weights, float(sparsity), allocation, float(max_layer_sparsity))


def allocate(
    values: Sequence[Tensor],
    weights: Sequence[Tensor],
    sparsity: float,
    allocation: Allocation,
    max_layer_sparsity: float,
) -> list[int]:
    """Return `global_prune_counts` for units with these values: weights, or norms of channels.

    Args:
        values: of the units of each layer; "magnitude" and "lamp" compare them.
        weights: of each layer; ranks that share one must hold the same list.
        sparsity: the fraction of all units to prune.
        allocation: how the layers share the budget.
        max_layer_sparsity: the largest fraction of any one layer to prune.
    """
    sizes = [each.numel() for each in values]
    budget, caps = check_budget(sizes, sparsity, max_layer_sparsity)
    if allocation == "uniform":
        return _in_proportion(sizes, [Fraction(1)] * len(sizes), budget, caps)
    if allocation == "erk":
        densities = [_erk_density(tuple(weight.shape)) for weight in weights]
        return _in_proportion(sizes, densities, budget, caps)
    check_same_on_all_ranks(weights)
    if allocation == "lamp":
        values = list(map(lamp_scores, values))
    return _least_values(values, sizes, budget, caps)


def _least_values(
    values: Sequence[Tensor], sizes: Sequence[int], budget: int, caps: Sequence[int]
) -> list[int]:
    """Return how many of each layer's values are among the `budget` least, within the caps."""
    dtype = threshold_dtype(values)
    counts: dict[int, int] = {}
    while len(counts) < len(sizes):
        free = [layer for layer in range(len(sizes)) if layer not in counts]
        left = budget - sum(counts.values())
        allocated = _counts_below([values[layer] for layer in free], left, dtype)
        found = dict(zip(free, allocated, strict=True))
        capped = {layer: caps[layer] for layer, count in found.items() if count > caps[layer]}
        counts |= capped or found
    return [counts[layer] for layer in range(len(sizes))]


def lamp_scores(weight: Tensor) -> Tensor:
    """Return the LAMP scores of a layer in ascending order, float64 (n,).

    float32 would make ties of scores that differ, and zeros of the least. A layer of zeros has
    scores of 0.
    """
    check_unsharded(weight)
    magnitudes = local_shard(weight).flatten().double().abs().sort().values
    if magnitudes.numel() and not magnitudes[-1].isfinite():
        raise ValueError('allocation "lamp" needs finite weights, got NaN or inf')
    squares = (magnitudes / magnitudes[-1:]).square()  # relative to the largest: no overflow
    larger = squares.flip(0).cumsum(0).flip(0)
    return (squares / larger).nan_to_num(0.0)


def check_unsharded(weight: Tensor) -> None:
    """Raise a ValueError for a weight whose LAMP scores no rank can compute alone."""
    if is_sharded(weight):
        raise ValueError(
            f'allocation "lamp" needs all magnitudes of a layer on one rank, got a weight of shape '
            f"{tuple(weight.shape)} that is sharded: use another allocation"
        )


def _erk_density(shape: tuple[int, ...]) -> Fraction:
    """Return what a layer's density is proportional to: sum over product of its dimensions."""
    if not shape or not math.prod(shape):
        return Fraction(1)
    return Fraction(sum(shape), math.prod(shape))


def _in_proportion(
    sizes: Sequence[int], densities: Sequence[Fraction], budget: int, caps: Sequence[int]
) -> list[int]:
    """Return prune counts such that layers keep fractions in proportion to densities.

    A layer keeps size * min(1, e * density), and no less than its cap leaves. e is such that the
    counts sum to the budget, in exact arithmetic.
    """
    least = [size - cap for size, cap in zip(sizes, caps, strict=True)]
    target = sum(sizes) - budget
    per_e = [size * density for size, density in zip(sizes, densities, strict=True)]

    def kept(e: Fraction) -> list[Fraction]:
        layers = zip(sizes, least, per_e, strict=True)
        return [max(Fraction(low), min(Fraction(high), e * slope)) for high, low, slope in layers]

    def kept_in_all(e: Fraction) -> Fraction:
        return sum(kept(e), Fraction(0))

    # Between two neighbouring borders the sum of what is kept is linear in e.
    borders = sorted(
        {Fraction(0)}
        | {Fraction(size) / slope for size, slope in zip(sizes, per_e, strict=True) if slope}
        | {Fraction(low) / slope for low, slope in zip(least, per_e, strict=True) if slope}
    )
    above = bisect_left(borders, Fraction(target), key=kept_in_all)
    e = borders[above]
    if above and kept_in_all(e) > target:
        low, high = kept_in_all(borders[above - 1]), kept_in_all(e)
        e = borders[above - 1] + (e - borders[above - 1]) * (target - low) / (high - low)
    pruned = [size - keep for size, keep in zip(sizes, kept(e), strict=True)]
    counts = [math.floor(each) for each in pruned]
    by_remainder = sorted(range(len(sizes)), key=lambda layer: counts[layer] - pruned[layer])
    for layer in by_remainder[: budget - sum(counts)]:
        counts[layer] += 1
    return counts


def largest_count(fraction: float, size: int) -> int:
    """Return floor(fraction * size), of a decimal fraction as it is written: 29 for 0.29 of 100."""
    return math.floor(fraction * size * (1 + 1e-12))


def check_budget(
    sizes: Sequence[int], sparsity: float, max_layer_sparsity: float
) -> tuple[int, list[int]]:
    """Return how many weights to prune in all, and at most in each layer."""
    budget = math.floor(sparsity * sum(sizes) + 0.5)
    caps = [largest_count(max_layer_sparsity, size) for size in sizes]
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
    return magnitude_keys(shard.to(dtype).resolve_neg())  # whose bits are read


def _below_and_tied(shard: Tensor, dtype: torch.dtype, key: int) -> Tensor:
    """Count the keys below a given one, and those equal to it, (2,)."""
    keys = _keys(shard, dtype)
    return torch.stack([(keys < key).sum(), (keys == key).sum()])
