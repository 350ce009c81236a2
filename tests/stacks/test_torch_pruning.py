"""Dead channels are removed where the outputs stay the same, and named where they would not."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from pdp_kernels import PDPConfig, PDPPruner
from tests.support.channels import assert_removal_keeps_the_outputs, call, randomize

pytest.importorskip("torch_pruning")

from pdp_kernels.integrations.torch_pruning import KeptChannels, remove_dead_channels


def mlp():
    torch.manual_seed(0)
    return randomize(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))
    )


def images(channels=3, size=8):
    return [(torch.randn(2, channels, size, size),), (torch.randn(3, channels, size, size),)]


def vectors(features=8):
    return [(torch.randn(5, features),), (torch.randn(7, features),)]


def removed_from(model, inputs):
    return assert_removal_keeps_the_outputs(remove_dead_channels, model, *inputs)


def weights_of(model, dim, channels, *layers):
    for layer in layers:
        model.get_submodule(layer).weight.data.index_fill_(dim, torch.tensor(channels), 0)


def test_dead_inputs_of_a_linear_layer_are_removed_with_the_units_that_compute_them():
    model = mlp()
    weights_of(model, 1, [0, 3, 9], "2")
    report = removed_from(model, vectors())
    assert report.removed == {"0": [0, 3, 9]} and report.kept == []
    assert [tuple(model[i].weight.shape) for i in (0, 2, 4)] == [(13, 8), (12, 13), (4, 12)]
    assert report.parameters_before - report.parameters_after == 3 * (8 + 1) + 3 * 12
    assert report.macs_before == 5 * (8 * 16 + 16 * 12 + 12 * 4)
    assert report.macs_after == 5 * (8 * 13 + 13 * 12 + 12 * 4)


def test_dead_outputs_are_removed_only_where_they_are_zero():
    model = mlp()
    weights_of(model, 0, [1, 2, 3], "0")
    model[0].bias.data[[1, 2, 3]] = torch.tensor([0.0, -1.0, 1.0])  # the ReLU makes 0 of -1
    report = removed_from(model, vectors())
    assert report.removed == {"0": [1, 2]}
    (kept,) = report.kept
    assert kept == KeptChannels("0", "output", [1], kept.reason)  # formerly 3
    assert kept.reason == "2 reads the constant that they are, by a bias or a norm"
    assert model[0].bias[1] == 1


def test_a_removal_that_makes_others_dead_goes_on():
    model = mlp()
    weights_of(model, 1, [5], "4")
    model[2].weight.data[:, 7] = 0
    model[2].weight.data[5, 7] = 1  # unit 7 is read by the dead unit 5 alone
    report = removed_from(model, vectors())
    assert report.removed == {"2": [5], "0": [7]}


def test_a_layer_keeps_one_channel():
    model = mlp()
    model[4].weight.data.zero_()
    report = removed_from(model, vectors())
    assert model[2].weight.shape[0] == 1 and model[0].weight.shape[0] == 16
    assert report.removed == {"2": list(range(1, 12))}
    (kept,) = (each for each in report.kept if each.side == "input")
    assert kept == KeptChannels("4", "input", [0], "4 must have at least one input")


def conv_net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 6, 3, padding=1), nn.PReLU(6), nn.Flatten(), nn.Linear(6 * 16, 5)]
    return randomize(nn.Sequential(*layers))


def test_dead_inputs_behind_a_batch_norm_are_removed_with_it():
    model = conv_net()
    weights_of(model, 1, [0, 7], "4")
    report = removed_from(model, images())
    assert report.removed == {"0": [0, 7]}
    assert model[1].num_features == 6 and model[1].running_mean.shape == (6,)


def test_dead_outputs_before_a_batch_norm_stay_where_it_gives_a_constant_that_matters():
    model = conv_net()
    weights_of(model, 0, [0, 1, 2, 3], "0")
    scale = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    constant = (model[0].bias - model[1].running_mean) * scale + model[1].bias
    matter = [channel for channel in range(4) if constant[channel] > 0]
    assert 0 < len(matter) < 4
    report = removed_from(model, images())
    assert report.removed == {"0": [channel for channel in range(4) if channel not in matter]}
    assert [(each.layer, len(each.channels)) for each in report.kept] == [("0", len(matter))]


def test_a_channel_before_a_flatten_is_removed_if_no_pixel_is_read():
    model = conv_net()
    columns = model[7].weight.data.view(5, 6, 16)
    columns[:, 2] = 0
    columns[:, 4, :15] = 0
    report = removed_from(model, images())
    assert report.removed == {"4": [2]} and model[5].num_parameters == 5
    assert model[7].in_features == 80


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.block = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head, self.other = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)
        randomize(self)

    def forward(self, inputs):
        hidden = self.norm(self.stem(inputs)).relu()
        return self.head(hidden + self.block(hidden)) + self.other(hidden)


def test_coupled_channels_are_removed_where_all_layers_agree():
    model = Residual()
    weights_of(model, 0, [0, 1], "block")  # 0 and 1 come from the stem too
    weights_of(model, 1, [2, 3], "head", "other")
    weights_of(model, 1, [2], "block")
    weights_of(model, 1, [4], "head")  # the block and the other head read 4
    report = removed_from(model, images())
    assert report.removed == {"stem": [2], "block": [2]}
    kept = {(each.layer, each.side): each for each in report.kept}
    assert kept["block", "output"].channels == [0, 1]
    assert "another layer computes them too" in kept["block", "output"].reason
    assert kept["head", "input"].channels == [2, 3]


def test_channels_are_removed_with_those_of_a_depthwise_convolution():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()]
    model = randomize(nn.Sequential(*layers, nn.Conv2d(8, 4, 1)))
    weights_of(model, 1, [0], "4")
    weights_of(model, 0, [1, 2, 3], "2")
    model[2].bias.data[:4] = torch.tensor([1.0, 0.0, -1.0, 1.0])
    report = removed_from(model, images())
    assert report.removed == {"0": [0, 1, 2], "2": [0, 1, 2]}
    assert model[2].groups == 5 and model[2].weight.shape == (5, 1, 3, 3)
    assert [(each.layer, each.channels) for each in report.kept] == [("2", [0])]


def test_channels_of_a_grouped_convolution_stay():
    layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1)]
    model = randomize(nn.Sequential(*layers))
    weights_of(model, 1, [0, 4], "2")
    weights_of(model, 0, [3], "0")
    report = removed_from(model, images())
    assert report.removed == {}
    reasons = {(each.layer, each.side): each.reason for each in report.kept}
    assert reasons["2", "input"] == reasons["0", "output"] == "1 is a grouped convolution"


def test_transposed_convolutions_and_concatenations():
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.down, self.up = nn.Conv2d(3, 6, 2, 2), nn.ConvTranspose2d(6, 8, 2, 2)
            self.skip, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(12, 2, 1)
            randomize(self)

        def forward(self, inputs):
            up = self.up(self.down(inputs).relu())
            return self.head(torch.cat([self.skip(inputs), up], 1).relu())

    model = UNet()
    weights_of(model, 1, [1, 4, 11], "head")
    weights_of(model, 0, [5], "up")  # an input
    report = removed_from(model, images())
    assert report.removed == {"skip": [1], "up": [0, 7], "down": [5]}
    assert model.up.weight.shape == (5, 6, 2, 2)


def test_a_gated_unit_is_removed_from_both_halves():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.gate, self.up, self.down = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)

        def forward(self, inputs):
            return self.down(functional.silu(self.gate(inputs)) * self.up(inputs))

    model = Gated()
    weights_of(model, 1, [2, 5], "down")
    report = removed_from(model, vectors())
    assert report.removed == {"gate": [2, 5], "up": [2, 5]}


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


class WithInputs(Between):
    def forward(self, inputs):
        return self.second((self.first(inputs) + inputs).relu())


class Unseen(Between):
    """Torch-Pruning does not know that the function changes the order of the channels."""

    def forward(self, inputs):
        return self.second(self.first(inputs).flip(-1))


STAY = {
    "layer norm": (lambda: Between(nn.LayerNorm(6)), "function computes with several"),
    "rms norm": (lambda: Between(nn.RMSNorm(6)), "coupled with function.weight"),
    "softmax": (lambda: Between(nn.Softmax(-1)), "SoftmaxBackward0 computes with several"),
    "mean": (lambda: Between(lambda x: x - x.mean(-1, keepdim=True)), "outputs .* would change by"),
    "an output": (lambda: Returned(nn.ReLU()), r"an output of shape \(5, 6\) would have \(5, 4\)"),
    "the inputs": (lambda: WithInputs(None, 8), "they are coupled with inputs of the model"),
    "order": (lambda: Unseen(None), "the outputs of the model would change by"),
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
    weights_of(model, 0, [0], "6")
    report = removed_from(model, vectors())
    shared = "2 shares its weight with another layer"
    assert report.removed == {}
    assert {(each.layer, each.side, each.reason) for each in report.kept} == {
        ("2", "input", shared),
        ("3", "input", shared),
        ("6", "output", "no layer reads them"),
    }


def test_flags_modes_and_gradients_stay():
    model = mlp()
    weights_of(model, 1, [0], "2")
    model[0].requires_grad_(False)
    model[2].eval()
    modes = [layer.training for layer in model.modules()]
    removed_from(model, vectors())
    assert [layer.training for layer in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_the_smaller_model_trains_saves_and_loads(tmp_path):
    pruned = mlp()
    weights_of(pruned, 1, [0, 3], "2")
    model, again = copy.deepcopy(pruned), copy.deepcopy(pruned)
    (inputs,), _ = vectors()
    remove_dead_channels(model, inputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = model(inputs).square().mean().item()
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * before
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    remove_dead_channels(again, torch.randn(2, 8))
    again.load_state_dict(torch.load(tmp_path / "weights.pt"))
    torch.save(model, tmp_path / "model.pt")
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    exported = torch.export.export(model.eval(), (inputs,)).module()
    for other in (again, whole, exported):
        assert torch.equal(other(inputs), model(inputs))


def test_the_report_is_text_and_plain_data():
    model = mlp()
    weights_of(model, 1, [0], "2")
    weights_of(model, 0, [0], "4")
    report = remove_dead_channels(model, torch.randn(2, 8))
    assert str(report).splitlines() == [
        "0: 1 outputs removed",
        "4: 1 dead outputs stay, no layer reads them",
        f"parameters: {report.parameters_after:,} of {report.parameters_before:,}",
        f"multiply-accumulates: {report.macs_after:,} of {report.macs_before:,}",
    ]
    assert json.loads(json.dumps(report.as_dict()))["kept"][0]["channels"] == [0]


def test_a_model_in_half_precision():
    model = mlp().bfloat16()
    weights_of(model, 1, [0, 3], "2")
    inputs = torch.randn(4, 8, dtype=torch.bfloat16)
    before = call(model, (inputs,))
    assert remove_dead_channels(model, inputs).removed == {"0": [0, 3]}
    torch.testing.assert_close(call(model, (inputs,)), before)


def test_pruning_by_channels_ends_in_a_smaller_model():
    model = mlp()
    config = PDPConfig(0.5, scope="layer", pattern="channel", channel_dim="input", warmup=0, ramp=0)
    pruner = PDPPruner(model, PDPConfig(**{**vars(config), "exclude": ["0"]}))
    with pytest.raises(ValueError, match=r"masks of a pruner, got them on 2, 4: finalize"):
        remove_dead_channels(model, torch.randn(2, 8))
    copied = pruner.pruned_copy()
    pruner.finalize()
    for pruned in (model, copied):
        removed_from(pruned, vectors())
        assert [pruned[i].weight.shape[0] for i in (0, 2, 4)] == [8, 6, 4]


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
