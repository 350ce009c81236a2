"""A global budget is allocated as by one threshold over all layers, and met exactly."""

import math

import numpy as np
import pytest
import torch

from pdp_kernels import global_prune_counts
from tests.support.ranks import results_on_ranks
from tests.support.sharded_training import mesh_of
from tests.support.weights import DTYPES

RATIOS = (0, 1e-4, 0.3, 0.5, 0.9, 0.999, 1)


def counts_of_sorting(weights, sparsity):
    """Return the prune counts that sorting all magnitudes together gives."""
    magnitudes = torch.cat([weight.flatten().abs().double() for weight in weights])
    layers = torch.cat([torch.full((w.numel(),), index) for index, w in enumerate(weights)])
    budget = math.floor(sparsity * len(magnitudes) + 0.5)
    pruned = magnitudes.sort(stable=True).indices[:budget]
    return torch.bincount(layers[pruned], minlength=len(weights)).tolist()


def layers_of(dtype):
    shapes = ((300, 7), (0,), (), (4, 5, 3, 3), (4097,))
    return [(torch.randn(shape) * 2.0**-index).to(dtype) for index, shape in enumerate(shapes)]


@pytest.mark.parametrize("sparsity", RATIOS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_equal_those_of_sorting_all_magnitudes(dtype, sparsity, device):
    layers = layers_of(dtype)
    on_device = [layer.to(device) for layer in layers]
    assert global_prune_counts(on_device, sparsity) == counts_of_sorting(layers, sparsity)


@pytest.mark.parametrize("sparsity", RATIOS)
def test_layers_may_have_several_dtypes(sparsity):
    layers = [torch.randn(999, dtype=torch.float64).to(dtype) for dtype in DTYPES]
    assert global_prune_counts(layers, sparsity) == counts_of_sorting(layers, sparsity)


@pytest.mark.parametrize("sparsity", RATIOS)
def test_values_that_are_hard_to_tell_apart(sparsity):
    layers = [
        torch.full((100,), 0.25),
        torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 3e38]),
        torch.full((50,), -0.25),
        1 + torch.arange(64) * 2.0**-23,
    ]
    assert global_prune_counts(layers, sparsity) == counts_of_sorting(layers, sparsity)


def test_ties_at_the_boundary_go_to_the_earlier_layers():
    layers = [torch.ones(4), torch.ones(4), torch.ones(4)]
    assert global_prune_counts(layers, 0.5) == [4, 2, 0]


@pytest.mark.parametrize("cap", [0.8, 0.9, 0.99])
def test_no_layer_is_pruned_beyond_the_cap_and_the_total_stays(cap):
    layers = [torch.randn(1000) * scale for scale in (0.01, 0.1, 1, 1, 10)]
    uncapped = global_prune_counts(layers, 0.7)
    capped = global_prune_counts(layers, 0.7, max_layer_sparsity=cap)
    assert max(uncapped) == 1000 and sum(uncapped) == 3500
    assert sum(capped) == 3500
    assert max(capped) == math.floor(cap * 1000)


def test_one_threshold_takes_the_rest_of_a_capped_layer_from_the_others():
    small, *others = [torch.randn(1000) * scale for scale in (0.01, 1, 1.5)]
    capped = global_prune_counts([small, *others], 0.5, max_layer_sparsity=0.9)
    assert capped == [900, *counts_of_sorting(others, 600 / 2000)]


def test_capping_may_reach_a_second_layer():
    """The first cap pushes the next smallest layer over its own."""
    layers = [torch.full((100,), 1.0), torch.full((100,), 2.0), torch.full((100,), 3.0)]
    assert global_prune_counts(layers, 0.6) == [100, 80, 0]
    assert global_prune_counts(layers, 0.6, max_layer_sparsity=0.7) == [70, 70, 40]


def test_weights_stay_as_they_are_and_may_require_gradients():
    layer = torch.randn(64, requires_grad=True)
    before = layer.detach().clone()
    global_prune_counts([layer], 0.5)
    assert torch.equal(layer.detach(), before) and layer.grad is None


def test_bad_arguments_raise():
    layers = [torch.ones(10), torch.ones(10)]
    with pytest.raises(
        ValueError, match=r"max_layer_sparsity must leave 18 .* got 0.8.* leaves 16"
    ):
        global_prune_counts(layers, 0.9, max_layer_sparsity=0.8)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got 2"):
        global_prune_counts(layers, 2)
    with pytest.raises(ValueError, match=r"max_layer_sparsity must be in \[0, 1\], got -1"):
        global_prune_counts(layers, 0.5, max_layer_sparsity=-1)
    with pytest.raises(TypeError, match="weights must be a list or tuple"):
        global_prune_counts(torch.ones(3), 0.5)
    with pytest.raises(ValueError, match="at least one tensor"):
        global_prune_counts([], 0.5)


