"""PDPConfig.gradient_tau: in training, Eq. 2 never takes a lower temperature."""

import copy

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner, pdp_mask, pdp_mask_channel, pdp_mask_nm

PATTERNS = {"unstructured": 0.5, "channel": 0.5, "2:4": None}


def small_network():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def masked(pattern, mask, weight, **temperatures):
    if pattern == "2:4":
        return pdp_mask_nm(weight, 2, 4, pruned=mask.pruned, **temperatures)
    if pattern == "channel":
        options = {"threshold": mask.threshold, "norm": "rms"}
        return pdp_mask_channel(weight, **options, **temperatures)
    return pdp_mask(weight, threshold=mask.threshold, **temperatures)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("least", [0.0, 0.25], ids=["of the mask", "least"])
def test_gradients_of_a_model_take_the_larger_temperature(pattern, least):
    model = small_network()
    config = PDPConfig(
        PATTERNS[pattern], pattern=pattern, warmup=0, ramp=1, anneal=2, gradient_tau=least,
        relative_tau=(0.5, 0.02), scope="layer",
    )  # fmt: skip
    pruner = PDPPruner(model, config)
    for progress in (1.0, 1.0, 2.0):  # weights are masked together from the second pass on
        pruner.step(progress)
        model.zero_grad()
        inputs = torch.randn(4, 16)
        model(inputs).square().sum().backward()

        plain = small_network()
        leaves = [model[index].weight.detach().clone().requires_grad_() for index in (0, 2)]
        tau = config.temperature_at((0.5, 0.02), progress)
        hidden = inputs
        for index, leaf in zip((0, 2), leaves, strict=True):
            mask = model[index].pdp_masks["weight"]
            temperatures = {"relative_tau": tau, "gradient_tau": max(tau, least)}
            w_hat = masked(pattern, mask, leaf, **temperatures)
            hidden = nn.functional.linear(hidden, w_hat, model[index].bias)
            hidden = plain[1](hidden) if index == 0 else hidden
        hidden.square().sum().backward()
        for index, leaf in zip((0, 2), leaves, strict=True):
            torch.testing.assert_close(model[index].weight.grad, leaf.grad)


def test_default_is_smooth_for_groups_alone():
    def least(config, override=None):
        return config.plan(override).gradient_tau

    assert least(PDPConfig(0.5)) == 0.0
    assert least(PDPConfig(0.5, pattern="channel")) == 0.0
    assert least(PDPConfig(pattern="2:4")) == 1.0
    assert least(PDPConfig(0.5), {"pattern": "2:4"}) == 1.0
    assert least(PDPConfig(pattern="2:4", gradient_tau=0)) == 0.0
    assert least(PDPConfig(pattern="2:4"), {"gradient_tau": 0.1}) == 0.1
    assert least(PDPConfig(pattern="2:4", tau=1e-3)) == 0.0  # 1.0 would be absolute
    assert least(PDPConfig.paper(None, pattern="2:4")) == 0.0


@pytest.mark.parametrize(
    "value, error", [(-0.1, ValueError), (float("inf"), ValueError), ("1", TypeError)]
)
def test_wrong_values_are_refused(value, error):
    with pytest.raises(error, match="gradient_tau must be"):
        PDPConfig(0.5, gradient_tau=value)
    with pytest.raises(error, match=r"overrides\['0'\]: gradient_tau must be"):
        PDPConfig(0.5, overrides={"0": {"gradient_tau": value}})


@pytest.mark.parametrize("pattern", PATTERNS)
def test_copies_and_moved_models_keep_the_temperature(pattern):
    model = small_network()
    config = PDPConfig(
        PATTERNS[pattern], pattern=pattern, warmup=0, ramp=1, gradient_tau=0.25,
        relative_tau=(1.0, 0.02),
    )  # fmt: skip
    pruner = PDPPruner(model, config)
    pruner.step(1.0)
    for other in (copy.deepcopy(model), model.double()):
        mask = other[0].pdp_masks["weight"]
        assert mask.tau.item() == pytest.approx(0.02)
        assert mask.gradient_tau.item() == 0.25
        assert mask.gradient_tau.dtype == mask.tau.dtype


def test_configuration_keeps_it_as_plain_data():
    config = PDPConfig(0.5, gradient_tau=0.25)
    assert PDPConfig.from_dict(config.to_dict()) == config
