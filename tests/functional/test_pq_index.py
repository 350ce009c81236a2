"""The PQ Index equals its formula in extended precision, and is the sparsity measure it says."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.func import vmap

from pdp_kernels import pq_index
from pdp_kernels.ops import reference
from tests.support.backends import GPU, dispatched
from tests.support.sums import (
    NORMS,
    check_sums,
    check_sums_at_the_ends_of_the_range,
    check_sums_of_every_size_and_mask,
    check_sums_of_rows,
    exact_sums,
    formula,
)
from tests.support.weights import DTYPES, FINITE, weight_of


@pytest.fixture(params=["reference", "native", GPU])
def summing(request):
    """Return power_sums of a backend, which takes and returns CPU tensors."""
    if request.param == "reference":
        return reference.power_sums
    return on_cpu(dispatched(request.param))


def on_cpu(backend):
    def power_sums(weights, masks, *arguments):
        weights, masks = (
            [None if tensor is None else tensor.to(backend.device) for tensor in tensors]
            for tensors in (weights, masks)
        )
        return backend.power_sums(weights, masks, *arguments).cpu()

    return power_sums


@pytest.mark.parametrize("norms", NORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_right_for_every_size_and_mask(summing, dtype, norms):
    check_sums_of_every_size_and_mask(summing, dtype, norms)


@pytest.mark.parametrize("distribution", FINITE)
def test_sums_are_right_for_every_distribution(summing, distribution):
    for dtype in DTYPES:
        weight = weight_of(distribution, 9973, dtype)
        for norms in NORMS:
            check_sums(summing, [weight], [None], *norms)


@pytest.mark.parametrize("norms", NORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_inf_nan_and_of_the_ends_of_the_range(summing, dtype, norms):
    check_sums_at_the_ends_of_the_range(summing, dtype, norms)


def test_sums_of_weights_of_every_size(summing):
    weights = [(torch.randn(4097).double() * 2.0**scale).float() for scale in range(-149, 126, 5)]
    check_sums(summing, weights, [None] * len(weights), 0.5, 1.0)
    check_sums(summing, [torch.stack(weights, dim=1)], [None], 0.5, 1.0)


def test_pruned_weights_may_be_anything(summing):
    weight = torch.tensor([math.nan, 1.0, -math.inf, 4.0])
    mask = torch.tensor([False, True, False, True])
    assert summing([weight], [mask], 0.5, 1.0, False).tolist() == [[2, 3, 5]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_rows(summing, dtype):
    check_sums_of_rows(summing, dtype)


def layouts(make):
    base = make(5, 33, 7, 11)
    yield base.flatten()[3:]
    yield base.transpose(0, 3)
    yield base.permute(2, 0, 3, 1)
    yield base[:, ::2]
    yield base[1:, 1:, 1:, 1:]
    yield base.mT
    yield base[:1].to(memory_format=torch.channels_last)
    yield base[:1].expand(4, -1, -1, -1)
    yield make(6, 8, 1, 1).to(memory_format=torch.channels_last)
    yield make(6, 8, 3, 3).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_in_every_layout(summing, dtype, per_row):
    weights = list(layouts(lambda *shape: torch.randn(shape).to(dtype)))
    masks = list(layouts(lambda *shape: torch.rand(shape) < 0.5))
    for given_masks in ([None] * len(weights), masks, [mask.contiguous() for mask in masks]):
        check_sums(summing, weights, given_masks, 0.5, 1.0, per_row)


def test_lists_may_have_several_dtypes_and_any_length(summing):
    for length in (1, 17, 800):
        weights = [torch.randn(1 + 37 * i % 1009).to(DTYPES[i % 4]) for i in range(length)]
        masks = [torch.rand(len(w)) < 0.7 if i % 3 else None for i, w in enumerate(weights)]
        check_sums(summing, weights, masks, 1.0, 2.0)


@pytest.mark.parametrize("norms", NORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_index_equals_the_formula(device, dtype, norms):
    for size in (1, 31, 33, 4097, 300_007):
        weight = torch.randn(size).to(dtype)
        found = pq_index(weight.to(device), *norms)
        assert found.dtype == torch.float64 and found.shape == ()
        assert found.item() == pytest.approx(formula(weight, *norms), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("norms", NORMS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 1000, 65_537])
def test_one_hot_has_the_largest_index_there_is(device, size, norms):
    p, q = norms
    weight = torch.zeros(size, device=device)
    weight[size // 2] = -0.3
    largest = 1 - size ** (1 / q - 1 / p)
    assert pq_index(weight, p, q).item() == pytest.approx(largest, rel=1e-14, abs=2e-14)


@pytest.mark.parametrize("norms", NORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_magnitudes_have_index_0(device, dtype, norms):
    for size in (1, 2, 1000, 1_000_003):
        weight = torch.full((size,), 0.3, dtype=dtype, device=device)
        weight[::2] *= -1
        assert 0 <= pq_index(weight, *norms).item() <= 2e-14


def test_rounding_errors_do_not_take_the_index_below_0(device):
    for size in range(1, 40):
        assert (pq_index(torch.full((2, size), 0.3, device=device), scope="neuron") >= 0).all()


def test_smallest_p_is_exact_enough():
    for size in (7, 1000, 30_011):
        for weight in (torch.randn(size), torch.randn(size) * 1e-30):
            for q in (2e-5, 1.0, 2.0):
                d, sum_p, sum_q = exact_sums(weight, None, 1e-5, q)[0]
                expected = 1 - np.exp(np.log(sum_p / d) / 1e-5 - np.log(sum_q / d) / q)
                assert pq_index(weight, 1e-5, q).item() == pytest.approx(float(expected), abs=1e-9)
    for p in (9e-6, 1e-15):
        with pytest.raises(ValueError, match=f"1e-05 <= p < q < inf, got p = {p}"):
            pq_index(weight, p)


def test_hand_computed(device):
    weight = torch.tensor([1.0, -4.0, 9.0, 0.0], device=device)
    # (1 + 2 + 3)^2 / 14 / 4 and (1 + 4 + 9) / sqrt(1 + 16 + 81) / sqrt(4)
    assert pq_index(weight).item() == pytest.approx(1 - 36 / 56, rel=1e-14)
    assert pq_index(weight, 1, 2).item() == pytest.approx(1 - 14 / math.sqrt(98) / 2, rel=1e-14)
    mask = torch.tensor([True, True, False, True], device=device)
    assert pq_index(weight, mask=mask).item() == pytest.approx(1 - 9 / 5 / 3, rel=1e-14)


def test_docstring_example():
    assert pq_index(torch.tensor([0.0, 0.0, 0.0, 4.0])).item() == 0.75


def test_each_scope_is_the_index_of_its_group(device):
    weights = [torch.randn(shape, device=device) for shape in ((4, 3, 2), (5,), (1, 6))]
    masks = [torch.rand(4, 3, 2, device=device) < 0.5, None, None]
    layer = pq_index(weights, mask=masks)
    assert layer.shape == (3,)
    for index, weight, mask in zip(layer, weights, masks, strict=True):
        assert torch.equal(index, pq_index(weight, mask=mask))

    neuron = pq_index(weights, mask=masks, scope="neuron")
    assert [index.shape for index in neuron] == [(4,), (5,), (1,)]
    alone = pq_index(weights[0], mask=masks[0], scope="neuron")
    assert torch.equal(neuron[0], alone)
    for index, row, mask in zip(alone, weights[0], masks[0], strict=True):
        assert torch.equal(index, pq_index(row, mask=mask))

    everything = torch.cat([w.flatten() for w in (weights[0][masks[0]], *weights[1:])])
    together = pq_index(weights, mask=masks, scope="global")
    assert together.shape == ()
    torch.testing.assert_close(together, pq_index(everything), rtol=1e-14, atol=0)
    single = pq_index(everything, scope="global")
    assert single.shape == () and torch.equal(single, pq_index(everything))


def test_no_weight_and_no_weight_but_0_have_index_0(device):
    weight = torch.randn(3, 4, device=device)
    weight[1] = 0
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[2] = False
    first, *rest = pq_index(weight, mask=mask, scope="neuron").tolist()
    assert first > 0 and rest == [0, 0]
    assert pq_index(torch.empty(0, device=device)).item() == 0
    assert pq_index(torch.empty(3, 0, device=device), scope="neuron").tolist() == [0, 0, 0]
    assert pq_index(torch.empty(0, 3, device=device), scope="neuron").shape == (0,)


@pytest.mark.parametrize("norms", NORMS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinite_weights_give_nan(device, value, norms):
    weight = torch.randn(100, device=device)
    weight[7] = value
    assert pq_index(weight, *norms).isnan()
    assert not pq_index(weight, *norms, mask=weight.isfinite()).isnan()


@pytest.mark.parametrize("norms", NORMS, ids=str)
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30])
def test_huge_and_denormal_float32_weights(device, scale, norms):
    weight = (torch.randn(5000, dtype=torch.float64) * scale).float()
    found = pq_index(weight.to(device), *norms)
    assert found.item() == pytest.approx(formula(weight, *norms), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-310, 1e300])
def test_float64_weights_at_the_ends_of_the_range(device, scale):
    weight = torch.rand(5000, dtype=torch.float64) * scale
    found = pq_index(weight.to(device), 0.5, 1)
    assert found.item() == pytest.approx(formula(weight, 0.5, 1), rel=1e-12)
    assert pq_index(weight.to(device), 0.5, 2).isnan()  # |w|^2 is out of float64's range


def test_half_a_hundred_million_weights(device):
    """Where the errors of a float32 sum would add up."""
    weight = torch.randn(50_000_000)
    magnitude = weight.abs().numpy()
    chunks = np.split(magnitude, 50)
    roots = sum(np.sqrt(chunk, dtype=np.float64).sum() for chunk in chunks)
    total = sum(chunk.sum(dtype=np.float64) for chunk in chunks)
    found = pq_index(weight.to(device))
    assert found.item() == pytest.approx(1 - roots**2 / total / len(weight), rel=1e-12)


def test_bitwise_repeatable(device):
    weights = [torch.randn(100_003, device=device) for _ in range(3)]
    first = pq_index(weights)
    for _ in range(20):
        assert torch.equal(pq_index(weights), first)


def test_independent_of_the_number_of_threads(set_threads):
    weights = [torch.randn(300_007), torch.randn(40, 1000), torch.randn(200_003).bfloat16()]
    rows = [weight.view(-1, 40) if weight.dim() > 1 else weight for weight in weights]
    results = []
    for count in (1, 2, 3, 7):
        set_threads(count)
        results.append(torch.cat([pq_index(weights), *pq_index(rows, scope="neuron")]))
    assert all(torch.equal(result, results[0]) for result in results)


def test_takes_no_gradient(device):
    weight = torch.randn(10, device=device, requires_grad=True)
    assert not pq_index(weight).requires_grad


def test_vmap_treats_each_example_as_a_layer(device):
    weights, masks = torch.randn(3, 4, 5, device=device), torch.rand(3, 5, 4, device=device) < 0.5
    second = torch.randn(7, device=device)
    found = vmap(lambda w, m: pq_index([w, second], mask=[m, None]), (1, 2))(
        weights.transpose(0, 1), masks.permute(1, 2, 0).transpose(0, 1)
    )
    expected = [
        pq_index([w, second], mask=[m.mT, None]) for w, m in zip(weights, masks, strict=True)
    ]
    assert torch.equal(found, torch.stack(expected))
    rows = vmap(lambda w: pq_index(w, scope="neuron"))(weights)
    assert torch.equal(rows, torch.stack([pq_index(w, scope="neuron") for w in weights]))


# The six properties of a sparsity measure (section 3 of the paper, after Hurley and Rickard), for
# weights w_i >= 0. Whole numbers keep what is strictly smaller farther apart than rounding.
amounts = st.integers(0, 1000).map(float)
vectors = st.lists(amounts, min_size=2, max_size=30).filter(any)
norms = st.sampled_from(NORMS)
property_test = settings(max_examples=100, deadline=None)


def index(values, norms):
    return pq_index(torch.tensor(values, dtype=torch.float64), *norms).item()


@property_test
@given(vectors, norms, st.data())
def test_robin_hood(values, norms, data):
    """D1: for w_i > w_j and 0 < a < (w_i - w_j) / 2, S(..w_i - a..w_j + a..) < S(w)."""
    rich, poor = data.draw(st.permutations(range(len(values))))[:2]
    assume(values[rich] > values[poor])
    moved = data.draw(st.floats(0.01, 0.99)) * (values[rich] - values[poor]) / 2
    fairer = list(values)
    fairer[rich] -= moved
    fairer[poor] += moved
    assert index(fairer, norms) < index(values, norms)


@property_test
@given(vectors, norms, st.floats(1e-100, 1e100))
def test_scaling(values, norms, scale):
    """D2: S(a w) = S(w) for a > 0."""
    scaled = [scale * value for value in values]
    assert index(scaled, norms) == pytest.approx(index(values, norms), abs=1e-12)


@property_test
@given(vectors, norms, st.integers(1, 1000))
def test_rising_tide(values, norms, tide):
    """D3: S(w + a) < S(w) for a > 0, if the w_i are not all the same."""
    assume(len(set(values)) > 1)
    assert index([value + tide for value in values], norms) < index(values, norms)


@property_test
@given(vectors, norms, st.integers(2, 5))
def test_cloning(values, norms, clones):
    """D4: S(w) = S([w, w])."""
    assert index(values * clones, norms) == pytest.approx(index(values, norms), abs=1e-12)


@property_test
@given(vectors, norms, st.data())
def test_bill_gates(values, norms, data):
    """P1: for each i there is a b > 0 such that S(..w_i + b + a..) > S(..w_i + b..) for a > 0."""
    rich = data.draw(st.integers(0, len(values) - 1))
    assume(any(values[:rich] + values[rich + 1 :]))  # alone he has the largest index already
    already, richer = list(values), list(values)
    already[rich] += 100 * sum(values)
    richer[rich] = already[rich] * data.draw(st.floats(1.1, 100))
    assert index(richer, norms) > index(already, norms)


@property_test
@given(vectors, norms, st.integers(1, 5))
def test_babies(values, norms, babies):
    """P2: S([w, 0]) > S(w) for w != 0."""
    assert index(values + [0.0] * babies, norms) > index(values, norms)
