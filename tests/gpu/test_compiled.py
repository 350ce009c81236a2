"""What torch.compile makes, with CUDA graphs and autotuning, follows a schedule as eager code."""

import copy

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner, pdp_mask

pytestmark = pytest.mark.gpu

STEPS = 6  # CUDA graphs: one run to warm up, one to record, then replays


@pytest.fixture(autouse=True)
def as_users_compile(poisoned_memory):
    """Deterministic algorithms would turn autotuning off."""
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_layer_follows_weight_ratio_and_temperature(mode):
    def layer(inputs, weight, ratio, tau):
        return inputs @ pdp_mask(weight, ratio, tau=tau)

    compiled = torch.compile(layer, mode=mode, fullgraph=True)
    inputs, weight = (torch.randn(64, 64, device="cuda") for _ in range(2))
    weight.requires_grad_()
    ratio = torch.zeros((), dtype=torch.float64, device="cuda")
    tau = torch.zeros((), device="cuda")
    for step in range(STEPS):
        with torch.no_grad():
            weight.normal_()
        ratio.fill_(0.15 * step)
        tau.fill_(0.1 / (step + 1))
        torch.compiler.cudagraph_mark_step_begin()
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            found = compiled(inputs, weight, ratio, tau)
            (found_grad,) = torch.autograd.grad(found.square().sum(), weight)
        expected = layer(inputs, weight, ratio, tau)
        (grad,) = torch.autograd.grad(expected.square().sum(), weight)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found_grad, grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("pattern", ["unstructured", "channel", "2:4"])
def test_a_pruned_model_follows_its_schedule(pattern):
    options = {} if pattern == "2:4" else {"sparsity": 0.7}
    config = PDPConfig(**options, pattern=pattern, warmup=1, ramp=3, relative_tau=0.3)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).to("cuda")
    twin = copy.deepcopy(model)
    pruner, twins_pruner = PDPPruner(model, config), PDPPruner(twin, config)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for step in range(STEPS):
        inputs = torch.randn(8, 64, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        found, expected = compiled(inputs), twin(inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        grads = [
            torch.autograd.grad(outputs.square().sum(), list(each.parameters()))
            for outputs, each in ((found, model), (expected, twin))
        ]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)
        with torch.no_grad():
            for weights in zip(model.parameters(), twin.parameters(), grads[1], strict=True):
                for weight in weights[:2]:
                    weight -= 0.01 * weights[2]
        pruner.step(step)
        twins_pruner.step(step)
