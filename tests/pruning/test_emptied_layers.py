"""A global budget empties no layer unless asked, and then names it."""

import warnings

import pytest
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner
from tests.support.models import small_model


def with_a_small_head(std=0.001):
    model = small_model()
    nn.init.normal_(model[2].weight, std=std)
    return model


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sparsity, kept", [(0.5, 13), (0.8, 6), (0.9, 3)])
def test_by_default_each_layer_keeps_a_tenth_of_the_average_density(sparsity, kept):
    pruner = PDPPruner(with_a_small_head(), PDPConfig(sparsity, warmup=0, ramp=4))
    pruner.step(4.0)
    assert pruner.prune_counts == {
        "0.weight": round(sparsity * 768) - 256 + kept,
        "2.weight": 256 - kept,  # ceil((1 - sparsity) / 10 * 256) are kept
    }
    pruner.finalize()
    assert int((pruner.model[2].weight != 0).sum()) == kept


def test_layers_too_small_for_the_default_cap_have_none():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.normal_(model[0].weight, std=0.001)
    pruner = PDPPruner(model, PDPConfig(0.875, warmup=1, ramp=1))
    with pytest.warns(UserWarning, match=r"prunes 100\.0% of 0\.weight"):
        pruner.step(1.0)  # floor(0.9875 * 4) of each layer do not make 7


def test_the_paper_s_setting_has_no_cap():
    assert PDPConfig.paper(0.8).least_density == 0


def test_a_layer_that_a_global_budget_empties_is_named_once():
    config = PDPConfig(0.8, warmup=1, ramp=4, reallocate=1, max_layer_sparsity=1.0)
    pruner = PDPPruner(with_a_small_head(), config)
    with pytest.warns(UserWarning, match=r"budget of 80% prunes 100\.0% of 2\.weight, whose"):
        pruner.step(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.step(2.0)  # allocates again
    pruner.step(5.0)
    assert "more than 99% pruned: 2.weight" in str(pruner.report())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "options",
    [
        {"least_density": 0.5},
        {"max_layer_sparsity": 0.98},
        {"scope": "layer"},
        {"overrides": {"2": {"sparsity": 0.5}}},
    ],
)
def test_what_the_warning_proposes_keeps_the_layer(options):
    pruner = PDPPruner(with_a_small_head(), PDPConfig(0.8, warmup=0, ramp=4, **options))
    pruner.step(4.0)
    pruner.finalize()
    assert (pruner.model[2].weight != 0).any()
    assert "more than" not in str(pruner.report())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pattern", ["unstructured", "channel"])
@pytest.mark.parametrize("allocation", ["lamp", "erk", "uniform"])
def test_other_allocations_do_not_empty_a_layer_of_small_weights(allocation, pattern):
    config = PDPConfig(0.75, warmup=0, ramp=4, allocation=allocation, pattern=pattern)
    pruner = PDPPruner(with_a_small_head(), config)
    pruner.step(4.0)
    units = [32, 8] if pattern == "channel" else [512, 256]
    counts = list(pruner.prune_counts.values())
    assert sum(counts) == 0.75 * sum(units)
    assert all(count < size for count, size in zip(counts, units, strict=True))
    pruner.finalize()


def test_an_allocation_without_a_global_budget_raises():
    with pytest.raises(ValueError, match='allocation must be left out with scope "layer"'):
        PDPConfig(0.5, scope="layer", allocation="erk")
