"""Masks follow weights that other code converts, swaps or replaces."""

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner, hard_mask
from tests.support.models import AT_ONCE


def pruned_mlp():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    return model, PDPPruner(model, PDPConfig(0.5, scope="layer", **AT_ONCE))


def assert_masks_follow(model, pruner):
    """The model computes with its weights of now, masked by their magnitudes of now."""
    for training in (True, False):
        model.train(training)
        inputs = torch.randn(4, 16).to(model[0].weight)
        before = model[0](inputs)
        with torch.no_grad():
            model[0].weight[model[0].weight.abs() > 0.1] *= 2
        assert not torch.equal(model[0](inputs), before)
    pruner.step(1.0)
    weights = [model[index].weight.detach().clone() for index in (0, 2)]
    evaluated = model.eval()(inputs)
    assert torch.equal(pruner.pruned_copy()(inputs), evaluated)
    pruner.finalize()
    assert torch.equal(model(inputs), evaluated)
    for index, weight in zip((0, 2), weights, strict=True):
        assert torch.equal(model[index].weight, weight * hard_mask(weight, 0.5))


@pytest.fixture(params=["overwrite", "swap"])
def conversion(request):
    """torch.nn.Module.to makes new Parameters, or swaps the content of the old ones."""
    set_mode = getattr(torch.__future__, f"set_{request.param}_module_params_on_conversion")
    set_mode(True)
    yield
    set_mode(False)


@pytest.mark.parametrize("has_trained", [False, True])
def test_conversions_that_replace_parameters(conversion, has_trained):
    model, pruner = pruned_mlp()
    if has_trained:
        model(torch.randn(4, 16)).sum().backward()
        pruner.step(0.5)
        model.zero_grad()
    model.double()
    model.load_state_dict({name: torch.randn_like(v) for name, v in model.state_dict().items()})
    assert model[0].weight.dtype == torch.float64
    assert_masks_follow(model, pruner)


REPLACEMENTS = {
    "new data": lambda layer, new: setattr(layer.weight, "data", new.data),
    "a new Parameter": lambda layer, new: setattr(layer, "weight", new),
    "a registered Parameter": lambda layer, new: layer.register_parameter("weight", new),
    "swapped tensors": lambda layer, new: torch.utils.swap_tensors(layer.weight, new),
}


@pytest.mark.parametrize("case", REPLACEMENTS)
def test_weights_that_are_replaced(case):
    model, pruner = pruned_mlp()
    REPLACEMENTS[case](model[0], nn.Parameter(torch.randn(32, 16)))
    assert_masks_follow(model, pruner)


def test_a_deleted_weight_is_an_error():
    model, pruner = pruned_mlp()
    del model[0].weight
    with pytest.raises(RuntimeError, match="must stay a Parameter"):
        model(torch.randn(4, 16))
    with pytest.raises(RuntimeError, match="must stay a Parameter"):
        pruner.step(1.0)
