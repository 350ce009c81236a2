"""A captured training or evaluation step of a pruned model follows PDPPruner's schedule."""

import itertools

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner
from tests.gpu.operations import captured

pytestmark = pytest.mark.gpu

PATTERNS = {
    "unstructured": {"sparsity": 0.9},
    "channel": {"sparsity": 0.5, "pattern": "channel"},
    "1:8": {"pattern": "1:8", "ramp_shape": "linear"},  # another count at each step
}
SCHEDULE = (0, 1, 2, 3, 4)


def pruned_network(pattern):
    model = nn.Sequential(*[nn.Linear(64, 64, device="cuda") for _ in range(2)])
    options = {"warmup": 0, "ramp": 4, "relative_tau": 0.3} | PATTERNS[pattern]
    return model, PDPPruner(model, PDPConfig(**options)), torch.randn(8, 64, device="cuda")


def training_step(model, inputs):
    outputs = model(inputs)
    return outputs, *torch.autograd.grad(outputs.square().sum(), list(model.parameters()))


def assert_follows(graph, results, step):
    """Matrix products may be another kernel's in a graph, masks may not."""
    graph.replay()
    torch.testing.assert_close(results, step())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_follows_the_schedule(pattern):
    model, pruner, inputs = pruned_network(pattern)
    graph, results = captured(lambda: training_step(model, inputs))
    outputs = []
    for progress in SCHEDULE:
        pruner.step(progress)
        assert_follows(graph, results, lambda: training_step(model, inputs))
        outputs.append(results[0].clone())
    assert not any(torch.equal(*pair) for pair in itertools.pairwise(outputs))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_evaluation_follows_the_schedule(pattern):
    model, pruner, inputs = pruned_network(pattern)
    model.eval().requires_grad_(False)
    graph, outputs = captured(lambda: model(inputs))
    for progress in SCHEDULE:
        pruner.step(progress)
        assert_follows(graph, outputs, lambda: model(inputs))
