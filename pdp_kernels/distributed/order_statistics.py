"""Selection in weights whose parts are on several ranks, by counting digits.

Counts add up: those of all weights are summed over the ranks in one collective per digit, and
decide the next digit on every rank alike. So the result is that of the whole weight, bit for bit,
and a weight takes some kilobytes on the wire, however large it is.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pdp_kernels import ops  # noqa: F401
from pdp_kernels.distributed.shards import (
    ShardedList,
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

_KEY_DIGIT_BITS = 11


def thresholds(weights: Sequence[Tensor], prune_counts: Tensor) -> Tensor:
    """The operator `thresholds` of a list of weights any of which may be distributed.

    For the whole list one sum over the ranks per digit (3 for float32, 2 for 16 bits, 6 for
    float64) and one minimum. Never waits for the device.
    """
    sharded = [index for index, weight in enumerate(weights) if is_sharded(weight)]
    if not sharded:
        return torch.ops.pdp.thresholds(list(map(local_shard, weights)), prune_counts)
    whole = [index for index, weight in enumerate(weights) if not is_sharded(weight)]
    counts = prune_counts.unbind()
    dtype = threshold_dtype(weights)
    found = dict(zip(sharded, _select(weights, sharded, counts), strict=True))
    if whole:
        parts = [local_shard(weights[index]) for index in whole]
        ranks = torch.stack([counts[index] for index in whole])
        found |= zip(whole, torch.ops.pdp.thresholds(parts, ranks), strict=True)
    return torch.stack([found[index].to(dtype) for index in range(len(weights))])


def hard_mask_of_shard(weight: Tensor, prune_count: Tensor) -> Tensor:
    """The operator `hard_mask` of a weight that may be distributed: the part for this rank's part.

    Among weights tied at the boundary the last one pruned is found by a second selection, in their
    flat indices in the whole weight. Waits for the device where the weight is sharded.
    """
    local = local_shard(weight)
    if not is_sharded(weight):
        return torch.ops.pdp.hard_mask(local, prune_count)
    count = int(prune_count)
    if not 0 < count < weight.numel():
        return torch.full_like(local, count <= 0, dtype=torch.bool)
    sharded = ShardedList([weight])
    bits = 8 * weight.element_size() - 1
    part = sharded.shards[0]
    kth, pruned_ties = select_key({0: lambda: magnitude_keys(part)}, count, bits, sharded)
    keys = magnitude_keys(local).view(local.shape)
    kept, tied = keys > kth, keys == kth
    places = _flat_indices(weight, tied)
    counted = places if part.numel() else places[:0]
    ties = sharded.all_reduce({0: torch.tensor(len(counted), device=weight.device)})[0]
    if pruned_ties < ties:
        last, _ = select_key(
            {0: lambda: counted}, pruned_ties, weight.numel().bit_length(), sharded
        )
        kept[tied] = places > last
    return kept


def select_key(
    keys: Mapping[int, Callable[[], Tensor]], rank: int, bits: int, sharded: ShardedList
) -> tuple[int, int]:
    """The rank-th (from 1) of all keys of a list together, and its rank among those equal to it.

    keys: by position, functions that return non-negative integers below 2^bits for a weight's part,
    so that those of one weight at a time take up memory. Waits for the device.
    """
    prefix = 0
    while bits > 0:
        width = min(_KEY_DIGIT_BITS, bits)
        bits -= width
        counts = {
            index: _digit_histogram(key(), prefix, bits, width) for index, key in keys.items()
        }
        cumulative = sum(total.cpu() for total in sharded.all_reduce(counts).values()).cumsum(0)
        digit = int(torch.searchsorted(cumulative, rank))
        rank -= int(cumulative[digit - 1]) if digit else 0
        prefix = prefix << width | digit
    return prefix, rank


def _digit_histogram(keys: Tensor, prefix: int, shift: int, width: int) -> Tensor:
    """How often each digit, `width` bits above bit `shift`, follows the prefix."""
    digits = keys[keys >> (shift + width) == prefix] >> shift & ((1 << width) - 1)
    return torch.bincount(digits, minlength=1 << width)


def _flat_indices(weight: Tensor, chosen: Tensor) -> Tensor:
    """The indices in the whole weight, flattened, of chosen elements of this rank's part."""
    index = torch.zeros((), dtype=torch.int64, device=weight.device)
    for dim, places in enumerate(chosen.nonzero(as_tuple=True)):
        index = index * weight.shape[dim] + global_indices(weight, dim)[places]
    return index


