"""Order statistics of sharded weights, by counting digits.

Counts add up: one collective per digit sums those of all weights over the ranks, and every rank
takes the same next digit. The result is that of the global weight, bit for bit. A weight puts some
kilobytes on the wire, however large it is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pdp_kernels import ops  # noqa: F401  (defines torch.ops.pdp)
from pdp_kernels.distributed.shards import (
    ShardedList,
    distributed_like,
    global_indices,
    is_sharded,
    local_shard,
)
from pdp_kernels.ops.reference import (
    DIGIT_BITS,
    magnitude_keys,
    magnitudes_of_keys,
    threshold_between,
    threshold_dtype,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Digits of the host's search in `select_key`, whose histograms travel once per digit.
_KEY_DIGIT_BITS = 11


def thresholds(weights: Sequence[Tensor], prune_counts: Tensor) -> Tensor:
    """Return the thresholds of a list of weights, any of which may be distributed, (L,).

    Takes one all-reduce per digit for the whole list (3 for float32, 2 for 16 bits, 6 for float64)
    and one minimum. Never waits for the device.
    """
    sharded = [index for index, weight in enumerate(weights) if is_sharded(weight)]
    local = [index for index, weight in enumerate(weights) if not is_sharded(weight)]
    counts = prune_counts.unbind()
    found: dict[int, Tensor] = {}
    if sharded:
        selected = _select(
            ShardedList([weights[index] for index in sharded]),
            [counts[index] for index in sharded],
        )
        found.update(zip(sharded, selected, strict=True))
    if local:
        tensors = [local_shard(weights[index]) for index in local]
        ranks = torch.stack([counts[index] for index in local])
        found.update(zip(local, torch.ops.pdp.thresholds(tensors, ranks), strict=True))
    dtype = threshold_dtype(weights)
    return torch.stack([found[index].to(dtype) for index in range(len(weights))])


def hard_mask(weight: "DTensor", prune_count: Tensor) -> "DTensor":
    """Return the hard mask of the global weight, distributed like the weight."""
    return distributed_like(weight, hard_mask_of_shard(weight, prune_count))


def hard_mask_of_shard(weight: Tensor, prune_count: Tensor) -> Tensor:
    """Return the local shard of the hard mask of a weight, bool.

    Weights tied at the boundary are pruned in the order of their flat indices in the global
    weight: a second selection, among those indices, finds the last one pruned. Waits for the
    device where the weight is sharded.
    """
    local = local_shard(weight)
    if not is_sharded(weight):
        return torch.ops.pdp.hard_mask(local, prune_count)
    count = int(prune_count)
    if not 0 < count < weight.numel():
        return torch.full_like(local, count <= 0, dtype=torch.bool)
    sharded = ShardedList([weight])
    shard = sharded.shards[0]
    bits = 8 * weight.element_size() - 1
    kth, pruned_ties = select_key({0: lambda: magnitude_keys(shard)}, count, bits, sharded)
    keys = magnitude_keys(local).view(local.shape)
    kept, tied = keys > kth, keys == kth
    indices = _flat_indices(weight, tied)
    counted = indices if shard.numel() else indices[:0]
    ties = sharded.all_reduce({0: torch.tensor(len(counted), device=weight.device)})[0]
    if pruned_ties < ties:
        last, _ = select_key(
            {0: lambda: counted}, pruned_ties, weight.numel().bit_length(), sharded
        )
        kept[tied] = indices > last
    return kept


def select_key(
    keys: Mapping[int, Callable[[], Tensor]], rank: int, bits: int, sharded: ShardedList
) -> tuple[int, int]:
    """Select one key among those of all weights of a list together. Waits for the device.

    Args:
        keys: for each position in the list, a function that returns the keys of its shard: integers
            in [0, 2^bits). It is called once per digit, so that the keys of one weight at a time
            take up memory.
        rank: from 1, in ascending order.
        bits: of a key.
        sharded: the list.

    Returns:
        The key of that rank, and its rank (from 1) among the keys equal to it.
    """
    prefix = 0
    while bits > 0:
        width = min(_KEY_DIGIT_BITS, bits)
        bits -= width
        counts = {
            index: _digit_histogram(key(), prefix, bits, width) for index, key in keys.items()
        }
        totals = [total.cpu() for total in sharded.all_reduce(counts).values()]
        cumulative = torch.stack(totals).sum(0).cumsum(0)
        digit = int(torch.searchsorted(cumulative, rank))
        rank -= int(cumulative[digit - 1]) if digit else 0
        prefix = prefix << width | digit
    return prefix, rank


def _digit_histogram(keys: Tensor, prefix: int, shift: int, width: int) -> Tensor:
    """Count each digit, `width` bits above bit `shift`, among the keys that have the prefix."""
    digits = keys[keys >> (shift + width) == prefix] >> shift & ((1 << width) - 1)
    return torch.bincount(digits, minlength=1 << width)


def _flat_indices(weight: "DTensor", chosen: Tensor) -> Tensor:
    """Return the flat indices in the global weight of the chosen elements of the local shard."""
    flat = torch.zeros((), dtype=torch.int64, device=weight.device)
    for dim, local_indices in enumerate(chosen.nonzero(as_tuple=True)):
        flat = flat * weight.shape[dim] + global_indices(weight, dim)[local_indices]
    return flat


def _select(sharded: ShardedList, prune_counts: Sequence[Tensor]) -> list[Tensor]:
    """Return the threshold of each weight of a list."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for index, shard in enumerate(sharded.shards):
        by_dtype.setdefault(shard.dtype, []).append(index)
    searches = [
        _Search(
            indices,
            [sharded.shards[index] for index in indices],
            torch.stack([prune_counts[index] for index in indices]),
        )
        for indices in by_dtype.values()
    ]
    while running := [search for search in searches if search.digits_left()]:
        counts = {index: count for search in running for index, count in search.count().items()}
        totals = sharded.all_reduce(counts)
        for search in running:
            search.advance(totals)
    above = {index: key for search in searches for index, key in search.above.items()}
    least = sharded.all_reduce(above, minimum=True)
    found = {index: t for search in searches for index, t in search.thresholds(least).items()}
    return [found[index] for index in range(len(prune_counts))]


