"""Networks with dead channels, and what must hold when they are removed."""

import copy

import torch
from torch import nn

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


def call(model, inputs):
    """Return the first output of a model in evaluation mode."""
    with evaluated(model), torch.no_grad():
        outputs = run_model(model, inputs)
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


def assert_removal_keeps_the_outputs(remove, model, inputs, fresh):
    """Remove dead channels, check the outputs on other inputs too, and return the report."""
    before = [call(model, each) for each in (inputs, fresh)]
    original = copy.deepcopy(model)
    report = remove(model, inputs)
    for each, expected in zip((inputs, fresh), before, strict=True):
        torch.testing.assert_close(call(model, each), expected, rtol=1e-4, atol=1e-5)
    assert report.difference < 1e-4
    assert report.parameters_before == sum(p.numel() for p in original.parameters())
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert [*model.state_dict()] == [*original.state_dict()]
    return report