def _select(
    weights: Sequence[Tensor], sharded: Sequence[int], prune_counts: Sequence[Tensor]
) -> list[Tensor]:
    """The thresholds of those weights that are sharded."""
    listed = ShardedList([weights[index] for index in sharded])
    members: dict[torch.dtype, list[int]] = {}
    for place, part in enumerate(listed.shards):
        members.setdefault(part.dtype, []).append(place)
    searches = [
        _Search(
            places,
            [listed.shards[place] for place in places],
            torch.stack([prune_counts[sharded[place]] for place in places]),
        )
        for places in members.values()
    ]
    while running := [search for search in searches if search.digits_left()]:
        counts = {place: count for search in running for place, count in search.count().items()}
        totals = listed.all_reduce(counts)
        for search in running:
            search.advance(totals)
    above = {place: key for search in searches for place, key in search.above.items()}
    least = listed.all_reduce(above, minimum=True)
    found = {place: t for search in searches for place, t in search.thresholds(least).items()}
    return [found[place] for place in range(len(sharded))]


class _Search:
    """The radix select in the parts of weights of one dtype, a digit at a time.

    places: where the weights are in the list. above: by place, the least key here above all that
    share the digits of v_k but for the last; known after the last digit.
    """

    def __init__(self, places: list[int], parts: list[Tensor], prune_counts: Tensor):
        self.places = places
        self.shards = parts
        self.prune_counts = prune_counts
        self.bits = DIGIT_BITS[parts[0].element_size()]
        self.digit = 0
        self.prefix = torch.zeros_like(prune_counts)
        self.rank = prune_counts - 1  # from 0, among the keys with the prefix
        self.above: dict[int, Tensor] = {}

    def digits_left(self) -> bool:
        return self.digit < len(self.bits)

    def count(self) -> dict[int, Tensor]:
        counts, above = torch.ops.pdp.digit_counts(self.shards, self.prefix, self.digit)
        self.above = dict(zip(self.places, above, strict=True))
        return dict(zip(self.places, counts, strict=True))

    def advance(self, totals: Mapping[int, Tensor]) -> None:
        """Takes the next digit of v_k; at the last one also that of v_{k+1}."""
        cumulative = torch.stack([totals[place] for place in self.places]).cumsum(1)
        if self.digit == 0:
            self.sizes = cumulative[:, -1]
        bins = cumulative.shape[1]
        digit, next_digit = (
            (cumulative <= rank.unsqueeze(1)).sum(1) for rank in (self.rank, self.rank + 1)
        )
        before = cumulative.gather(1, (digit - 1).clamp(0, bins - 1).unsqueeze(1)).squeeze(1)
        self.rank = self.rank - torch.where(digit > 0, before, 0)
        self.next_here = next_digit < bins
        self.next = self.prefix << self.bits[self.digit] | next_digit
        self.prefix = self.prefix << self.bits[self.digit] | digit.clamp(max=bins - 1)
        self.digit += 1

    def thresholds(self, above: Mapping[int, Tensor]) -> dict[int, Tensor]:
        dtype = self.shards[0].dtype
        above = torch.stack([above[place] for place in self.places])
        kth, following = (
            magnitudes_of_keys(keys, dtype).to(threshold_dtype(self.shards))
            for keys in (self.prefix, torch.where(self.next_here, self.next, above))
        )
        t = threshold_between(kth, following, self.prune_counts, self.sizes)
        return dict(zip(self.places, t, strict=True))