def lamp_counts(layers, sparsity):
    """Return the prune counts that sorting all LAMP scores together gives."""
    scores = []
    for layer in layers:
        squares = layer.flatten().double().square().sort(descending=True).values
        score = (squares / squares.cumsum(0)).flip(0).nan_to_num(0)
        scores.append(score)
    return counts_of_sorting(scores, sparsity)


@pytest.mark.parametrize("sparsity", RATIOS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lamp_equals_sorting_all_scores(dtype, sparsity, device):
    layers = layers_of(dtype)
    on_device = [layer.to(device) for layer in layers]
    found = global_prune_counts(on_device, sparsity, allocation="lamp")
    expected = lamp_counts(layers, sparsity)
    assert sum(found) == sum(expected)
    # Sums of squares in another order may swap two scores at the boundary.
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))


def test_lamp_of_a_layer_of_known_scores():
    # Squares 1, 4, 4, 16 have the scores 1/25, 4/24, 4/20, 1; the other layer's are 1/3, 1/2, 1.
    layers = [torch.tensor([1.0, -2.0, 2.0, 4.0]), torch.full((3,), 1e-30)]
    counts = [global_prune_counts(layers, k / 7, allocation="lamp") for k in range(8)]
    assert counts == [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1], [3, 2], [4, 2], [4, 3]]


@pytest.mark.parametrize(
    "layers, sparsity, expected",
    [
        # float32 rounds the least scores of both layers to one number.
        ([[8847308.0, 15223361.0], [9253716.0, 15922658.0]], 0.25, [0, 1]),
        # (1e-4 / 2e19)^2 is 0 in float32.
        ([[3e-4, 4e-4, 2e19], [1e-4, 2e-4, 2e19]], 2 / 6, [0, 2]),
    ],
)
def test_lamp_compares_scores_in_float64(layers, sparsity, expected, device):
    layers = [torch.tensor(layer, device=device) for layer in layers]
    assert global_prune_counts(layers, sparsity, allocation="lamp") == expected


def test_lamp_does_not_depend_on_the_scale_of_layers():
    layers = [torch.randn(40, 30, dtype=torch.float64) for _ in range(3)]
    scaled = [layer * 4.0**power for layer, power in zip(layers, (-500, 0, 400), strict=True)]
    found = [global_prune_counts(each, 0.9, allocation="lamp") for each in (layers, scaled)]
    assert found[0] == found[1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_lamp_of_weights_that_are_not_finite_raises(value):
    with pytest.raises(ValueError, match="needs finite weights, got NaN or inf"):
        global_prune_counts([torch.tensor([1.0, value])], 0.5, allocation="lamp")


def erk_densities(shapes, sparsity):
    """Return the densities of Evci et al.'s own procedure: layers that would exceed 1 are dense."""
    dense = set()
    while True:
        sizes = {i: math.prod(shape) for i, shape in enumerate(shapes)}
        free = [i for i in sizes if i not in dense]
        left = (1 - sparsity) * sum(sizes.values()) - sum(sizes[i] for i in dense)
        raw = {i: sum(shapes[i]) / math.prod(shapes[i]) for i in free}
        e = left / sum(raw[i] * sizes[i] for i in free)
        above = [i for i in free if e * raw[i] > 1]
        if not above:
            return [1.0 if i in dense else e * raw[i] for i in sizes]
        dense.update(above)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9, 0.99])
def test_erk_equals_its_authors_procedure(sparsity):
    shapes = [(16, 3, 3, 3), (64, 16, 3, 3), (256, 64), (10, 256), (7,)]
    layers = [torch.ones(shape) for shape in shapes]
    counts = global_prune_counts(layers, sparsity, allocation="erk")
    assert sum(counts) == math.floor(sparsity * sum(map(math.prod, shapes)) + 0.5)
    for shape, count, density in zip(shapes, counts, erk_densities(shapes, sparsity), strict=True):
        assert abs(count - (1 - density) * math.prod(shape)) <= 1


@pytest.mark.parametrize("sparsity", RATIOS)
def test_uniform_prunes_the_same_fraction_of_each_layer(sparsity):
    sizes = (1, 7, 100, 0, 333, 4096)
    counts = global_prune_counts([torch.ones(n) for n in sizes], sparsity, allocation="uniform")
    assert sum(counts) == math.floor(sparsity * sum(sizes) + 0.5)
    assert all(abs(count - sparsity * n) <= 1 for count, n in zip(counts, sizes, strict=True))


