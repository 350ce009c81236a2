"""Dead channels are removed from all layers that compute or read them; the outputs stay."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from pdp_kernels import PDPConfig, PDPPruner

pytest.importorskip("torch_pruning")

from pdp_kernels.integrations.torch_pruning import KeptChannels, remove_dead_channels
from tests.support.channels import call, images, kill, mlp, randomize, removed_from, vectors


def test_dead_inputs_of_a_linear_layer_are_removed_with_the_units_that_compute_them():
    model = mlp()
    kill(model, 1, [0, 3, 9], "2")
    report = removed_from(model, vectors())
    assert report.removed == {"0": [0, 3, 9]} and report.kept == []
    assert [tuple(model[i].weight.shape) for i in (0, 2, 4)] == [(13, 8), (12, 13), (4, 12)]
    assert report.parameters_before - report.parameters_after == 3 * (8 + 1) + 3 * 12
    assert report.macs_before == 5 * (8 * 16 + 16 * 12 + 12 * 4)
    assert report.macs_after == 5 * (8 * 13 + 13 * 12 + 12 * 4)


def test_dead_outputs_are_removed_only_where_they_are_zero():
    model = mlp()
    kill(model, 0, [1, 2, 3], "0")
    model[0].bias.data[[1, 2, 3]] = torch.tensor([0.0, -1.0, 1.0])  # the ReLU makes 0 of -1
    report = removed_from(model, vectors())
    assert report.removed == {"0": [1, 2]}
    (kept,) = report.kept
    assert kept == KeptChannels("0", "output", [1], kept.reason)  # formerly 3
    assert kept.reason == "2 reads the constant that they are, by a bias or a norm"
    assert model[0].bias[1] == 1


def test_a_removal_that_makes_others_dead_goes_on():
    model = mlp()
    kill(model, 1, [5], "4")
    model[2].weight.data[:, 7] = 0
    model[2].weight.data[5, 7] = 1  # unit 7 is read by the dead unit 5 alone
    report = removed_from(model, vectors())
    assert report.removed == {"2": [5], "0": [7]}


def test_the_default_device_need_not_be_that_of_the_model():
    model, inputs = mlp(), torch.randn(5, 8)
    kill(model, 1, [0, 3, 9], "2")
    with torch.device("meta"):
        report = remove_dead_channels(model, inputs)
    assert report.removed == {"0": [0, 3, 9]}


def conv_net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 6, 3, padding=1), nn.PReLU(6), nn.Flatten(), nn.Linear(6 * 16, 5)]
    return randomize(nn.Sequential(*layers))


def test_dead_inputs_behind_a_batch_norm_are_removed_with_it():
    model = conv_net()
    kill(model, 1, [0, 7], "4")
    report = removed_from(model, images())
    assert report.removed == {"0": [0, 7]}
    assert model[1].num_features == 6 and model[1].running_mean.shape == (6,)


def test_dead_outputs_before_a_batch_norm_stay_where_it_gives_a_constant_that_matters():
    model = conv_net()
    kill(model, 0, [0, 1, 2, 3], "0")
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
    kill(model, 0, [0, 1], "block")  # 0 and 1 come from the stem too
    kill(model, 1, [2, 3], "head", "other")
    kill(model, 1, [2], "block")
    kill(model, 1, [4], "head")  # the block and the other head read 4
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
    kill(model, 1, [0], "4")
    kill(model, 0, [1, 2, 3], "2")
    model[2].bias.data[:4] = torch.tensor([1.0, 0.0, -1.0, 1.0])
    report = removed_from(model, images())
    assert report.removed == {"0": [0, 1, 2], "2": [0, 1, 2]}
    assert model[2].groups == 5 and model[2].weight.shape == (5, 1, 3, 3)
    assert [(each.layer, each.channels) for each in report.kept] == [("2", [0])]


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
    kill(model, 1, [1, 4, 11], "head")
    kill(model, 0, [5], "up")  # an input
    report = removed_from(model, images())
    assert report.removed == {"skip": [1], "up": [0, 7], "down": [5]}
    assert model.up.weight.shape == (5, 6, 2, 2)


ALONE = {
    "exponential": lambda x: x.exp(),
    "softplus": lambda x: functional.softplus(x).log(),
    "GELU": functional.gelu,
    "maximum of pixels": lambda x: x - x.amax((2, 3), keepdim=True),
    "square": lambda x: x.square() * x.square(),
}


@pytest.mark.parametrize("case", ALONE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_functions_of_one_channel_do_not_matter(case, dtype):
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, inputs):
            return self.second(ALONE[case](self.first(inputs)))

    model = Between().to(dtype)
    kill(model, 1, [2, 5], "second")
    report = remove_dead_channels(model, torch.randn(2, 3, 8, 8, dtype=dtype))
    assert report.removed == {"first": [2, 5]} and report.kept == []


def test_a_gated_unit_is_removed_from_both_halves():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.gate, self.up, self.down = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)

        def forward(self, inputs):
            return self.down(functional.silu(self.gate(inputs)) * self.up(inputs))

    model = Gated()
    kill(model, 1, [2, 5], "down")
    report = removed_from(model, vectors())
    assert report.removed == {"gate": [2, 5], "up": [2, 5]}


def test_the_smaller_model_trains_saves_and_loads(tmp_path):
    pruned = mlp()
    kill(pruned, 1, [0, 3], "2")
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
    kill(model, 1, [0], "2")
    kill(model, 0, [0], "4")
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
    kill(model, 1, [0, 3], "2")
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
