"""Attaching a pruner to an optimizer works in every stack, or raises."""

import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch

from pdp_kernels import PDPConfig, PDPPruner
from tests.support.models import CONFIG, small_model


def attached(steps_per_epoch=2):
    model = small_model()
    pruner = PDPPruner(model, CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return pruner, optimizer, pruner.attach(optimizer, steps_per_epoch)


def step(optimizer):
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.ones_like(weight)
    optimizer.step()


def test_finalize_detaches_the_pruner():
    pruner, optimizer, _ = attached()
    step(optimizer)
    assert pruner.progress == 0.5
    pruner.step(4.0)
    pruner.finalize()
    frozen = pruner.freeze(optimizer)
    step(optimizer)
    frozen.remove()


def test_attaching_twice_raises_until_the_first_handle_is_removed():
    pruner, optimizer, handle = attached()
    with pytest.raises(RuntimeError, match="attached already"):
        pruner.attach(optimizer, 2)
    handle.remove()
    pruner.attach(optimizer, 2)
    step(optimizer)
    assert pruner.progress == 0.5


def test_a_copied_pruner_is_not_attached():
    pruner, optimizer, _ = attached()
    other = pickle.loads(pickle.dumps(pruner))
    step(optimizer)
    assert (pruner.progress, other.progress) == (0.5, 0.0)
    other.attach(torch.optim.SGD(other.model.parameters(), lr=0.1), 2)


def test_an_optimizer_of_other_weights_raises():
    pruner = PDPPruner(small_model(), CONFIG)
    with pytest.raises(ValueError, match=r"such as 0\.weight, got a SGD without any"):
        pruner.attach(torch.optim.SGD(small_model().parameters(), lr=0.1), 2)


class Wrapper(torch.optim.Optimizer):
    """An optimizer that wraps another, as accelerate's does: without torch's own attributes."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self):
        self.optimizer.step()


def test_a_wrapped_optimizer_is_unwrapped():
    model = small_model()
    pruner = PDPPruner(model, CONFIG)
    optimizer = Wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    pruner.attach(optimizer, 2)
    step(optimizer)
    assert pruner.progress == 0.5
    pruner.step(4.0)
    pruner.finalize()
    pruner.freeze(optimizer)
    step(optimizer)
    assert (model[0].weight == 0).any()


def test_an_optimizer_without_hooks_is_refused_and_goes_on():
    from torch.distributed.optim import PostLocalSGDOptimizer  # compiles scripts, not on fake GPUs

    model = small_model()
    pruner = PDPPruner(model, CONFIG)
    averager = SimpleNamespace(average_parameters=lambda params: None)
    optimizer = PostLocalSGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), averager)
    with pytest.raises(TypeError, match="a PostLocalSGDOptimizer, which leaves out"):
        pruner.attach(optimizer, 2)
    before = model[0].weight.detach().clone()
    step(optimizer)
    assert not torch.equal(model[0].weight, before)


def test_a_schedule_longer_than_the_training_warns():
    model = small_model()
    pruner = PDPPruner(model, PDPConfig.paper(0.8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(
        UserWarning, match="of 5 epochs ends before the ramp.*with 0% of the sparsity"
    ):
        pruner.attach(optimizer, 10, epochs=5).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.attach(optimizer, 10, epochs=100)


def test_a_pruner_of_frozen_weights_steps_with_an_optimizer_of_others():
    model = small_model()
    model[0].requires_grad_(False)
    pruner = PDPPruner(model, PDPConfig(0.8, warmup=0, ramp=1, include=["0"]))
    with pytest.raises(ValueError, match="must have a weight of the model, got a SGD"):
        pruner.attach(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1), 2)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    pruner.attach(optimizer, steps_per_epoch=2)
    before = model[0].weight.detach().clone()
    for _ in range(2):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    assert pruner.progress == 1
    pruner.finalize()
    assert torch.equal(model[0].weight, before * (model[0].weight != 0))
    pruner.freeze(optimizer).remove()
