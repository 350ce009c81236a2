"""The CPU kernels are right in every instruction set, of which a machine runs only its highest."""

import pytest
import torch

from pdp_kernels import pdp_threshold
from tests.support.compression import check_compression, every_group
from tests.support.host_builds import GATHERS
from tests.support.masks import (
    CHANNEL_SHAPES,
    LARGE_CHANNEL_SHAPES,
    check_hard_mask_nm,
    check_soft_mask,
    check_soft_mask_channel,
    check_soft_mask_nm,
    shape_of_groups,
)
from tests.support.selection import check_hard_mask, check_thresholds
from tests.support.weights import (
    DTYPES,
    HALVES,
    SIZES,
    denormals,
    weight_of,
    with_special_values,
)

INFINITY_KEY = 0x7F800000
NAN_KEY = INFINITY_KEY + 1


def special_floats(size):
    """Return NaN of many payloads, inf, zeros and denormals of both signs among normal numbers."""
    values = torch.cat([with_special_values(size, torch.float32), denormals(size, torch.float32)])
    values[::7] = -values[::7]
    values.view(torch.int32)[::11] |= INFINITY_KEY
    return values[torch.randperm(2 * size)[:size]]


@pytest.mark.parametrize("variant", GATHERS)
@pytest.mark.parametrize("make", [torch.randn, special_floats])
def test_every_gather_finds_the_same_keys_in_the_same_order(kernels, cpu_level, make, variant):
    if cpu_level < GATHERS[variant]:
        pytest.skip(f"this CPU lacks {variant}")
    storage = make(4096 + 16)
    everything, one_to_two = (0, NAN_KEY), (0x3F800000, 0x40000000)
    only_nan, only_zero, nothing = (NAN_KEY, NAN_KEY), (0, 0), (0x7F000001, 0x7F000001)
    for low, high in (everything, one_to_two, only_nan, only_zero, nothing):
        for count in (*range(34), 4096):
            for offset in (0, 1, 5, 15):
                data = storage[offset : offset + count]
                keys = (data.view(torch.int32) & 0x7FFFFFFF).clamp(max=NAN_KEY)
                gathered, below = kernels.gather(variant, data, low, high)
                assert torch.equal(gathered, keys[(keys >= low) & (keys <= high)])
                assert below == (keys < low).sum()


def every_pattern(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def random_patterns():
    """Return floats of random bits, and the NaNs that a truncation would turn into inf."""
    bits = torch.randint(-(2**31), 2**31, (1_000_003,)).to(torch.int32)
    bits[:4] = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1])
    return bits.view(torch.float32)


def around_ties(dtype, wide):
    """Return the middle of each two neighbouring 16-bit numbers, and the numbers next to it.

    Above the largest finite number its neighbour is the power of two that no longer fits.
    """
    ordered = every_pattern(dtype).double().abs().unique()
    finite = ordered[ordered.isfinite()]
    finite = torch.cat([finite, 2 * finite[-1:] - finite[-2:-1]])
    ties = ((finite[1:] + finite[:-1]) / 2).to(wide)
    beside = [ties.nextafter(torch.tensor(end, dtype=wide)) for end in (0, torch.inf)]
    positive = torch.cat([ties, *beside])
    return torch.cat([positive, -positive])


def assert_same_numbers(actual, expected):
    """Check bit for bit; any NaN equals any other."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.itemsize]
    assert torch.equal(actual.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(actual[number].view(bits), expected[number].view(bits))


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_widening_is_exact_for_every_bit_pattern(kernels, dtype, wide):
    values = every_pattern(dtype)
    assert_same_numbers(kernels.convert(values, wide), values.to(wide))


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrowing_rounds_to_nearest_even(kernels, dtype, wide):
    for values in (every_pattern(dtype).to(wide), around_ties(dtype, wide)):
        assert_same_numbers(kernels.convert(values, dtype), values.to(dtype))
    values = random_patterns().to(wide)
    assert_same_numbers(kernels.convert(values, dtype), values.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", ["normal", "few distinct", "inf and NaN"])
def test_selection_of_more_than_a_tile_is_exact(kernels, distribution, dtype):
    weight = weight_of(distribution, 70_001, dtype)
    for count in (1, 35_000, 69_300):
        check_thresholds(kernels, [weight], [count])
        check_hard_mask(kernels, weight, count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_list_of_several_sizes_is_exact(kernels, dtype):
    weights = [torch.randn(size).to(dtype) for size in SIZES]
    for fraction in (0.0, 0.5, 0.99):
        counts = [1 + int(fraction * (size - 2)) if size > 1 else 1 for size in SIZES]
        check_thresholds(kernels, weights, counts)


@pytest.mark.parametrize("relative", [False, True], ids=["tau", "relative_tau"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_masks_and_gradients_stay_within_budget(kernels, dtype, relative):
    for distribution in ("normal", "heavy-tailed", "few distinct", "signed zeros"):
        for size in (0, 1, 33, 9973):
            weight = weight_of(distribution, size, dtype)
            threshold = pdp_threshold(weight, 0.7).item()
            for tau in (1e-4, 0.3):
                check_soft_mask(kernels, weight, threshold, tau, relative)
    weight = denormals(997, dtype)
    check_soft_mask(kernels, weight, pdp_threshold(weight, 0.5).item(), 0.3, relative)
    largest = torch.finfo(dtype).max * torch.linspace(-1, 1, 997).to(dtype)
    check_soft_mask(kernels, largest, 1.0, 1e-4, relative)  # w^2 / tau overflows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_and_gradients_do_not_depend_on_the_place_in_the_weight(kernels, dtype):
    """Vectors and what remains at the end round alike."""
    weight, grad = torch.randn(2, 1033).to(dtype).unbind()
    constants = (torch.tensor(0.7), torch.tensor(0.1), False)
    if dtype == torch.float64:
        constants = (*(each.double() for each in constants[:2]), False)

    def results(begin):
        own_weight, own_grad = weight[begin:].clone(), grad[begin:].clone()
        return (
            *kernels.soft_mask(own_weight, *constants, dtype, True),
            kernels.soft_mask_backward(own_grad, None, own_weight, *constants),
        )

    whole = results(0)
    for begin in (1, 2, 7, 16, 1000, 1032):
        for part, result in zip(results(begin), whole, strict=True):
            assert_same_numbers(part, result[begin:])


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_masks_stay_within_budget_in_every_output_type(kernels, dtype, out_dtype):
    check_soft_mask(kernels, torch.randn(1033).to(dtype), 0.7, 0.1, False, out_dtype)


@pytest.mark.parametrize("relative", [False, True], ids=["tau", "relative_tau"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_are_masked_within_budget_and_hard_masks_are_exact(kernels, dtype, relative):
    for n, m in ((2, 4), (4, 8), (3, 5), (31, 32)):
        for dim in (0, 1):
            weight = torch.randn(shape_of_groups(m, dim)).to(dtype)
            check_soft_mask_nm(kernels, weight, m, m - n, dim, relative)
            check_hard_mask_nm(kernels, weight.round(), m, m - n, dim)


@pytest.mark.parametrize("relative", [False, True], ids=["tau", "relative_tau"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_are_masked_within_budget(kernels, dtype, relative):
    for shape, dim in [*CHANNEL_SHAPES, *LARGE_CHANNEL_SHAPES]:
        weight = torch.randn(shape).to(dtype)
        check_soft_mask_channel(kernels, weight, dim, relative, relative)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_compression_equals_torchs(kernels, dtype):
    check_compression(kernels.compress_2to4, every_group(dtype))
    check_compression(kernels.compress_2to4, torch.randn(96, 1088).to(dtype))
