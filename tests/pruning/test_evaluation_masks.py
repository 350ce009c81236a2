"""In evaluation mode a layer has exact zeros where the hard mask of its current weight prunes."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.utils import vector_to_parameters

from pdp_kernels import PDPConfig, PDPPruner, hard_mask, hard_mask_channel, hard_mask_nm
from tests.support.models import AT_ONCE

KEPT = {
    "unstructured": lambda weight: hard_mask(weight, 0.5),
    "2:4": lambda weight: hard_mask_nm(weight, 2, 4, dim=1),
    "channel": lambda weight: hard_mask_channel(weight, 0.5, dim=0)[:, None],
}


class WeightItself(nn.Linear):
    """A Linear layer whose output is the weight that it computes with."""

    def forward(self, inputs=None):
        return self.weight


def evaluated(pattern="unstructured", dtype=torch.float32):
    """Return a layer in evaluation mode, half of which is pruned, and its weight."""
    torch.manual_seed(0)
    layer = WeightItself(32, 16, bias=False, dtype=dtype)
    sparsity = {} if pattern == "2:4" else {"sparsity": 0.5}
    PDPPruner(layer, PDPConfig(**sparsity, pattern=pattern, **AT_ONCE))
    return layer.eval(), layer._parameters["weight"]


def masked(weight, pattern="unstructured"):
    weight = weight.detach()
    return torch.where(KEPT[pattern](weight), weight, 0)


def bits(weight):
    return weight.detach().contiguous().view(torch.uint8)


@pytest.mark.parametrize("pattern", KEPT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("grad", [False, True])
def test_zeros_are_exact_and_all_else_is_the_weight(pattern, dtype, grad):
    layer, weight = evaluated(pattern, dtype)
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, -math.inf, 0.0])
    weight.data[: 3 if pattern == "channel" else 1, : len(special)] = special.to(dtype)
    with torch.set_grad_enabled(grad):
        w_hat = layer()
    assert torch.equal(bits(w_hat), bits(masked(weight, pattern)))
    assert not torch.equal(bits(w_hat), bits(weight))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pattern", ["unstructured", "channel"])
def test_the_masked_weight_has_the_layout_of_the_weight(layout, pattern):
    conv = nn.Conv2d(8, 16, 3).to(memory_format=layout)
    PDPPruner(conv, PDPConfig(0.5, pattern=pattern, **AT_ONCE))
    weight, inputs = conv._parameters["weight"].detach(), torch.randn(2, 8, 6, 6)
    kept = KEPT[pattern](weight)
    w_hat = torch.where(kept.view(-1, 1, 1, 1) if pattern == "channel" else kept, weight, 0)
    with torch.no_grad():
        w_shown = conv.pdp_masks["weight"].hard(weight)
        assert torch.equal(conv.eval()(inputs), functional.conv2d(inputs, w_hat, conv.bias))
    assert w_shown.stride() == weight.stride()


def fused_step(weight):
    weight.grad = torch.randn_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()


def write_data(weight):
    weight.data.mul_(0.5).add_(torch.randn_like(weight), alpha=0.5)


def replace_data(weight):
    weight.data = torch.randn_like(weight)


def write_vector(weight):
    vector_to_parameters(torch.randn(weight.numel()), [weight])


def write_array(weight):
    weight.detach().numpy()[:] = torch.randn_like(weight).numpy()


# None of these raises the version of the weight, so a mask kept by version would be an old one.
@pytest.mark.parametrize("write", [fused_step, write_data, replace_data, write_vector, write_array])
@torch.no_grad()
def test_each_forward_masks_the_weight_as_it_is(write):
    layer, weight = evaluated()
    before, version = layer(), weight._version
    write(weight)
    assert weight._version == version
    assert torch.equal(layer(), masked(weight))
    assert not torch.equal(layer() != 0, before != 0)


def test_gradients_in_evaluation_mode_pass_where_weights_are_kept():
    layer, weight = evaluated()
    grad = torch.randn_like(weight)
    layer().backward(grad)
    assert torch.equal(weight.grad, torch.where(hard_mask(weight, 0.5), grad, 0))


@torch.no_grad()
def test_forward_derivatives_in_evaluation_mode():
    layer, weight = evaluated()
    tangent = torch.randn_like(weight)
    expected = torch.where(hard_mask(weight, 0.5), tangent, 0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, tangent)
        found = forward_ad.unpack_dual(layer.pdp_masks["weight"].hard(dual)).tangent
    assert torch.equal(found, expected)
    _, found = torch.func.jvp(layer.pdp_masks["weight"].hard, (weight.detach(),), (tangent,))
    assert torch.equal(found, expected)


def test_transforms_in_evaluation_mode():
    layer, weight = evaluated()
    hard = layer.pdp_masks["weight"].hard
    factor = torch.randn_like(weight)
    found = torch.func.grad(lambda w: (hard(w) * factor).sum())(weight.detach())
    assert torch.equal(found, torch.where(hard_mask(weight, 0.5), factor, 0))
    weights = torch.randn(3, *weight.shape)
    with torch.no_grad():
        assert torch.equal(torch.vmap(hard)(weights), torch.stack([masked(w) for w in weights]))


@torch.no_grad()
def test_a_compiled_evaluation_is_one_graph_that_follows_the_weight():
    graphs = []

    def backend(module, _):
        graphs.append([node.target for node in module.graph.nodes])
        return module

    layer, weight = evaluated()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(2):
        weight.data.copy_(torch.randn_like(weight))
        assert torch.equal(compiled(), masked(weight))
    assert len(graphs) == 1
    assert torch.where in graphs[0]  # which a compiler fuses with what follows


@torch.no_grad()
def test_a_traced_evaluation_follows_the_weight():
    layer, weight = evaluated()
    inputs = torch.randn(4, 32)
    traced = torch.jit.trace(layer, inputs)
    traced.weight.data.copy_(torch.randn_like(weight))
    assert torch.equal(traced(inputs), masked(traced.weight))
