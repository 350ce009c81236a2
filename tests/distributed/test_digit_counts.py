"""digit_counts: a pass of the radix select over parts of weights, which add up to the whole."""

import pytest
import torch

from pdp_kernels.ops import reference
from tests.support.cases import (
    DISTRIBUTIONS,
    DTYPES,
    SIZES,
    counts_of,
    denormals,
    weight_of,
    with_special_values,
)

HALVES = (torch.bfloat16, torch.float16)


def digits_of(weights):
    return reference.DIGIT_BITS[weights[0].element_size()]


def prefix_of(key, weights, digit):
    return key >> sum(digits_of(weights)[digit:])


def keys_at(weights, share):
    """The key of each weight below which that share of its keys is, 0 of an empty one."""
    ordered = [reference.magnitude_keys(weight).sort().values for weight in weights]
    return [int(keys[int(share * (len(keys) - 1))]) if len(keys) else 0 for keys in ordered]


def check(digit_counts, weights, keys=None):
    """Every digit's pass equals the reference's, with the prefixes of the keys."""
    on_cpu = [weight.cpu() for weight in weights]
    keys = keys_at(on_cpu, 0.9) if keys is None else keys
    for digit in range(len(digits_of(weights))):
        prefixes = torch.tensor([prefix_of(key, weights, digit) for key in keys])
        expected = reference.digit_counts(on_cpu, prefixes, digit)
        found = digit_counts(weights, prefixes.to(weights[0].device), digit)
        for actual, exact in zip(found, expected, strict=True):
            assert actual.dtype == torch.int64
            assert torch.equal(actual.cpu(), exact), f"digit {digit}"


def check_distribution(digit_counts, device, distribution, dtype):
    weight = weight_of(distribution, 9973, dtype).to(device)
    check(digit_counts, [weight, weight[:33]])


def check_special_values(digit_counts, device, make, dtype):
    weight = make(4097, dtype)
    (below, middle, largest) = (keys_at([weight], share)[0] for share in (0.0, 0.9, 1.0))
    check(digit_counts, [weight.to(device)] * 4, [below, middle, largest, largest + 1])


def check_sizes(digit_counts, device, dtype):
    sizes = (0, *SIZES[:-1], 0, 0, SIZES[-1], 0)
    check(digit_counts, [torch.randn(size).to(device, dtype) for size in sizes])


def check_mixed_halves(digit_counts, device):
    weights = [torch.randn(40_009).to(device, HALVES[i % 2]) for i in range(4)]
    check(digit_counts, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_counts_equal_the_reference(selection, distribution, dtype):
    check_distribution(selection.digit_counts, selection.device, distribution, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [denormals, with_special_values])
def test_counts_of_denormals_inf_and_nan(selection, make, dtype):
    check_special_values(selection.digit_counts, selection.device, make, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_next_key_may_be_far_above_the_prefix(selection, dtype):
    weight = torch.tensor([0.0, torch.inf, torch.nan], dtype=dtype, device=selection.device)
    check(selection.digit_counts, [weight, weight[::2]], [0, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_of_every_size(selection, dtype):
    check_sizes(selection.digit_counts, selection.device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_of_empty_weights_alone(selection, dtype):
    check(selection.digit_counts, [torch.empty(0, dtype=dtype, device=selection.device)] * 2)


def test_counts_of_a_list_of_both_half_precisions(selection):
    check_mixed_halves(selection.digit_counts, selection.device)


def test_counts_of_a_thousand_tensors_on_several_threads(selection, set_threads):
    set_threads(3)
    weights = [torch.randn(i % 70, device=selection.device) for i in range(1000)]
    check(selection.digit_counts, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_of_views(selection, dtype):
    storage = torch.randn(20_011).to(selection.device, dtype)
    matrix = storage[:20_000].view(100, 200)
    image = torch.randn(8, 6, 5, 5).to(selection.device, dtype)
    views = [storage[1:], storage[3:9000], storage[::2], matrix.t(), matrix[:, :77], storage[:0]]
    views += [image.to(memory_format=torch.channels_last), image[:, ::2], matrix[0].expand(50, -1)]
    check(selection.digit_counts, views)


def order_statistics(digit_counts, parts, k):
    """The keys of v_k and v_{k+1} of the parts together, from the sums of their counts."""
    bits = digits_of(parts)
    prefix, rank = 0, k - 1
    for digit, width in enumerate(bits):
        prefixes = torch.full((len(parts),), prefix, device=parts[0].device)
        counts, above = digit_counts(parts, prefixes, digit)
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
def test_counts_of_parts_select_the_order_statistics_of_the_whole(selection, distribution, dtype):
    weight = weight_of(distribution, 9973, dtype).to(selection.device)
    parts = [weight[:4001], weight[4001:4001], weight[4001:5000], weight[5000:]]
    ordered = weight.abs().sort().values.cpu()
    for k in counts_of(len(weight))[1:-1]:
        keys = torch.tensor(order_statistics(selection.digit_counts, parts, k))
        found = reference.magnitudes_of_keys(keys, dtype)
        assert torch.equal(found, ordered[k - 1 : k + 1]), k
