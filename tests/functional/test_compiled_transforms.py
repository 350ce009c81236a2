"""torch.compile over transforms of torch.func: the same gradients as in eager mode."""

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner, pdp_mask, pdp_mask_channel, pdp_mask_nm

MASKS = {
    "unstructured": lambda w: pdp_mask(w, 0.5, relative_tau=0.5),
    "2:4": lambda w: pdp_mask_nm(w, 2, 4, relative_tau=0.5),
    "channel": lambda w: pdp_mask_channel(w, 0.5, relative_tau=0.5),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@pytest.fixture(params=MASKS)
def masked(request):
    return MASKS[request.param]


def loss_of(masked):
    return lambda w: (masked(w) * torch.linspace(-1, 2, 8)).square().sum()


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def test_grad(masked):
    weight = torch.randn(8, 8)
    function = torch.func.grad(loss_of(masked))
    expected = function(weight)
    assert (expected != 0).any()
    torch.testing.assert_close(compiled(function)(weight), expected)


def test_vmap_of_grad(masked):
    weights = torch.randn(3, 8, 8)
    function = torch.func.vmap(torch.func.grad(loss_of(masked)))
    torch.testing.assert_close(compiled(function)(weights), function(weights))


def test_backward_of_vmap(masked):
    weights = torch.randn(3, 8, 8, requires_grad=True)
    function = torch.func.vmap(masked)
    scale = torch.randn(3, 8, 8)
    own, eager = (
        torch.autograd.grad((each(weights) * scale).sum(), weights)[0]
        for each in (compiled(function), function)
    )
    torch.testing.assert_close(own, eager)


def test_vjp(masked):
    def pulled_back(weight, grad):
        w_hat, pull_back = torch.func.vjp(masked, weight)
        return w_hat, *pull_back(grad)

    arguments = torch.randn(8, 8), torch.randn(8, 8)
    torch.testing.assert_close(compiled(pulled_back)(*arguments), pulled_back(*arguments))


def test_jvp_is_an_error_and_not_zero(masked):
    def pushed_forward(weight):
        return torch.func.jvp(masked, (weight,), (torch.ones(8, 8),))[1]

    for function in (pushed_forward, torch.compile(pushed_forward, backend="aot_eager")):
        with pytest.raises(Exception, match=r"jvp|forward-mode"):
            function(torch.randn(8, 8))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "channel"])
def test_gradients_of_a_pruned_model(pattern):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    sparsity = None if pattern == "2:4" else 0.5
    PDPPruner(model, PDPConfig(sparsity, pattern=pattern, warmup=0, ramp=0))
    inputs = torch.randn(5, 8)

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (inputs,)).square().mean()

    gradients = torch.func.grad(loss)
    # As of parameters that require gradients, torch.compile would differentiate the gradients too.
    parameters = {name: weight.detach() for name, weight in model.named_parameters()}
    expected = gradients(parameters)
    assert all((grad != 0).any() for grad in expected.values())
    found = torch.compile(gradients, backend="aot_eager")(parameters)
    torch.testing.assert_close(found, expected)
