"""Soft masks of a list are those of its weights, within the same error budget."""

import math

import pytest
import torch
from torch.func import vmap

from pdp_kernels.ops import reference
from tests.support.backends import on_device
from tests.support.masks import SINGLE, check_soft_mask_list, layers, table
from tests.support.weights import DTYPES, FINITE, SPECIAL, denormals, weight_of


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("out_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtypes", [[torch.float64], SINGLE, SINGLE[1:]], ids=str)
def test_every_mix_of_dtypes_stays_within_budget(masking, dtypes, out_dtype, relative):
    weights = layers(dtypes)
    thresholds, taus = table(weights, 0.2, 1.0), table(weights, 0.1, 0.4)
    check_soft_mask_list(masking, weights, thresholds, taus, relative, out_dtype)


@pytest.mark.parametrize("distribution", FINITE)
def test_every_distribution_stays_within_budget(masking, distribution):
    weights = [weight_of(distribution, size, d) for size in (31, 997) for d in SINGLE]
    thresholds, tau = table(weights, 0.1, 1.5), torch.tensor(0.3)
    check_soft_mask_list(masking, weights, thresholds, tau.expand(len(weights)), True)


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e30])
def test_extreme_scales_stay_within_budget(masking, scale):
    weights = layers([torch.float32], scale)
    thresholds = scale * table(weights, 0.1, 1.0)
    check_soft_mask_list(masking, weights, thresholds, table(weights, 0.01, 2), True)


def test_subnormal_weights_and_thresholds_stay_within_budget(masking):
    weights = [denormals(997, torch.float32), denormals(31, torch.bfloat16), torch.randn(9)]
    thresholds = torch.tensor([1e-44, 4e-40, 1e-45])
    check_soft_mask_list(masking, weights, thresholds, torch.tensor([0.3, 1.0, 0.1]), True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relative", [False, True])
def test_results_equal_those_of_each_weight(masking, dtype, relative):
    """Bit for bit on a CPU; on a GPU another kernel computes the list."""
    if masking.device == "cuda":
        pytest.skip("two compilers: within budget, not equal")
    weights = [*layers([dtype]), *(weight_of(name, 500, dtype) for name in SPECIAL)]
    grads = [torch.randn_like(weight).float() for weight in weights]
    thresholds, taus = table(weights, 0.0, 2.0), table(weights, 0.01, 3.0)
    thresholds[-2:] = torch.tensor([math.inf, -math.inf])
    found = masking.soft_mask_list(weights, thresholds, taus, relative, torch.bfloat16)
    back = masking.soft_mask_list_backward(grads, weights, thresholds, taus, relative)
    for i, weight in enumerate(weights):
        given = (weight, thresholds[i], taus[i], relative)
        expected = masking.soft_mask(*given, torch.bfloat16, False)[0]
        exact = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(found[i], expected, **exact)
        assert found[i].stride() == expected.stride()
        expected = masking.soft_mask_backward(grads[i], None, *given)
        torch.testing.assert_close(back[i], expected, **exact)
        assert back[i].stride() == expected.stride()


def test_an_absent_gradient_has_an_empty_result(masking):
    weights = layers(SINGLE)
    grads = [torch.randn(w.shape) if i % 2 else None for i, w in enumerate(weights)]
    rest = (table(weights, 0.2, 1.0), table(weights, 0.1, 0.4), True)
    weights, grads = on_device(masking, weights, grads)
    rest = on_device(masking, *rest)
    results = masking.soft_mask_list_backward(grads, weights, *rest)
    every = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)]
    expected = masking.soft_mask_list_backward(every, weights, *rest)
    for grad, weight, result, present in zip(grads, weights, results, expected, strict=True):
        assert result.dtype == weight.dtype
        assert torch.equal(result, weight.new_empty(0) if grad is None else present)
    none = masking.soft_mask_list_backward([None] * len(weights), weights, *rest)
    assert all(result.shape == (0,) for result in none)


