"""Hard masks prune exactly k weights, ties by lowest flat index."""

import pytest
import torch

from pdp_kernels import hard_mask, pdp_mask, pdp_threshold
from tests.support.selection import check_hard_mask
from tests.support.weights import DISTRIBUTIONS, DTYPES, SIZES, counts_of, weight_of


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_equals_reference(selection, distribution, dtype):
    for size in SIZES:
        weight = weight_of(distribution, size, dtype)
        for count in counts_of(size):
            check_hard_mask(selection, weight, count)


def test_hand_computed_ties(device):
    weight = torch.tensor([[1.0, -2.0], [2.0, 3.0], [-2.0, 2.0]], device=device)
    kept = [hard_mask(weight, pruned / 6).flatten().int().tolist() for pruned in range(7)]
    assert kept == [
        [1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 1, 0, 1],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]


def test_ties_that_span_many_tiles_and_threads_are_exact(selection, set_threads):
    set_threads(3)
    weight = torch.randint(0, 3, (300_007,)).float()
    for count in (1, 100_003, 150_000, 222_222, 300_000):
        check_hard_mask(selection, weight, count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_follow_the_row_major_order_whatever_the_layout(selection, dtype):
    weight = torch.randint(-3, 3, (6, 8, 5, 7)).to(dtype)
    for view in (
        weight.to(memory_format=torch.channels_last),
        weight.permute(3, 1, 0, 2),
        weight[:, ::3],
        weight.flatten()[1:],
    ):
        check_hard_mask(selection, view, view.numel() // 2)


def test_empty_and_scalar_weights_are_exact(selection):
    check_hard_mask(selection, torch.empty(0, 3), 0)
    check_hard_mask(selection, torch.tensor(0.5), 0)
    check_hard_mask(selection, torch.tensor(0.5), 1)


def test_agrees_with_the_threshold_where_nothing_ties(device):
    weight = torch.randn(64, 3, 3, 3, device=device)
    assert torch.equal(hard_mask(weight, 0.9), weight.abs() > pdp_threshold(weight, 0.9))


def test_agrees_with_the_soft_mask_above_one_half(device):
    weight = torch.randn(64, 32, device=device)
    _, mask = pdp_mask(weight, 0.9, return_mask=True)
    assert torch.equal(hard_mask(weight, 0.9), mask > 0.5)


def test_ratio_in_a_tensor_gives_the_same(device):
    weight = torch.randn(1000, device=device).bfloat16()
    ratio = torch.tensor(0.77, device=device, dtype=torch.float64)
    assert torch.equal(hard_mask(weight, ratio), hard_mask(weight, 0.77))


def test_bitwise_repeatable(selection):
    weight = torch.randn(100_003, device=selection.device).bfloat16()
    counts = torch.tensor([90_000], device=selection.device)
    first = selection.hard_mask(weight, counts)
    for _ in range(20):
        assert torch.equal(selection.hard_mask(weight, counts), first)