class _Search:
    """The radix select in the shards of weights of one dtype, one digit at a time.

    Attributes:
        indices: the positions of the weights in the list.
        above: for each position, the least local key above all keys that share the digits of v_k
            but for the last one. Known after the last digit.
    """

    def __init__(self, indices: list[int], shards: list[Tensor], prune_counts: Tensor) -> None:
        self.indices = indices
        self.shards = shards
        self.prune_counts = prune_counts
        self.bits = DIGIT_BITS[shards[0].element_size()]
        self.digit = 0
        self.prefix = torch.zeros_like(prune_counts)
        self.rank = prune_counts - 1  # from 0, among the keys with the prefix
        self.sizes = torch.zeros_like(prune_counts)  # of the global weights, after the first digit
        self.above: dict[int, Tensor] = {}

    def digits_left(self) -> bool:
        return self.digit < len(self.bits)

    def count(self) -> dict[int, Tensor]:
        """Return the local histogram of the next digit for each position."""
        counts, above = torch.ops.pdp.digit_counts(self.shards, self.prefix, self.digit)
        self.above = dict(zip(self.indices, above, strict=True))
        return dict(zip(self.indices, counts, strict=True))

    def advance(self, totals: Mapping[int, Tensor]) -> None:
        """Take the next digit of v_k from the global histograms; the last one of v_{k+1} too."""
        cumulative = torch.stack([totals[index] for index in self.indices]).cumsum(1)
        if self.digit == 0:
            self.sizes = cumulative[:, -1]
        bins = cumulative.shape[1]
        digit, next_digit = (
            (cumulative <= rank.unsqueeze(1)).sum(1) for rank in (self.rank, self.rank + 1)
        )
        before = cumulative.gather(1, (digit - 1).clamp(0, bins - 1).unsqueeze(1)).squeeze(1)
        self.rank = self.rank - torch.where(digit > 0, before, 0)
        # Where v_{k+1} has the prefix of v_k it is in the histogram, else it is the least above.
        self.next_has_prefix = next_digit < bins
        self.next = self.prefix << self.bits[self.digit] | next_digit
        self.prefix = self.prefix << self.bits[self.digit] | digit.clamp(max=bins - 1)
        self.digit += 1

    def thresholds(self, above: Mapping[int, Tensor]) -> dict[int, Tensor]:
        dtype = self.shards[0].dtype
        least_above = torch.stack([above[index] for index in self.indices])
        kth, following = (
            magnitudes_of_keys(keys, dtype).to(threshold_dtype(self.shards))
            for keys in (self.prefix, torch.where(self.next_has_prefix, self.next, least_above))
        )
        t = threshold_between(kth, following, self.prune_counts, self.sizes)
        return dict(zip(self.indices, t, strict=True))