def test_gradients_of_other_layouts_are_taken(masking):
    weight = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)
    grad, rest = torch.randn(4, 6, 3, 3), (torch.tensor([0.7]), torch.tensor([0.3]), True)
    weight, grad, *rest = on_device(masking, weight, grad, *rest)
    like_weight = grad.to(memory_format=torch.channels_last)
    (expected,) = masking.soft_mask_list_backward([like_weight], [weight], *rest)
    (found,) = masking.soft_mask_list_backward([grad], [weight], *rest)
    assert torch.equal(found, expected) and found.stride() == weight.stride()
    strided = grad[:, ::2]
    (found,) = masking.soft_mask_list([strided], *rest, None)
    (expected,) = masking.soft_mask_list([strided.contiguous()], *rest, None)
    assert torch.equal(found, expected)


def test_unaligned_weights_have_the_same_results(masking):
    base, grad = torch.randn(2, 5001)
    thresholds, taus = torch.full((4,), 0.7), torch.tensor(0.1).expand(4)
    base, grad, *rest = on_device(masking, base, grad, thresholds, taus, True)
    views, gradients = ([each[i:] for i in range(4)] for each in (base, grad))
    for found in masking.soft_mask_list(views, *rest, None):
        expected = masking.soft_mask_list(views, *rest, None)[0]
        assert torch.equal(found, expected[-len(found) :])
    for found in masking.soft_mask_list_backward(gradients, views, *rest):
        expected = masking.soft_mask_list_backward(gradients, views, *rest)[0]
        assert torch.equal(found, expected[-len(found) :])


def test_many_small_weights_are_the_same_on_any_number_of_threads(masking, set_threads):
    sizes = [40_000, *(i % 97 for i in range(1000))]
    if masking.device == "cpu" and not hasattr(masking, "prune_counts"):
        sizes = sizes[-20:]  # the interpreter
    weights = [torch.randn(size).to(SINGLE[i % 3]) for i, size in enumerate(sizes)]
    grads = [torch.randn_like(weight) for weight in weights]
    rest = (table(weights, 0.2, 1.0), torch.tensor(0.1).expand(len(weights)), True)
    weights, grads, *rest = on_device(masking, weights, grads, *rest)
    first = masking.soft_mask_list(weights, *rest, None)
    first_back = masking.soft_mask_list_backward(grads, weights, *rest)
    for threads in (2, 3):
        set_threads(threads)
        assert all(map(torch.equal, masking.soft_mask_list(weights, *rest, None), first))
        back = masking.soft_mask_list_backward(grads, weights, *rest)
        assert all(map(torch.equal, back, first_back))


def test_vmap_treats_each_example_as_a_list(device):
    stack, other = torch.randn(6, 3, 5, device=device), torch.randn(3, 7, device=device)
    thresholds = torch.rand(3, 2, device=device)
    rest = (torch.tensor(0.3, device=device).expand(2), True)

    def masked(w, t, v):
        return torch.ops.pdp.soft_mask_list([w, v], t, *rest, None)

    def gradient(w, t, v):
        return torch.ops.pdp.soft_mask_list_backward([w.sin(), None], [w, v], t, *rest)

    for function in (masked, gradient):
        found = vmap(function, (1, 0, 0))(stack, thresholds, other)
        each = [
            function(*example) for example in zip(stack.unbind(1), thresholds, other, strict=True)
        ]
        for results, expected in zip(found, zip(*each, strict=True), strict=True):
            assert torch.equal(results, torch.stack(expected))


def test_the_reference_computes_in_float64_when_its_arguments_do():
    weight = torch.randn(50, dtype=torch.float64)
    t, tau = torch.tensor([[0.7], [0.1]], dtype=torch.float64)
    (w_hat,) = reference.soft_mask_list([weight], t, tau, False, None)
    mask = torch.sigmoid((weight**2 - t**2) / tau)
    torch.testing.assert_close(w_hat, mask * weight, rtol=1e-12, atol=1e-15)
    grad = torch.randn_like(weight)
    (found,) = reference.soft_mask_list_backward([grad], [weight], t, tau, False)
    expected = grad * (mask + 2 * weight**2 / tau * mask * (1 - mask))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
