"""Networks with dead channels, and what must hold when they are removed."""

import copy

import torch
from torch import nn

from pdp_kernels.integrations.torch_pruning import remove_dead_channels
from pdp_kernels.pruning.evaluation import evaluated, run_model


def randomize(model, seed=0):
    """Give batch norms and biases the values of a trained network, and return the model."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(layer.weight, 0.5, 2, generator=generator)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, generator=generator)
    return model


def mlp():
    torch.manual_seed(0)
    return randomize(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))
    )


def images(channels=3, size=8):
    """Return example inputs, and others."""
    return [(torch.randn(2, channels, size, size),), (torch.randn(3, channels, size, size),)]


def vectors(features=8):
    return [(torch.randn(5, features),), (torch.randn(7, features),)]


def kill(model, dim, channels, *layers):
    """Set these outputs (dim 0) or inputs (dim 1) of layers to zero."""
    for layer in layers:
        model.get_submodule(layer).weight.data.index_fill_(dim, torch.tensor(channels), 0)


def call(model, inputs):
    """Return the first output of a model in evaluation mode."""
    with evaluated(model), torch.no_grad():
        outputs = run_model(model, inputs)
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


def removed_from(model, inputs):
    """Remove dead channels, check the outputs on the second inputs too, and return the report."""
    before = [call(model, each) for each in inputs]
    original = copy.deepcopy(model)
    report = remove_dead_channels(model, inputs[0])
    for each, expected in zip(inputs, before, strict=True):
        torch.testing.assert_close(call(model, each), expected, rtol=1e-4, atol=1e-5)
    assert report.difference < 1e-4
    assert report.parameters_before == sum(p.numel() for p in original.parameters())
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert [*model.state_dict()] == [*original.state_dict()]
    return report
