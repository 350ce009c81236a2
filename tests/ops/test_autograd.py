"""pdp_mask works with autograd, autocast and torch.func as PyTorch's functions do."""

import pytest
import torch
from torch.func import grad, vjp, vmap

from pdp_kernels import (
    PDPConfig,
    PDPPruner,
    hard_mask,
    pdp_mask,
    pdp_mask_channel,
    pdp_mask_nm,
    pdp_threshold,
    pdp_thresholds,
)
from pdp_kernels.ops import reference

TEMPERATURES = [{"tau": 0.1}, {"relative_tau": 0.3}]


def constant(value, device="cpu"):
    return torch.tensor(value, dtype=torch.float64, device=device)


@pytest.mark.parametrize("temperature", TEMPERATURES, ids=str)
@pytest.mark.parametrize("return_mask", [False, True])
def test_gradcheck(device, temperature, return_mask):
    """Eq. 2 is the derivative of Eq. 1 at a constant t, also at w = 0 and w = t."""
    weight = torch.randn(3, 4, dtype=torch.float64, device=device)
    weight[0, :2] = torch.tensor([0.0, 0.6])
    weight.requires_grad_()

    def masked(w):
        return pdp_mask(w, threshold=constant(0.6, device), return_mask=return_mask, **temperature)

    assert torch.autograd.gradcheck(masked, weight)


def test_gradient_through_one_result_alone(device):
    weight = torch.randn(50, dtype=torch.float64, device=device, requires_grad=True)
    w_hat, mask = pdp_mask(weight, 0.5, tau=0.1, return_mask=True)
    through_w_hat, through_mask = (
        torch.autograd.grad(result.sum(), weight, retain_graph=True)[0] for result in (w_hat, mask)
    )
    together = torch.autograd.grad(w_hat.sum() + mask.sum(), weight)[0]
    torch.testing.assert_close(together, through_w_hat + through_mask)


def test_the_threshold_is_a_constant(device):
    """The gradient is Eq. 2's, with nothing through t."""
    weight = torch.randn(100, dtype=torch.float64, device=device, requires_grad=True)
    own = pdp_threshold(weight, 0.5)
    expected = torch.autograd.grad(pdp_mask(weight, threshold=own).sum(), weight)
    assert torch.equal(torch.autograd.grad(pdp_mask(weight, 0.5).sum(), weight)[0], expected[0])