def test_remainders_go_to_the_earlier_layers():
    layers = [torch.ones(3), torch.ones(3), torch.ones(3), torch.ones(3)]
    assert global_prune_counts(layers, 0.5, allocation="uniform") == [2, 2, 1, 1]


@pytest.mark.parametrize("allocation", ["lamp", "erk", "uniform"])
@pytest.mark.parametrize("cap", [0.905, 0.92, 0.99])
def test_every_allocation_keeps_the_caps_and_the_total(allocation, cap):
    layers = [torch.randn(shape) for shape in ((100, 10), (10, 100, 3, 3), (5,), (300, 300))]
    sizes = [layer.numel() for layer in layers]
    counts = global_prune_counts(layers, 0.9, allocation=allocation, max_layer_sparsity=cap)
    assert sum(counts) == math.floor(0.9 * sum(sizes) + 0.5)
    assert all(count <= math.floor(cap * n) for count, n in zip(counts, sizes, strict=True))


@pytest.mark.parametrize("allocation", ["magnitude", "uniform"])
def test_numbers_of_numpy_count_as_their_doubles(allocation):
    layers, ratio = [torch.randn(100_000), torch.randn(100_003)], np.float16(0.9)
    options = {"allocation": allocation, "max_layer_sparsity": np.float16(0.95)}
    assert sum(global_prune_counts(layers, ratio, **options)) == 179_983


def test_another_allocation_raises():
    with pytest.raises(ValueError, match=r"allocation must be 'magnitude' or .* got 'random'"):
        global_prune_counts([torch.ones(3)], 0.5, allocation="random")


def allocate_on_rank(rank, ranks):
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    layers = [torch.randn(shape) for shape in ((7, 30), (16, 3, 3, 3), (50, 4))]
    mesh = mesh_of(rank, (ranks,))
    sharded = [distribute_tensor(layer, mesh, [Shard(0)]) for layer in layers]
    for allocation in ("magnitude", "erk", "uniform"):
        found = [
            global_prune_counts(each, 0.8, allocation=allocation) for each in (layers, sharded)
        ]
        assert found[0] == found[1]
    with pytest.raises(ValueError, match=r"got a weight of shape \(7, 30\) that is sharded"):
        global_prune_counts(sharded, 0.8, allocation="lamp")
    return True


def test_sharded_weights_get_the_allocation_of_the_global_ones():
    assert results_on_ranks(allocate_on_rank, 2, 2) == [True, True]


@pytest.mark.parametrize("allocation", ["magnitude", "lamp", "erk", "uniform"])
def test_a_cap_counts_a_decimal_fraction_as_it_is_written(allocation):
    options = {"allocation": allocation, "max_layer_sparsity": 0.29}
    assert global_prune_counts([torch.randn(100)], 0.29, **options) == [29]


@pytest.mark.parametrize("allocation", ["magnitude", "lamp", "erk", "uniform"])
def test_a_weight_without_dimensions_is_a_layer_of_one(allocation):
    layers = [torch.tensor(3.0), torch.randn(4, 4).clamp(-2, 2)]
    assert global_prune_counts(layers, 0.0, allocation=allocation) == [0, 0]
    half = [1, 8] if allocation == "uniform" else [0, 9]
    assert global_prune_counts(layers, 0.5, allocation=allocation) == half
    assert global_prune_counts(layers, 1.0, allocation=allocation) == [1, 16]


@pytest.mark.parametrize("allocation", ["magnitude", "lamp"])
def test_values_of_the_meta_device_raise(allocation):
    layers = [torch.ones(3), torch.empty(3, device="meta")]
    message = f'weights must have values for allocation "{allocation}", got.*for weights\\[1\\]'
    with pytest.raises(ValueError, match=message):
        global_prune_counts(layers, 0.5, allocation=allocation)
    assert global_prune_counts(layers, 0.5, allocation="uniform") == [2, 1]


@pytest.mark.parametrize("allocation", ["magnitude", "lamp"])
def test_negated_views_count_by_their_values(allocation):
    view = torch.tensor([1 + 2j, 1 - 3j, 1 + 0j]).conj().imag
    assert view.is_neg()
    layers = [view, torch.tensor([1.0, 4.0])]
    found = global_prune_counts(layers, 0.4, allocation=allocation)
    assert found == global_prune_counts([view.clone(), layers[1]], 0.4, allocation=allocation)
