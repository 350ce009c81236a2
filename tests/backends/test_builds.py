"""Selection and sums of every build equal the oracle's, whatever the weights."""

import pytest
import torch

from tests.support.selection import (
    check_digit_counts_of_both_halves,
    check_digit_counts_of_distribution,
    check_digit_counts_of_sizes,
    check_hard_mask,
    check_thresholds,
)
from tests.support.sums import (
    NORMS,
    check_sums,
    check_sums_at_the_ends_of_the_range,
    check_sums_of_every_size_and_mask,
    check_sums_of_rows,
)
from tests.support.weights import DISTRIBUTIONS, DTYPES, FINITE, counts_of, weight_of


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_thresholds_and_hard_masks_are_exact_for_every_distribution(build, distribution, dtype):
    for size, counts in ((33, counts_of(33)), (10_007, (5003, 9006))):
        weight = weight_of(distribution, size, dtype)
        for count in counts:
            check_thresholds(build, [weight], [count])
            check_hard_mask(build, weight, count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 2, 31, 4097, 8191, 99_991])
def test_thresholds_are_exact_for_every_size(build, size, dtype):
    weight = torch.randn(size).to(dtype)
    counts = (size // 2, size * 9 // 10) if size > 10_000 else counts_of(size)
    for count in counts:
        check_thresholds(build, [weight], [count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thresholds_are_exact_for_every_alignment(build, dtype):
    storage = torch.randn(9000).to(dtype)
    for offset in range(16 // dtype.itemsize + 1):
        check_thresholds(build, [storage[offset : offset + 8507]], [4000])
        for count in (1, 2):
            check_thresholds(build, [storage[offset : offset + 3]], [count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_digit_counts_are_exact_for_every_distribution(build, distribution, dtype):
    check_digit_counts_of_distribution(build, distribution, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digit_counts_are_exact_for_every_size(build, dtype):
    check_digit_counts_of_sizes(build, dtype)


def test_digit_counts_are_exact_for_both_half_precisions_in_a_list(build):
    check_digit_counts_of_both_halves(build)


@pytest.mark.parametrize("norms", NORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_power_sums_are_right_for_every_size_mask_and_norm(build, dtype, norms):
    check_sums_of_every_size_and_mask(build.power_sums, dtype, norms)


@pytest.mark.parametrize("norms", NORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_power_sums_are_right_for_inf_nan_and_the_ends_of_the_range(build, dtype, norms):
    check_sums_at_the_ends_of_the_range(build.power_sums, dtype, norms)


@pytest.mark.parametrize("distribution", FINITE)
def test_power_sums_are_right_for_every_distribution(build, distribution):
    for dtype in DTYPES:
        check_sums(build.power_sums, [weight_of(distribution, 5003, dtype)], [None], 0.5, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_power_sums_of_rows_are_right(build, dtype):
    check_sums_of_rows(build.power_sums, dtype)


def test_power_sums_of_misaligned_weights_are_right(build):
    for dtype in DTYPES:
        weight = torch.randn(9001).to(dtype)[1:]
        mask = (torch.rand(9003) < 0.5)[3:]
        check_sums(build.power_sums, [weight], [mask], 1.0, 2.0)
