"""Pruning at once: what a pruner would prune, in plain weights, or a clear error."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pdp_kernels import (
    PDPConfig,
    PDPPruner,
    freeze_zeros,
    hard_mask,
    prune_one_shot,
)
from tests.support.activations import normal
from tests.support.models import AT_ONCE, mlp
from tests.support.ranks import BACKENDS, device_of, results_on_ranks
from tests.support.sharded import global_tensor
from tests.support.sharded_training import fully_sharded, mesh_of, network, tensor_parallel

CONFIGS = {
    "global": {"sparsity": 0.8},
    "layer": {"sparsity": 0.7, "scope": "layer"},
    "by layer": {"sparsity": {"0": 0.5, "*": 0.9}, "scope": "layer"},
    "LAMP": {"sparsity": 0.8, "allocation": "lamp"},
    "N:M": {"pattern": "2:4"},
    "channel": {"sparsity": 0.5, "pattern": "channel"},
    "mixed": {
        "sparsity": 0.6,
        "exclude": ["4"],
        "overrides": {"2": {"pattern": "1:4"}, "0": {"sparsity": 0.25}},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_magnitude_prunes_what_finalize_prunes(name, dtype):
    model = mlp(dtype)
    config = PDPConfig(**CONFIGS[name], **AT_ONCE)
    finalized = copy.deepcopy(model)
    pruner = PDPPruner(finalized, config)
    pruner.finalize()
    report = prune_one_shot(model, config)
    for value, other in zip(model.parameters(), finalized.parameters(), strict=True):
        assert torch.equal(value, other)
    assert report.layers == [layer._replace(flipped=None) for layer in pruner.report().layers]


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64, Fraction])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_any_real_number_is_a_sparsity(number, scope):
    model = nn.Linear(700, 1001, bias=False)
    expected = int((~hard_mask(model.weight, number(0.9))).sum())
    assert prune_one_shot(model, PDPConfig(number(0.9), scope=scope)).pruned == expected
    assert prune_one_shot(model, number(0.9)).pruned == expected


@pytest.mark.parametrize("name", ["global", "layer", "LAMP"])
def test_wanda_prunes_as_many_weights_of_each_layer_as_magnitude(name):
    model, config = mlp(), PDPConfig(**CONFIGS[name])
    counts = [layer.pruned for layer in prune_one_shot(copy.deepcopy(model), config).layers]
    report = prune_one_shot(model, config, method="wanda", calibration=[normal(16, 24)])
    assert [layer.pruned for layer in report.layers] == counts
    for layer in (model[0], model[2], model[4]):
        zeros = (layer.weight == 0).sum(1)
        assert zeros.max() - zeros.min() <= 1


def test_batches_are_run_as_forward_says():
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.load_state_dict(model.state_dict())
    inputs, labels = normal(3, 4), torch.zeros(3)
    batches = [[inputs, labels]]
    prune_one_shot(model, 0.5, method="wanda", calibration=[{"input": inputs}])
    prune_one_shot(
        other, 0.5, method="wanda", calibration=batches, forward=lambda net, batch: net(batch[0])
    )
    assert torch.equal(model.weight, other.weight)


def test_parameters_hooks_and_modes_stay():
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[2].eval()
    parameters, modes = list(model.parameters()), [layer.training for layer in model.modules()]
    prune_one_shot(model, 0.5, method="wanda", calibration=[normal(3, 24)])
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [layer.training for layer in model.modules()] == modes
    assert not model[0].weight.requires_grad and model[2].weight.requires_grad
    assert not any(layer._forward_hooks for layer in model.modules())


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_pruner_goes_on_with_the_same_zeros(method, scope):
    model = mlp()
    config = PDPConfig(0.75, scope=scope, max_layer_sparsity=1.0, **AT_ONCE)
    given = {"calibration": [normal(16, 24)]} if method == "wanda" else {}
    prune_one_shot(model, config, method=method, **given)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = PDPPruner(model, config)
    outputs = model.eval()(normal(4, 24))
    pruner.finalize()
    assert torch.equal(model(normal(4, 24)), outputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_its_zeros_are_kept_in_training():
    model = mlp()
    report = prune_one_shot(model, 0.5, method="wanda", calibration=[normal(16, 24)])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    weights = [model.get_parameter(layer.name) for layer in report.layers]
    zeros = [weight == 0 for weight in weights]
    freeze_zeros(weights, optimizer)
    for _ in range(3):
        model(normal(4, 24)).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(w == 0, z) for w, z in zip(weights, zeros, strict=True))


def sharded_weights(rank, ranks, how):
    model = network(device_of(rank))
    mesh = mesh_of(rank, (ranks,))
    model = fully_sharded(model, mesh) if how == "FSDP" else tensor_parallel(model, mesh)
    inputs = torch.ones(2, 20, device=device_of(rank))
    with pytest.raises(TypeError, match=r"0\.weight must be a plain tensor, got a DTensor"):
        prune_one_shot(model, 0.7, method="wanda", calibration=[inputs])
    model(inputs)
    report = prune_one_shot(model, PDPConfig(0.7))
    return [global_tensor(value.detach()) for value in model.parameters()], report.layers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["FSDP", "tensor parallelism"])
def test_magnitude_prunes_the_global_weights_of_a_sharded_model(how, backend):
    model = network(device="cuda" if backend == "nccl" else "cpu")
    report = prune_one_shot(model, 0.7)
    for weights, layers in results_on_ranks(sharded_weights, 2, 2, how, backend=backend):
        assert layers == report.layers
        for weight, other in zip(weights, model.parameters(), strict=True):
            assert torch.equal(weight, other.detach().cpu())


def masked():
    model = mlp()
    PDPPruner(model, PDPConfig(0.5))
    return model


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.first, self.second = nn.Linear(24, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs):
        return functional.linear(self.used(inputs), self.first.weight)


GOOD, BAD = torch.ones(2, 24), torch.full((2, 24), torch.inf)
WANDA = {"method": "wanda", "calibration": [GOOD]}
ERRORS = {
    "tensor": (mlp, torch.tensor(0.5), {}, TypeError, "a sparsity or a PDPConfig, got Tensor"),
    "config": (mlp, "0.5", {}, TypeError, "a sparsity or a PDPConfig, got str"),
    "bool": (mlp, True, {}, TypeError, "a sparsity or a PDPConfig, got bool"),
    "sparsity": (mlp, 1.5, {}, ValueError, r"sparsity must be in \[0, 1\], got 1\.5"),
    "method": (mlp, 0.5, {"method": "obs"}, ValueError, "method must be 'magnitude' or 'wanda'"),
    "model": (dict, 0.5, {}, TypeError, "model must be a torch.nn.Module, got dict"),
    "nothing": (nn.ReLU, 0.5, {}, ValueError, "must have a weight that the configuration prunes"),
    "masks": (masked, 0.5, {}, ValueError, r"masks of a pruner, got them on 0, 2, 4: finalize"),
    "meta": (lambda: mlp(device="meta"), 0.5, {}, ValueError, "got .*0.weight.* on the meta"),
    "needless": (mlp, 0.5, {"calibration": []}, ValueError, "calibration must be left out"),
    "forward": (mlp, 0.5, {"forward": print}, ValueError, "forward must be left out"),
    "missing": (mlp, 0.5, {"method": "wanda"}, ValueError, "calibration must be given"),
    "a tensor": (mlp, 0.5, WANDA | {"calibration": GOOD}, TypeError, "a list of one, got a Tensor"),
    "a number": (
        mlp,
        0.5,
        WANDA | {"calibration": 3},
        TypeError,
        "iterable of batches.* got a int",
    ),
    "no batch": (mlp, 0.5, WANDA | {"calibration": []}, ValueError, "at least one batch, got none"),
    "no call": (mlp, 0.5, WANDA | {"forward": 3}, TypeError, "forward must be callable, got int"),
    "infinite": (
        mlp,
        0.5,
        WANDA | {"calibration": [GOOD, BAD]},
        ValueError,
        r"whose norms are finite.* got NaN or inf for \['0.weight', '2.weight', '4.weight'\]",
    ),
    "no vectors": (
        mlp,
        0.5,
        WANDA | {"calibration": [GOOD[:0]]},
        ValueError,
        r"must reach every weight to prune, got no inputs for \['0.weight', '2.weight',",
    ),
    "unused": (
        Unused,
        0.5,
        WANDA,
        ValueError,
        r"no inputs for \['first.weight', 'second.weight'\]",
    ),
    "channel": (
        mlp,
        PDPConfig(0.5, pattern="channel"),
        WANDA,
        ValueError,
        'scores of single weights, got pattern "channel" for 0.weight',
    ),
    "layer": (
        lambda: nn.Sequential(mlp(), nn.Bilinear(2, 3, 4)),
        PDPConfig(0.5, include=["1"]),
        WANDA,
        ValueError,
        "got 1.weight of a Bilinear: exclude them",
    ),
    "forward fails": (mlp, 0.5, WANDA | {"calibration": [GOOD, "text"]}, TypeError, "str"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_arguments_raise_and_the_model_stays(case):
    make, config, arguments, error, message = ERRORS[case]
    model = make()
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        prune_one_shot(model, config, **arguments)
    if isinstance(model, nn.Module):
        assert not any(layer._forward_hooks for layer in model.modules())
        for value, other in zip(model.parameters(), before.parameters(), strict=True):
            assert value.is_meta or torch.equal(value, other)
