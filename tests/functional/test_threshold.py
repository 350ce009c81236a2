"""Thresholds equal the float64 reference exactly, whatever the weights."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdp_kernels import pdp_threshold, pdp_thresholds
from pdp_kernels.ops import reference
from tests.support.oracle import exact_threshold
from tests.support.selection import check_thresholds
from tests.support.weights import DISTRIBUTIONS, DTYPES, SIZES, counts_of, denormals, weight_of


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_equals_reference(selection, distribution, dtype):
    for size in SIZES:
        weight = weight_of(distribution, size, dtype)
        for count in counts_of(size):
            check_thresholds(selection, [weight], [count])


def test_hand_computed():
    weight = torch.tensor([[3.0, -1.0], [-4.0, 2.0]])
    sparsities = [0.0, 0.25, 0.5, 0.75, 1.0]
    found = [pdp_threshold(weight, sparsity).item() for sparsity in sparsities]
    assert found == [-math.inf, 1.5, 2.5, 3.5, math.inf]


@pytest.mark.parametrize("size", [101, 100_003])
def test_is_the_median_at_one_half(size):
    """An oracle of another kind: Python's own median."""
    weight = torch.randn(size, dtype=torch.float64)
    # k rounds an odd half up, as one more magnitude at the top would.
    expected = statistics.median([*weight.abs().tolist(), math.inf])
    assert pdp_threshold(weight, 0.5).item() == expected


@pytest.mark.parametrize("size", [5, 7, 8])
def test_count_is_rounded_half_up(size):
    weight = torch.arange(1.0, size + 1)
    for eighths in range(9):
        pruned = math.floor(eighths / 8 * size + 0.5)
        assert (weight < pdp_threshold(weight, eighths / 8)).sum() == pruned


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_of_the_largest_magnitudes_do_not_overflow(selection, dtype):
    largest = torch.finfo(dtype).max
    check_thresholds(selection, [torch.tensor([largest, -largest, largest], dtype=dtype)], [2])


def test_empty_weight_keeps_everything(selection):
    check_thresholds(selection, [torch.empty(0), torch.empty(3, 0), torch.empty(0)], [0, 0, 1])


def test_lists_may_have_several_sizes_and_dtypes(selection):
    sizes = [0, 1, 7, 64, 333, 5000, 70_001, 200_003] * 3
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    weights = [torch.randn(n).to(dtypes[i % 3]) for i, n in enumerate(sizes)]
    check_thresholds(selection, weights, [int(0.8 * n) for n in sizes])


def test_list_with_float64_gives_each_layer_its_own_threshold(device):
    weights = [torch.randn(1001, dtype=dtype, device=device) for dtype in DTYPES]
    together = pdp_thresholds(weights, 0.7)
    alone = [pdp_threshold(weight, 0.7).double() for weight in weights]
    assert together.dtype == torch.float64
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("length", [1, 2, 300])
def test_lists_may_have_any_length(selection, length):
    check_thresholds(
        selection, [torch.randn(37) for _ in range(length)], [i % 38 for i in range(length)]
    )


def test_each_weight_may_have_its_own_ratio(device):
    weights = [torch.randn(100, device=device), torch.randn(50, device=device)]
    found = pdp_thresholds(weights, [0.1, 0.9])
    assert found.tolist() == [
        pdp_threshold(w, r).item() for w, r in zip(weights, (0.1, 0.9), strict=True)
    ]


def test_ratios_in_a_tensor_give_the_same(device):
    weights = [torch.randn(n, device=device) for n in (100, 77, 1)]
    ratios = [0.3, 0.845, 1.0]
    for shared in (ratios, 0.6):
        as_tensor = torch.tensor(shared, device=device, dtype=torch.float64)
        assert torch.equal(pdp_thresholds(weights, as_tensor), pdp_thresholds(weights, shared))


@pytest.mark.parametrize("ratio", [1.5, 1e30, math.inf, -0.5, -1e30, -math.inf, math.nan])
def test_unchecked_ratios_outside_of_range_act_as_the_nearer_end(ratio):
    """In a tensor, or in a call of the operator. NaN acts as 0."""
    weight = torch.randn(10)
    count = 10 if ratio > 1 else 0
    assert pdp_threshold(weight, torch.tensor(ratio)) == math.copysign(math.inf, count - 1)
    for operators in (torch.ops.pdp, reference):
        assert operators.prune_counts([weight, weight[:0]], [ratio] * 2).tolist() == [count, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_and_strided_weights_are_exact(selection, dtype):
    base = torch.randn(5, 33, 7, 11).to(dtype)
    views = [base.flatten()[3:], base.transpose(0, 3), base[:, ::2], base[1:, 1:, 1:, 1:], base.mT]
    views.append(base.to(memory_format=torch.channels_last))
    views.append(base[:1].expand(4, -1, -1, -1))
    for view in views:
        check_thresholds(selection, [view], [int(0.9 * view.numel())])


def test_bitwise_repeatable(selection):
    weights = [torch.randn(100_003, device=selection.device) for _ in range(3)]
    counts = torch.tensor([50_000, 90_000, 1], device=selection.device)
    first = selection.thresholds(weights, counts)
    for _ in range(20):
        assert torch.equal(selection.thresholds(weights, counts), first)


def test_independent_of_the_number_of_threads(set_threads):
    weights = [torch.randn(300_007), torch.randn(1000), torch.randn(200_003).bfloat16()]
    alone = pdp_thresholds(weights, 0.9)
    for threads in (2, 3):
        set_threads(threads)
        assert torch.equal(pdp_thresholds(weights, 0.9), alone)


def test_a_sample_that_misleads_changes_nothing(selection):
    """Large weights exactly where an even sample would look, and nowhere else."""
    size = 1 << 17
    for period in (32, 64, 128):
        weight = torch.rand(size)
        weight[::period] += 100
        for count in (size // 2, size - size // period, size - 10):
            check_thresholds(selection, [weight], [count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_adjacent_values_that_differ_in_every_digit(selection, dtype):
    """1 and the number below: the k-th magnitude is the last of its bin in each histogram."""
    weight = torch.tensor([1 - torch.finfo(dtype).eps / 2, 1.0], dtype=dtype).repeat(40_000)
    for count in (39_999, 40_000, 40_001):
        check_thresholds(selection, [weight], [count])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_weights_and_ratio_are_exact(data):
    floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
    values = data.draw(st.lists(floats, min_size=1, max_size=80))
    repeats = data.draw(st.sampled_from([1, 50, 400]))
    weight = torch.tensor(values).repeat(repeats)
    ratio = data.draw(st.floats(0, 1))
    count = math.floor(ratio * weight.numel() + 0.5)
    expected = exact_threshold(weight, count)
    found = pdp_threshold(weight, ratio)
    assert torch.equal(found, expected) or (found.isnan() and expected.isnan())


def test_takes_no_gradient(device):
    weight = torch.randn(10, device=device, requires_grad=True)
    assert not pdp_threshold(weight, 0.5).requires_grad


def test_reference_agrees_with_itself_in_float32():
    """Computed in float32 the reference is the float64 one rounded once: no double rounding."""
    weight = torch.cat([torch.randn(5000), denormals(99, torch.float32)])
    for count in range(0, weight.numel(), 13):
        own = reference.threshold(weight, torch.tensor(count))
        assert torch.equal(own, exact_threshold(weight, count))
