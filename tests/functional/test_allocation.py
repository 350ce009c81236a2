"""A global budget is allocated as by one threshold over all layers, and met exactly."""

import math

import pytest
import torch

from pdp_kernels import global_prune_counts
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
