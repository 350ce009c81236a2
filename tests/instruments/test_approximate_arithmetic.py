"""Soft masks stay within the error budget with a GPU's inexact division and exponential.

Without the allowances for these operations some masks exceed the budget.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from instruments.approximate_gpu import MODES, approximate_arithmetic, moved
from pdp_kernels import pdp_threshold
from tests.support.backends import interpreted
from tests.support.masks import (
    CHANNEL_SHAPES,
    check_soft_mask,
    check_soft_mask_channel,
    check_soft_mask_nm,
    shape_of_groups,
)
from tests.support.weights import weight_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton compiles")


@pytest.fixture
def exact(rounding_interpreter):
    """The mask operators that Triton's interpreter runs."""
    return interpreted()


@pytest.fixture(params=MODES)
def approximate(request, exact):
    with approximate_arithmetic(request.param):
        yield SimpleNamespace(approximates=True, **vars(exact))


def check_soft_masks(masking, relative):
    for distribution in ("normal", "heavy-tailed", "one shared prefix"):
        weight = weight_of(distribution, 1033, torch.float32)
        threshold = pdp_threshold(weight, 0.7).item()
        for tau in (1e-4, 0.3):
            check_soft_mask(masking, weight, threshold, tau, relative)


@pytest.mark.parametrize("relative", [False, True], ids=["tau", "relative_tau"])
def test_soft_masks_stay_within_budget(approximate, relative):
    check_soft_masks(approximate, relative)


@pytest.mark.parametrize("relative", [False, True], ids=["tau", "relative_tau"])
def test_n_m_masks_stay_within_budget(approximate, relative):
    for dim in (0, 1):
        weight = torch.randn(shape_of_groups(4, dim))
        check_soft_mask_nm(approximate, weight, 4, 2, dim, relative)


@pytest.mark.parametrize("relative", [False, True], ids=["tau", "relative_tau"])
def test_channel_masks_stay_within_budget(approximate, relative):
    for shape, dim in CHANNEL_SHAPES:
        weight = torch.randn(shape)
        check_soft_mask_channel(approximate, weight, dim, relative, rms=relative)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masks_of_16_bits_stay_within_budget(approximate, dtype):
    weight = torch.randn(1033).to(dtype)
    check_soft_mask(approximate, weight, 0.7, 0.1, True)
    check_soft_mask(approximate, weight, 0.7, 0.1, False, torch.float32)


def test_the_budget_of_exact_arithmetic_is_exceeded(exact):
    """The modes above change results, and the budget needs its allowances for them."""
    with approximate_arithmetic("up"), pytest.raises(AssertionError, match="exceeds the budget"):
        check_soft_masks(exact, relative=True)
    check_soft_masks(exact, relative=True)


def test_numbers_move_by_ulps_and_the_exact_ones_stay():
    numbers = np.array([1.5, -1.5, 0.0, np.inf, -np.inf, 1.25], dtype=np.float32)
    exactly = np.array([False] * 5 + [True])
    found = moved(numbers, np.array([2, 2, 2, 2, 2, 2]), exactly)
    ulp = np.float32(2**-23)
    expected = [1.5 + 2 * ulp, -1.5 - 2 * ulp, 0, np.inf, -np.inf, 1.25]
    assert np.array_equal(found, np.array(expected, dtype=np.float32))
    assert np.isnan(moved(np.array([np.nan], dtype=np.float32), np.array([2]), np.array([False])))


@pytest.mark.parametrize("name", MODES)
def test_errors_are_at_most_two_ulp(name):
    bits = np.arange(1, 1 << 23, 997, dtype=np.uint32)
    for error in MODES[name]:
        ulps = error(bits)
        assert abs(ulps).max() == 2
        assert name.startswith("scattered") == (len(set(ulps.tolist())) == 5)
