"""soft_mask_list in CUDA C++, on a model of a GPU: dtypes, addresses, grids, launches."""

import math

import pytest
import torch

from pdp_kernels.ops import reference
from tests.support.masks import REAL, SINGLE, check_soft_mask_list, layers, table
from tests.support.weights import DTYPES, denormals

# Around a tile, and around the packets of a thread.
SIZES = (0, 1, 3, 5, 8, 9, 31, 8191, 8192, 8193, 20011)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("out_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtypes", [[torch.float64], SINGLE], ids=str)
def test_every_mix_of_dtypes_stays_within_budget(cuda, dtypes, out_dtype, relative):
    weights = layers(dtypes) + layers(dtypes[::-1])
    thresholds, taus = table(weights, 0.2, 1.0), table(weights, 0.1, 0.4)
    check_soft_mask_list(cuda, weights, thresholds, taus, relative, out_dtype)
    assert cuda.host.launches() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_stays_within_budget(cuda, dtype):
    weights = [torch.randn(size).to(dtype) for size in SIZES]
    tau = torch.tensor(0.2, dtype=REAL[dtype]).expand(len(weights))
    check_soft_mask_list(cuda, weights, table(weights, 0.2, 1.0), tau, True)


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e30])
@pytest.mark.parametrize("tau", [1e-30, 0.3, 1e30])
def test_extreme_scales_and_temperatures_stay_within_budget(cuda, scale, tau):
    weights = layers([torch.float32], scale)
    thresholds = (scale * table(weights, 0.1, 1.0).double()).float()
    check_soft_mask_list(cuda, weights, thresholds, torch.tensor(tau).expand(len(weights)), True)


def test_subnormal_weights_and_thresholds_stay_within_budget(cuda):
    weights = [denormals(997, torch.float32), denormals(31, torch.bfloat16), torch.randn(9)]
    thresholds = torch.tensor([1e-44, 4e-40, 1e-45])
    check_soft_mask_list(cuda, weights, thresholds, torch.tensor([0.3, 1.0, 0.1]), True)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inf_and_nan_are_those_of_the_reference(cuda, dtype, relative):
    weight = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -2.0, 0.5]).to(dtype)
    thresholds = torch.tensor([math.inf, -math.inf, 0.0, 0.5, math.nan], dtype=REAL[dtype])
    weights, taus = [weight] * 5, torch.tensor(0.3, dtype=REAL[dtype]).expand(5)
    grads = [torch.tensor([1.0, 2, -1, math.inf, 1, math.nan, 3, 0])] * 5
    rest = (thresholds, taus, relative)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0, "equal_nan": True}
    found = cuda.soft_mask_list(weights, *rest, None)
    torch.testing.assert_close(found, reference.soft_mask_list(weights, *rest, None), **tolerance)
    found = cuda.soft_mask_list_backward(grads, weights, *rest)
    expected = reference.soft_mask_list_backward(grads, weights, *rest)
    torch.testing.assert_close(found, expected, **tolerance)


def moved(tensor, offset):
    """Return the tensor at an address `offset` elements beyond an aligned one."""
    return torch.cat([tensor.new_zeros(offset), tensor])[offset:]


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_the_same_at_every_address(cuda, dtype, out_dtype):
    weight, grad = torch.randn(9001).to(dtype), torch.randn(9001).to(out_dtype)
    offsets = range(9)
    weights = [moved(weight, offset) for offset in offsets]
    grads = [moved(grad, (3 * offset) % 9) for offset in offsets]
    t, tau = (torch.tensor(value, dtype=REAL[dtype]).expand(9) for value in (0.7, 0.1))
    results = cuda.soft_mask_list(weights, t, tau, False, out_dtype)
    assert all(torch.equal(result, results[0]) for result in results)
    results = cuda.soft_mask_list_backward(grads, weights, t, tau, False)
    assert all(torch.equal(result, results[0]) for result in results)


def test_results_do_not_depend_on_the_device_or_the_order_of_blocks(cuda):
    weights = [torch.randn(size).to(SINGLE[i % 3]) for i, size in enumerate(SIZES)]
    rest = (table(weights, 0.2, 1.0), table(weights, 0.1, 0.4), True)
    first = cuda.soft_mask_list(weights, *rest, torch.bfloat16)
    first_back = cuda.soft_mask_list_backward(weights, weights, *rest)
    for seed, multiprocessors in enumerate((1, 3, 40)):
        cuda.host.device(multiprocessors=multiprocessors, seed=seed)
        assert all(map(torch.equal, cuda.soft_mask_list(weights, *rest, torch.bfloat16), first))
        back = cuda.soft_mask_list_backward(weights, weights, *rest)
        assert all(map(torch.equal, back, first_back))


@pytest.mark.parametrize(
    ("tensors", "launches"), [(1, 1), (96, 1), (97, 1), (832, 1), (833, 2), (2000, 3)]
)
def test_a_list_takes_one_launch_for_each_chunk_of_the_table(cuda, tensors, launches):
    weights = [torch.randn(i % 37).to(SINGLE[i % 3]) for i in range(1, 1 + tensors)]
    grads = [None if i % 5 == 3 else torch.randn_like(w) for i, w in enumerate(weights)]
    thresholds, taus = table(weights, 0.1, 1.5), table(weights, 0.1, 0.6)
    found = cuda.soft_mask_list(weights, thresholds, taus, True, None)
    assert cuda.host.launches() == launches
    assert cuda.host.workspace_bytes() == 0
    back = cuda.soft_mask_list_backward(grads, weights, thresholds, taus, True)
    assert cuda.host.launches() == launches
    # Each weight has its own threshold and temperature: neighbours differ by less than these.
    for i, weight in enumerate(weights):
        given = (weight, thresholds[i], taus[i], True)
        near = {"rtol": 8 * torch.finfo(weight.dtype).eps, "atol": 1e-6}
        expected = reference.soft_mask(*given, None, False)[0]
        torch.testing.assert_close(found[i], expected, **near)
        if grads[i] is None:
            assert back[i].shape == (0,)
        else:
            expected = reference.soft_mask_backward(grads[i], None, *given)
            torch.testing.assert_close(back[i], expected, **near)


def test_a_list_without_anything_to_do_takes_no_launch(cuda):
    weights = [torch.empty(0), torch.randn(5)]
    rest = (torch.ones(2), torch.ones(2), True)
    cuda.soft_mask_list_backward([torch.empty(0), None], weights, *rest)
    assert cuda.host.launches() == 0
    cuda.soft_mask_list(weights[:1], *rest, None)
    assert cuda.host.launches() == 0
