"""gradient_tau: the mask at one temperature, Eq. 2 at another."""

from functools import partial

import pytest
import torch

from pdp_kernels import pdp_mask, pdp_mask_channel, pdp_mask_nm

MASKS = {
    "weight": partial(pdp_mask, sparsity=0.5),
    "2:4": partial(pdp_mask_nm, n=2, m=4),
    "channel": partial(pdp_mask_channel, sparsity=0.5),
}
by_mask = pytest.mark.parametrize("masked", MASKS.values(), ids=MASKS)


def result_and_gradient(masked, weight, **temperatures):
    leaf = weight.detach().requires_grad_()
    w_hat = masked(leaf, **temperatures)
    w_hat.backward(torch.linspace(-1, 1, w_hat.numel(), dtype=w_hat.dtype).view_as(w_hat))
    return w_hat.detach(), leaf.grad


@by_mask
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tau", "relative_tau"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_gradient_has_its_own_temperature(masked, dtype, name, as_tensor):
    weight = torch.randn(8, 16).to(dtype)
    of_gradient = torch.tensor(0.5) if as_tensor else 0.5
    w_hat, gradient = result_and_gradient(masked, weight, **{name: 0.02}, gradient_tau=of_gradient)
    assert torch.equal(w_hat, result_and_gradient(masked, weight, **{name: 0.02})[0])
    assert torch.equal(gradient, result_and_gradient(masked, weight, **{name: 0.5})[1])
    assert not torch.equal(gradient, result_and_gradient(masked, weight, **{name: 0.02})[1])


@by_mask
@pytest.mark.parametrize("same", [False, True], ids=["own", "one tensor for both"])
def test_compiled_gradient_has_its_own_temperature(masked, same):
    weight, tau = torch.randn(8, 16), torch.tensor(0.02)
    temperatures = {"relative_tau": tau, "gradient_tau": tau if same else torch.tensor(0.5)}
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    expected = result_and_gradient(masked, weight, **temperatures)
    for got, wanted in zip(
        result_and_gradient(compiled, weight, **temperatures), expected, strict=True
    ):
        assert torch.equal(got, wanted)


@by_mask
@pytest.mark.parametrize(
    "value, error, message",
    [
        ("0.5", TypeError, "gradient_tau must be a number or a 0-d tensor, got str"),
        (0.0, ValueError, "gradient_tau must be positive and finite"),
        (
            torch.ones(2),
            ValueError,
            r"gradient_tau must be a number or have shape \(\), got \(2,\)",
        ),
    ],
    ids=["string", "zero", "vector"],
)
def test_wrong_temperatures_of_the_gradient_are_refused(masked, value, error, message):
    with pytest.raises(error, match=message):
        masked(torch.randn(8, 16), gradient_tau=value)
