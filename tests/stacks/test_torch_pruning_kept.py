"""Dead channels that cannot be removed stay as they are, and the report says why."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("torch_pruning")

from pdp_kernels.integrations.torch_pruning import KeptChannels, remove_dead_channels
from tests.support.channels import images, kill, mlp, randomize, removed_from, vectors


class Between(nn.Module):
    """Two layers, and a function between them."""

    def __init__(self, function, units=6, outputs=4):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, units), nn.Linear(units, outputs)
        self.function = function
        randomize(self)

    def forward(self, inputs):
        return self.second(self.function(self.first(inputs)))


class Returned(Between):
    def forward(self, inputs):
        hidden = self.function(self.first(inputs))
        return self.second(hidden), hidden


class Shaped(Between):
    def forward(self, inputs):
        hidden = self.first(inputs)
        return self.second(hidden), hidden.new_zeros(hidden.shape)


class WithInputs(Between):
    def forward(self, inputs):
        return self.second((self.first(inputs) + inputs).relu())


class Unseen(Between):
    """Torch-Pruning does not know that the function changes the order of the channels."""

    def forward(self, inputs):
        return self.second(self.first(inputs).flip(-1))


VALUES = "the outputs of the model change with their values"
STAY = {
    "layer norm": (lambda: Between(nn.LayerNorm(6)), "function computes with several"),
    "rms norm": (lambda: Between(nn.RMSNorm(6)), "coupled with function.weight"),
    "softmax": (lambda: Between(nn.Softmax(-1)), VALUES),
    "rms": (lambda: Between(lambda x: functional.rms_norm(x, (6,))), VALUES),
    "mean": (lambda: Between(lambda x: x - x.mean(-1, keepdim=True)), VALUES),
    "an output": (lambda: Returned(nn.ReLU()), VALUES),
    "a shape": (lambda: Shaped(None), r"an output of shape \(5, 6\) would have \(5, 4\)"),
    "a number": (lambda: Between(lambda x: x / x.shape[-1]), "the model would change by"),
    "the inputs": (lambda: WithInputs(None, 8), "they are coupled with inputs of the model"),
    "order": (lambda: Unseen(None), VALUES),
    "views": (lambda: Between(lambda x: x.view(-1, 2, 3).sin().flatten(1)), "would fail without"),
}


@pytest.mark.parametrize("case", STAY)
def test_what_cannot_be_removed_stays_as_it_was_and_is_named(case):
    make, reason = STAY[case]
    model = make()
    model.second.weight.data[:, :2] = 0
    parameters, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    report = removed_from(model, vectors())
    assert report.removed == {} and report.parameters_before == report.parameters_after
    kept = [each for each in report.kept if each.layer == "second" and each.side == "input"]
    assert [each.channels for each in kept] == [[0, 1]]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(kept[0].reason)
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


MIXING = {
    "amax": lambda x: x.amax(-1, keepdim=True),
    "amin": lambda x: x.amin(-1, keepdim=True),
    "argmax": lambda x: x.argmax(-1, keepdim=True).to(x),
    "topk": lambda x: x.topk(2, -1).values.sum(-1, keepdim=True),
    "sort": lambda x: x.sort(-1).values.cumsum(-1),
    "median": lambda x: x.median(-1, keepdim=True).values,
    "cumsum": lambda x: x.cumsum(-1).mean(-1, keepdim=True),
    "sum": lambda x: x.clamp(min=2).sum(-1, keepdim=True),
    "pooling": lambda x: functional.max_pool1d(x, 6),
    "quantization": lambda x: x.abs().amax(-1, keepdim=True) / 127,
}


@pytest.mark.parametrize("case", MIXING)
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_channel_that_a_function_of_several_may_choose_stays(case, side):
    """One example seldom shows it, where others are larger and smaller than the dead channels."""
    model = Between(lambda x: x / (1 + MIXING[case](x).square()))
    first, second = model.first, model.second
    if side == "input":
        second.weight.data[:, :2] = 0
        first.weight.data[:2] *= 1e-6
    else:
        first.weight.data[:2] = 0
    first.bias.data = torch.tensor([0.0, 0.0, -1.0, 1.0, -1.0, 1.0])
    examples = 0.1 * torch.randn(1, 8)
    report = remove_dead_channels(model, examples)
    assert report.removed == {}
    kept = [each for each in report.kept if each.side == side]
    assert [(each.channels, each.reason) for each in kept] == [([0, 1], VALUES)]


def test_a_unit_that_is_zero_on_the_example_inputs_alone_stays():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.dead, self.live = nn.Linear(8, 6), nn.Linear(8, 6)
            self.second = nn.Linear(6, 4)

        def forward(self, inputs):
            return self.second((self.dead(inputs) + self.live(inputs)).relu())

    model = Sum()
    kill(model, 0, [0], "dead", "live")
    model.dead.bias.data[0] = model.live.bias.data[0] = 0
    model.live.weight.data[0, 0] = 1
    examples, others = torch.randn(5, 8), torch.randn(5, 8)
    examples[:, 0], others[:, 0] = -1, 1
    report = removed_from(model, [(examples,), (others,)])
    (kept,) = report.kept
    assert kept[:3] == ("dead", "output", [0])
    assert kept.reason == "second reads them, and another layer computes them too"


def test_a_failed_removal_leaves_the_others():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.bad, self.good = Unseen(None, outputs=8), Between(nn.ReLU())

        def forward(self, inputs):
            return self.good(self.bad(inputs))

    model = Both()
    model.bad.second.weight.data[:, :2] = 0
    model.good.second.weight.data[:, :2] = 0
    report = removed_from(model, vectors())
    assert report.removed == {"good.first": [0, 1]}
    assert [(each.layer, each.channels) for each in report.kept] == [("bad.second", [0, 1])]


def test_rows_of_the_last_layer_and_shared_weights_stay():
    model = mlp()
    model.insert(2, nn.Linear(16, 16))
    model.insert(3, nn.Linear(16, 16))
    model[3].weight = model[2].weight
    model[2].weight.data[:, 0] = 0
    kill(model, 0, [0], "6")
    report = removed_from(model, vectors())
    shared = "2 shares its weight with another layer"
    assert report.removed == {}
    assert {(each.layer, each.side, each.reason) for each in report.kept} == {
        ("2", "input", shared),
        ("3", "input", shared),
        ("6", "output", "no layer reads them"),
    }


def test_channels_of_a_grouped_convolution_stay():
    layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1)]
    model = randomize(nn.Sequential(*layers))
    kill(model, 1, [0, 4], "2")
    kill(model, 0, [3], "0")
    report = removed_from(model, images())
    assert report.removed == {}
    reasons = {(each.layer, each.side): each.reason for each in report.kept}
    assert reasons["2", "input"] == reasons["0", "output"] == "1 is a grouped convolution"


def test_a_layer_keeps_one_channel():
    model = mlp()
    model[4].weight.data.zero_()
    report = removed_from(model, vectors())
    assert model[2].weight.shape[0] == 1 and model[0].weight.shape[0] == 16
    assert report.removed == {"2": list(range(1, 12))}
    (kept,) = (each for each in report.kept if each.side == "input")
    assert kept == KeptChannels("4", "input", [0], "4 must have at least one input")


def test_flags_modes_and_gradients_stay():
    model = mlp()
    kill(model, 1, [0], "2")
    model[0].requires_grad_(False)
    model[2].eval()
    modes = [layer.training for layer in model.modules()]
    removed_from(model, vectors())
    assert [layer.training for layer in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def parametrized():
    return nn.Sequential(nn.Linear(8, 8), nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)))


def overflowing():
    model = mlp()
    model[0].weight.data[0, 0] = torch.nan
    return model


X = torch.randn(2, 8)
ERRORS = {
    "model": (dict, X, TypeError, "model must be a torch.nn.Module, got dict"),
    "inputs": (mlp, None, TypeError, "example_inputs must hold a tensor, got NoneType"),
    "constants": (mlp, torch.zeros(2, 8), ValueError, "example_inputs must vary"),
    "computed": (parametrized, X, ValueError, "must hold 1.weight as a parameter"),
    "meta": (lambda: mlp().to("meta"), X, ValueError, "0.weight must have values"),
    "not finite": (overflowing, X, ValueError, "must have finite outputs for example_inputs"),
    "no layer": (nn.ReLU, X, ValueError, "depend on the weights of a Linear.* got a ReLU without"),
    "shape": (mlp, torch.randn(2, 9), RuntimeError, "shapes cannot be multiplied"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_arguments_raise_and_the_model_stays(case):
    make, inputs, error, message = ERRORS[case]
    model = make()
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    with pytest.raises(error, match=message):
        remove_dead_channels(model, inputs)
    if isinstance(model, nn.Module):
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
