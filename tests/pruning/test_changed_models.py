"""A step notices a change of the model after many steps in which nothing changed."""

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner
from pdp_kernels.pruning import masked_weights
from tests.support.models import CONFIG, small_model


def nested_model():
    return nn.Sequential(small_model(), nn.Sequential(small_model()))


def stepped(model, config=CONFIG):
    pruner = PDPPruner(model, config)
    for progress in (1.0, 2.0):
        pruner.step(progress)
    return pruner


def set_data(layer):
    layer.weight.data = layer.weight.data[:8]


def set_flat_data(layer):
    layer.weight.data = layer.weight.data.view(-1)


def take_masks_over(layer):
    PDPPruner(layer, PDPConfig(0.5))


def finalize_by_another(layer):
    pruner = PDPPruner(layer, PDPConfig(0.5, scope="layer", warmup=0, ramp=0))
    pruner.step(1.0)
    pruner.finalize()


def swap_mask(layer):
    layer.pdp_masks["weight"] = layer.pdp_masks.copy()["weight"].__class__(False)


CHANGES = {
    "another layer": (lambda m: m[1][0].__setitem__(0, nn.Linear(16, 32)), "no longer has the lay"),
    "another parent": (lambda m: m.__setitem__(1, nn.Sequential(small_model())), "no longer has"),
    "no layer": (lambda m: m[1][0].__delitem__(0), "no longer has the layer"),
    "a smaller weight": (lambda m: set_data(m[1][0][0]), r"had shape \(32, 16\) and now has \(8,"),
    "another shape": (
        lambda m: setattr(m[1][0][0], "weight", nn.Parameter(torch.randn(8, 16))),
        r"had shape \(32, 16\) and now has \(8, 16\): make a new pruner after replacing",
    ),
    "a flat weight": (lambda m: set_flat_data(m[1][0][0]), r"and now has \(512,\)"),
    "no weight": (lambda m: m[1][0][0].__delattr__("weight"), "must stay a Parameter"),
    "masks of another pruner": (lambda m: take_masks_over(m[1][0]), "no longer has the masks"),
    "finalized": (lambda m: finalize_by_another(m[1][0]), "no longer has the masks"),
    "another mask": (lambda m: swap_mask(m[1][0][0]), "no longer has the masks"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_an_error_of_the_next_step_and_report(change):
    make, message = CHANGES[change]
    model = nested_model()
    pruner = stepped(model)
    make(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            pruner.step(3.0)
        with pytest.raises(RuntimeError, match=message):
            pruner.report()


def test_a_weight_that_several_layers_share_is_watched_in_each():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    model[1].weight = model[0].weight
    pruner = stepped(model)
    model[1] = nn.Linear(16, 16)
    with pytest.raises(RuntimeError, match=r"no longer has the layer whose 1\.weight"):
        pruner.step(3.0)


def same_layers_in_another_parent(model):
    model[1] = nn.Sequential(model[1][0])


def another_parameter(model):
    model[1][0][0].weight = nn.Parameter(torch.randn(32, 16))


def another_type(model):
    class OtherParameter(nn.Parameter):
        pass

    layer = model[1][0][0]
    layer._parameters["weight"] = OtherParameter(layer.weight.detach().clone())


def another_activation(model):
    model[1][0][1] = nn.Tanh()


@pytest.mark.parametrize(
    "change", [same_layers_in_another_parent, another_parameter, another_type, another_activation]
)
def test_other_changes_are_looked_into_once_at_most(change, monkeypatch):
    model = nested_model()
    pruner = stepped(model)
    looks = []
    check = masked_weights.check_layers
    monkeypatch.setattr(
        masked_weights, "check_layers", lambda *args: looks.append(1) or check(*args)
    )
    pruner.step(2.5)
    assert not looks
    change(model)
    for progress in (2.5, 3.0, 3.5):
        pruner.step(progress)
    assert len(looks) <= 1
    pruner.step(4.0)
    pruner.finalize()
    assert (model[1][0][0].weight == 0).sum() == round(0.8 * 512)


def test_a_layer_is_wrapped_and_its_wrapper_replaced():
    model = nested_model()
    pruner = stepped(model)
    layer = model[1][0]
    model[1][0] = nn.Sequential(layer)
    for progress in (2.5, 3.0):
        pruner.step(progress)
    model[1][0] = layer
    pruner.step(3.5)
    model[1][0] = nn.Sequential(small_model())
    with pytest.raises(RuntimeError, match="no longer has the layer"):
        pruner.step(4.0)


def test_layers_that_no_longer_share_a_weight_are_an_error_of_the_next_step():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    pruner = stepped(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    with pytest.raises(RuntimeError, match=r"0\.weight, 2\.weight were one weight and no longer"):
        pruner.step(3.0)
    model[2].weight = model[0].weight  # tied again
    pruner.step(10.0)
    pruner.finalize()
    assert model[2].weight is model[0].weight


def test_tied_weights_may_be_two_parameters_in_one_memory():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    pruner = stepped(model)
    model.load_state_dict(model.state_dict(), assign=True)
    assert model[2].weight is not model[0].weight
    pruner.step(10.0)
    pruner.finalize()
    assert torch.equal(model[0].weight, model[2].weight)
    assert (model[2].weight == 0).any()


TIES = {
    "to an embedding": lambda model: setattr(model[2], "weight", model[0].weight),
    "to another layer": lambda model: setattr(model[2], "weight", model[1].weight),
    "by an embedding": lambda model: setattr(model[0], "weight", model[2].weight),
}


@pytest.mark.parametrize("case", TIES)
@pytest.mark.parametrize("steps", [0, 2])
def test_tying_a_masked_weight_is_an_error_before_anything_is_pruned(case, steps):
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    pruner = PDPPruner(model, CONFIG)
    for step in range(steps):
        pruner.step(1.0 + step)
    TIES[case](model)
    shared = model[2].weight.detach().clone()
    for change in (lambda: pruner.step(3.0), pruner.finalize, pruner.pruned_copy):
        with pytest.raises(RuntimeError, match=r"\.weight, 2\.weight are one weight now"):
            change()
    assert torch.equal(model[2].weight, shared)
    pruner = PDPPruner(model, CONFIG)
    pruner.step(10.0)
    pruner.finalize()
    assert (model[0].weight != 0).all()
    assert (model[1].weight == 0).any()


def test_a_new_layer_that_shares_a_masked_weight_is_found_before_anything_is_pruned():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pruner = stepped(model)
    model.append(nn.Embedding(8, 8))
    model[2].weight = model[1].weight
    for end in (pruner.finalize, pruner.pruned_copy):
        with pytest.raises(RuntimeError, match=r"1\.weight, 2\.weight are one weight now"):
            end()
    assert (model[2].weight != 0).all()