def test_differentiating_twice_is_an_error(device):
    weight = torch.randn(10, device=device, requires_grad=True)
    (first,) = torch.autograd.grad(pdp_mask(weight, 0.5).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad(lambda w: grad(lambda v: pdp_mask(v, 0.5).sum())(w).sum())(weight.detach())


def test_func_grad_equals_backward(device):
    weight = torch.randn(20, 5, device=device, requires_grad=True)
    expected = torch.autograd.grad(pdp_mask(weight, 0.7, tau=0.1).square().sum(), weight)[0]
    found = grad(lambda w: pdp_mask(w, 0.7, tau=0.1).square().sum())(weight.detach())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_vmap_treats_each_example_as_a_layer(device, in_dim):
    weights = torch.randn(4, 5, 6, device=device)
    layers = weights.unbind(in_dim)
    expected = [pdp_mask(layer, 0.6, tau=0.1, return_mask=True) for layer in layers]
    w_hat, mask = vmap(lambda w: pdp_mask(w, 0.6, tau=0.1, return_mask=True), in_dim)(weights)
    assert torch.equal(w_hat, torch.stack([one[0] for one in expected]))
    assert torch.equal(mask, torch.stack([one[1] for one in expected]))
    found = vmap(lambda w: pdp_threshold(w, 0.6), in_dim)(weights)
    assert torch.equal(found, pdp_thresholds(layers, 0.6))
    kept = vmap(lambda w: hard_mask(w, 0.6), in_dim)(weights)
    assert torch.equal(kept, torch.stack([hard_mask(layer, 0.6) for layer in layers]))


def test_vmap_over_thresholds_and_ratios_equals_a_loop(device):
    weight = torch.randn(30, device=device)
    ratios = torch.tensor([0.1, 0.5, 0.9], device=device)
    thresholds = torch.stack([pdp_threshold(weight, ratio) for ratio in ratios])
    expected = torch.stack([pdp_mask(weight, threshold=t, tau=0.1) for t in thresholds])
    found = vmap(lambda r: pdp_mask(weight, r, tau=0.1))(ratios)
    assert torch.equal(found, expected)
    found = vmap(lambda t: pdp_mask(weight, threshold=t, tau=0.1))(thresholds)
    assert torch.equal(found, expected)


def test_vmap_of_a_list_equals_a_loop(device):
    first, second = torch.randn(3, 8, device=device), torch.randn(5, device=device)
    found = vmap(lambda w: pdp_thresholds([w, second], [0.5, 0.2]))(first)
    assert torch.equal(found, torch.stack([pdp_thresholds([w, second], [0.5, 0.2]) for w in first]))


def test_vmap_of_grad_and_grad_of_vmap_equal_loops(device):
    weights = torch.randn(4, 15, dtype=torch.float64, device=device)

    def loss(weight):
        return pdp_mask(weight, 0.4, relative_tau=0.5).pow(3).sum()

    expected = torch.stack([grad(loss)(weight) for weight in weights])
    assert torch.equal(vmap(grad(loss))(weights), expected)
    assert torch.equal(grad(lambda w: vmap(loss)(w).sum())(weights), expected)


def test_vjp_under_vmap_shares_the_weight(device):
    weight = torch.randn(12, dtype=torch.float64, device=device)
    cotangents = torch.randn(5, 12, dtype=torch.float64, device=device)
    _, pull_back = vjp(lambda w: pdp_mask(w, 0.4, tau=0.1), weight)
    expected = torch.stack([pull_back(cotangent)[0] for cotangent in cotangents])
    assert torch.equal(vmap(pull_back)(cotangents)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_writes_w_hat_in_its_dtype(device, dtype, autocast_dtype):
    weight = torch.randn(40, device=device).to(dtype).requires_grad_()
    plain = pdp_mask(weight, 0.5, out_dtype=autocast_dtype)
    with torch.autocast(device, autocast_dtype):
        w_hat = pdp_mask(weight, 0.5)
        assert pdp_mask(weight, 0.5, out_dtype=torch.float32).dtype == torch.float32
    assert torch.equal(w_hat, plain)
    assert w_hat.dtype == autocast_dtype
    assert torch.autograd.grad(w_hat.sum(), weight)[0].dtype == dtype


def test_autocast_leaves_float64_alone(device):
    with torch.autocast(device, torch.bfloat16):
        assert pdp_mask(torch.randn(4, device=device).double(), 0.5).dtype == torch.float64


def test_gradient_comes_back_in_the_weights_dtype_and_layout(device):
    weight = torch.randn(4, 6, 3, 3, device=device).to(memory_format=torch.channels_last)
    weight.requires_grad_()
    w_hat = pdp_mask(weight, 0.5, out_dtype=torch.bfloat16)
    w_hat.backward(torch.randn_like(w_hat).contiguous())
    assert w_hat.stride() == weight.grad.stride() == weight.stride()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["tau", "relative_tau"])
def test_temperature_in_a_tensor_gives_the_same(device, name):
    weight = torch.randn(100, device=device, requires_grad=True)
    results = []
    for tau in (0.25, torch.tensor(0.25, device=device), constant(0.25, device)):
        w_hat = pdp_mask(weight, 0.5, **{name: tau})
        results.append((w_hat, *torch.autograd.grad(w_hat.sum(), weight)))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_default_temperature_is_the_papers(device):
    weight = torch.randn(100, device=device) * 0.01
    assert torch.equal(pdp_mask(weight, 0.5), pdp_mask(weight, 0.5, tau=1e-4))


def test_scalar_and_empty_weights_are_masked(device):
    scalar = torch.tensor(0.5, device=device, requires_grad=True)
    assert torch.equal(pdp_mask(scalar, 0.0), scalar)
    assert pdp_mask(scalar, 1.0).item() == 0
    empty = torch.empty(0, 3, device=device, requires_grad=True)
    w_hat = pdp_mask(empty, 0.5)
    w_hat.sum().backward()
    assert w_hat.shape == empty.grad.shape == (0, 3)


def test_trains_a_layer_to_the_ratio_asked_for(device):
    """A regression whose solution is sparse: the soft mask finds the weights that matter."""
    torch.manual_seed(1)
    truth = torch.zeros(20, device=device)
    truth[::5] = torch.tensor([1.0, -1.5, 2.0, -0.8], device=device)
    inputs = torch.randn(400, 20, device=device)
    targets = inputs @ truth
    weight = (
        torch.full((20,), 0.1, device=device)
        .add_(0.02 * torch.randn(20, device=device))
        .requires_grad_()
    )
    optimizer = torch.optim.Adam([weight], lr=0.02)
    for step in range(400):
        ratio = 0.8 * min(1, step / 200)
        loss = (inputs @ pdp_mask(weight, ratio, relative_tau=0.3) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(hard_mask(weight, 0.8), truth != 0)


def test_reference_serves_devices_without_kernels():
    """A meta tensor stands for a device without a backend: shapes and strides are right."""
    weight = torch.empty(4, 3, 2, 2, device="meta").to(memory_format=torch.channels_last)
    t = torch.empty((), device="meta")
    w_hat, mask = reference.soft_mask(weight, t, t, True, torch.bfloat16, True)
    assert w_hat.stride() == mask.stride() == weight.stride()
    assert w_hat.dtype == mask.dtype == torch.bfloat16
    assert pdp_threshold(weight, 0.5).shape == ()


def test_masks_of_meta_tensors_have_shapes_and_dtypes():
    weight = torch.empty(8, 8, device="meta", requires_grad=True)
    for w_hat in (pdp_mask(weight, 0.5), pdp_mask_nm(weight, 2, 4), pdp_mask_channel(weight, 0.5)):
        assert (w_hat.device, w_hat.shape, w_hat.dtype) == (weight.device, (8, 8), torch.float32)
        (grad,) = torch.autograd.grad(w_hat.sum(), weight)
        assert grad.is_meta and grad.shape == (8, 8)
    assert pdp_mask(weight, 0.5, out_dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "channel"])
def test_a_pruned_model_runs_on_the_meta_device(pattern):
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)).to("meta")
    sparsity = None if pattern == "2:4" else 0.5
    PDPPruner(model, PDPConfig(sparsity, pattern=pattern, warmup=0, ramp=0))
    for mode in (True, False):
        assert model.train(mode)(torch.empty(3, 8, device="meta")).shape == (3, 4)
