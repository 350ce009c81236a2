"""digit_counts, a pass of the radix select: the counts of shards add up to the global ones."""

import pytest
import torch

from pdp_kernels.ops import reference
from tests.support.selection import (
    check_digit_counts,
    check_digit_counts_of_both_halves,
    check_digit_counts_of_distribution,
    check_digit_counts_of_sizes,
    digits_of,
)
from tests.support.weights import DISTRIBUTIONS, DTYPES, counts_of, weight_of


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_counts_equal_the_reference(selection, distribution, dtype):
    check_digit_counts_of_distribution(selection, distribution, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_next_key_may_be_far_above_the_prefix(selection, dtype):
    weight = torch.tensor([0.0, torch.inf, torch.nan], dtype=dtype, device=selection.device)
    check_digit_counts(selection, [weight, weight[::2]], [0, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_of_every_size_equal_the_reference(selection, dtype):
    check_digit_counts_of_sizes(selection, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_of_empty_weights_equal_the_reference(selection, dtype):
    check_digit_counts(selection, [torch.empty(0, dtype=dtype, device=selection.device)] * 2)


def test_counts_of_both_half_precisions_equal_the_reference(selection):
    check_digit_counts_of_both_halves(selection)


def test_counts_of_a_thousand_tensors_on_several_threads_equal_the_reference(
    selection, set_threads
):
    set_threads(3)
    weights = [torch.randn(i % 70, device=selection.device) for i in range(1000)]
    check_digit_counts(selection, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_of_views_equal_the_reference(selection, dtype):
    storage = torch.randn(20_011).to(selection.device, dtype)
    matrix = storage[:20_000].view(100, 200)
    image = torch.randn(8, 6, 5, 5).to(selection.device, dtype)
    views = [storage[1:], storage[3:9000], storage[::2], matrix.t(), matrix[:, :77], storage[:0]]
    views += [image.to(memory_format=torch.channels_last), image[:, ::2], matrix[0].expand(50, -1)]
    check_digit_counts(selection, views)


def order_statistics(digit_counts, shards, k):
    """Return the keys of v_k and v_{k+1} of all shards, from the sums of their counts."""
    bits = digits_of(shards)
    prefix, rank = 0, k - 1
    for digit, width in enumerate(bits):
        prefixes = torch.full((len(shards),), prefix, device=shards[0].device)
        counts, above = digit_counts(shards, prefixes, digit)
        counts = counts.sum(0)
        up_to = counts.cumsum(0)
        value = int((up_to <= rank).sum())
        rank -= int(up_to[value] - counts[value])
        prefix = prefix << width | value
    if rank + 1 < counts[value]:
        return prefix, prefix
    larger = counts[value + 1 :].nonzero().flatten().tolist()
    return prefix, prefix + 1 + larger[0] if larger else int(above.min())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", ["normal", "few distinct", "one shared prefix"])
def test_counts_of_shards_select_the_order_statistics_of_the_global_weight(
    selection, distribution, dtype
):
    weight = weight_of(distribution, 9973, dtype).to(selection.device)
    shards = [weight[:4001], weight[4001:4001], weight[4001:5000], weight[5000:]]
    ordered = weight.abs().sort().values.cpu()
    for k in counts_of(len(weight))[1:-1]:
        keys = torch.tensor(order_statistics(selection.digit_counts, shards, k))
        found = reference.magnitudes_of_keys(keys, dtype)
        assert torch.equal(found, ordered[k - 1 : k + 1]), k
