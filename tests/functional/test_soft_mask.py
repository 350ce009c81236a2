"""Masks, masked weights and gradients stay within the error budget of the float64 reference."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdp_kernels import pdp_mask, pdp_threshold
from tests.support.backends import on_device
from tests.support.masks import check_soft_mask, scalar
from tests.support.parameters import by_turns
from tests.support.weights import DTYPES, FINITE, denormals, weight_of

SIZES = (0, 1, 31, 33, 4097, 9973)


def scalars(weight, threshold, tau):
    return scalar(weight, threshold), scalar(weight, tau)


@pytest.mark.parametrize(
    "distribution, dtype, relative", by_turns(FINITE, DTYPES, [False, True]), ids=str
)
def test_every_distribution_stays_within_budget(masking, distribution, dtype, relative):
    for i, size in enumerate(SIZES):
        weight = weight_of(distribution, size, dtype)
        tau = (1e-4, 0.3)[i % 2]
        check_soft_mask(masking, weight, pdp_threshold(weight, 0.7).item(), tau, relative)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_out_dtype_stays_within_budget(masking, dtype, out_dtype):
    check_soft_mask(masking, torch.randn(1033).to(dtype), 0.7, 0.1, False, out_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormal_weights_stay_within_budget(masking, dtype):
    """A relative temperature is exact on any scale: t^2 would underflow, and is never formed."""
    weight = denormals(997, dtype)
    threshold = pdp_threshold(weight, 0.5).item()
    check_soft_mask(masking, weight, threshold, 0.3, True)
    check_soft_mask(masking, weight, threshold, 0.3, False)


@pytest.mark.parametrize("tau", [1e-30, 1e-4, 10.0, 1e30])
@pytest.mark.parametrize("threshold", [1e-30, 1e-19, 0.7, 1e19, 1e37])
def test_extreme_scales_and_temperatures_stay_within_budget(masking, threshold, tau):
    """t^2 and t^2 tau leave the range of float32. Some weights equal the threshold."""
    multiples = torch.cat([torch.randn(300), torch.tensor([0.0, 1.0, -1.0, 2.0])])
    check_soft_mask(masking, threshold * multiples, threshold, tau, True)


@pytest.mark.parametrize("threshold, tau", [(0.7, 1e-45), (1e-45, 1e-30)])
def test_weights_at_the_threshold_are_half_kept_at_the_lowest_temperatures(masking, threshold, tau):
    weight = threshold * torch.tensor([1.0, -1.0, 0.0, 2.0, -3.0])
    t, c = scalars(weight, threshold, tau)
    mask = masking.soft_mask(*on_device(masking, weight, t, c, True), None, True)[1]
    assert mask.tolist() == [0.5, 0.5, 0, 1, 1]


def test_float16_denormals_survive_a_cpu_that_flushes_denormals():
    """They are normal numbers in float32, in which the arithmetic is."""
    weight = (torch.arange(-900, 901) * 2.0**-24).half()
    expected = pdp_mask(weight, 0.5, relative_tau=0.3)
    threshold = pdp_threshold(weight, 0.5)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush denormals")
    try:
        assert torch.equal(pdp_threshold(weight, 0.5), threshold)
        assert torch.equal(pdp_mask(weight, 0.5, relative_tau=0.3), expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_large_weights_have_finite_gradients(masking, dtype):
    """2 w^2 / tau overflows where the slope has underflowed: the gradient there is g."""
    weight = torch.tensor([1e30, -1e25, 1e-3, -1e-9], dtype=dtype)
    t, tau = scalars(weight, 1.0, 1e-4)
    given = (torch.ones_like(weight), None, weight, t, tau, False)
    grad = masking.soft_mask_backward(*on_device(masking, *given))
    assert grad.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("relative", [False, True], ids=["tau", "relative_tau"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold, kept", [(-math.inf, 1.0), (math.inf, 0.0)])
def test_infinite_thresholds_keep_and_prune_all(masking, threshold, kept, dtype, relative):
    weight = torch.randn(100).to(dtype)
    weight[:3] = 0
    t, tau = scalars(weight, threshold, 0.1)
    given = on_device(masking, weight, t, tau, relative)
    w_hat, mask = masking.soft_mask(*given, None, True)
    grad = masking.soft_mask_backward(*on_device(masking, torch.ones_like(weight), None), *given)
    assert torch.equal(mask.cpu(), torch.full_like(weight, kept))
    assert torch.equal(w_hat.cpu(), kept * weight)
    assert torch.equal(grad.cpu(), torch.full_like(weight, kept))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relative_temperature_at_threshold_zero_keeps_all_but_zeros(masking, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    weight = torch.tensor([0.0, -0.0, 1.0, -3.0, tiny], dtype=dtype)
    t, c = scalars(weight, 0.0, 0.5)
    given = on_device(masking, weight, t, c, True)
    w_hat, mask = masking.soft_mask(*given, None, True)
    ones = torch.ones_like(weight)
    grad = masking.soft_mask_backward(*on_device(masking, ones, ones), *given)
    assert mask.tolist() == [0.5, 0.5, 1, 1, 1]
    assert torch.equal(w_hat.cpu(), weight)
    assert grad.tolist() == [0.5, 0.5, 1, 1, 1]


def test_relative_temperature_follows_the_scale_of_the_layer(masking):
    """Scaled by a power of two, weight and threshold give the same mask, bit for bit."""
    weight = torch.randn(1000)
    masks = []
    for scale in (1.0, 2.0**-40, 2.0**40):
        t, c = scalars(weight, 0.8 * scale, 0.3)
        given = on_device(masking, weight * scale, t, c, True)
        masks.append(masking.soft_mask(*given, None, True)[1].cpu())
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_nan_and_inf_weights_stay_at_their_own_places(masking):
    clean = torch.randn(1000)
    dirty = clean.clone()
    places = torch.tensor([0, 17, 500, 999])
    dirty[places] = torch.tensor([math.nan, math.inf, -math.inf, math.nan])
    others = torch.ones(1000, dtype=torch.bool).index_fill(0, places, False)
    t, tau = scalars(clean, 0.7, 0.1)
    grad = torch.randn(1000)
    for weight in (clean, dirty):
        given = on_device(masking, weight, t, tau, False)
        results = [
            *masking.soft_mask(*given, None, True),
            masking.soft_mask_backward(*on_device(masking, grad, None), *given),
        ]
        if weight is clean:
            expected = results
    for result, reference_result in zip(results, expected, strict=True):
        assert torch.equal(result.cpu()[others], reference_result.cpu()[others])
        assert result.cpu()[[0, 999]].isnan().all()


def test_equal_to_the_equations_written_by_hand():
    """Eq. 1 and Eq. 2 as printed, on numbers where nothing is extreme."""
    weight = torch.tensor([0.1, -0.5, 0.8, -1.5], dtype=torch.float64, requires_grad=True)
    t, tau = 0.6, 0.2
    w_hat, mask = pdp_mask(
        weight, threshold=torch.tensor(t, dtype=torch.float64), tau=tau, return_mask=True
    )
    for w, m, result in zip(weight.tolist(), mask.tolist(), w_hat.tolist(), strict=True):
        by_hand = 1 / (1 + math.exp(-(w * w - t * t) / tau))
        assert m == pytest.approx(by_hand, rel=1e-14)
        assert result == pytest.approx(by_hand * w, rel=1e-14)
    (grad,) = torch.autograd.grad(w_hat.sum(), weight)
    for w, m, result in zip(weight.tolist(), mask.tolist(), grad.tolist(), strict=True):
        assert result == pytest.approx(m + 2 * w * w / tau * m * (1 - m), rel=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_give_the_same_numbers_and_dense_ones_keep_their_strides(masking, dtype):
    base = torch.randn(4, 6, 5, 7).to(dtype)
    t, tau = scalars(base, 0.7, 0.1)
    dense = [base.to(memory_format=torch.channels_last), base.permute(2, 0, 3, 1), base.mT]
    copied = [base[:, ::2], base[1:, 1:, 1:, 1:], base[:1].expand(4, -1, -1, -1)]
    for weight in dense + copied:
        grad = torch.randn_like(weight).contiguous()
        rows = on_device(masking, weight.contiguous(), t, tau, True)
        given = on_device(masking, weight, t, tau, True)
        w_hat, mask = masking.soft_mask(*given, None, True)
        assert torch.equal(w_hat, masking.soft_mask(*rows, None, False)[0])
        assert torch.equal(mask, masking.soft_mask(*rows, None, True)[1])
        back = masking.soft_mask_backward(*on_device(masking, grad, grad), *given)
        assert torch.equal(back, masking.soft_mask_backward(*on_device(masking, grad, grad), *rows))
        if any(weight is one for one in dense):
            assert w_hat.stride() == mask.stride() == back.stride() == weight.stride()


def test_only_another_order_in_memory_makes_triton_copy():
    """Gradients of 1 x 1 convolutions have other strides than channels_last weights."""
    pytest.importorskip("triton")
    from pdp_kernels.triton_kernels.soft_mask import in_order_of

    for shape, is_copied in (((8, 4, 1, 1), False), ((8, 1, 3, 3), False), ((8, 4, 3, 3), True)):
        layout = torch.empty(shape).to(memory_format=torch.channels_last)
        values = torch.randn(shape)
        assert values.stride() != layout.stride()
        ordered = in_order_of(layout, values)
        assert (ordered is not values) == is_copied
        assert torch.equal(ordered, values)
        assert not is_copied or ordered.stride() == layout.stride()


def test_native_masks_make_no_denormals():
    """Some CPUs take a hundred times as long over them, here and in the layer that reads w_hat."""
    tiny = torch.finfo(torch.float32).tiny
    weight = torch.linspace(0, 1, 10_001)
    given = (weight, *scalars(weight, 1.0, 1 / 110), False)  # z from -110 to 0
    w_hat, mask = torch.ops.pdp.soft_mask(*given, None, True)
    grad = torch.ops.pdp.soft_mask_backward(torch.full_like(weight, 1e-3), None, *given)
    assert mask[0] == 0
    for result in (w_hat, mask, grad):
        assert ((result == 0) | (result >= tiny)).all()
        assert 0 < result[result > 0].min() < 1e-37
    # What is denormal already stays so where it is kept.
    small = torch.full((100,), 1e-40)
    kept = (small, *scalars(small, -math.inf, 1.0), False)
    assert torch.equal(torch.ops.pdp.soft_mask(*kept, None, False)[0], small)
    assert torch.equal(torch.ops.pdp.soft_mask_backward(small, None, *kept), small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_denormal_stays_and_changes_nothing_at_other_places(dtype):
    """Native kernels let the CPU flush a block without denormals, and look after one with them."""
    place, small = 5000, torch.tensor(1e-40, dtype=dtype)
    clean, clean_grad = torch.randn(2, 10_001).to(dtype)
    dirty, dirty_grad = clean.clone(), clean_grad.clone()
    dirty[place] = dirty_grad[place] = small
    others = torch.arange(10_001) != place
    for threshold in (0.7, -math.inf):
        rest = (*scalars(clean, threshold, 0.1), False)
        w_hat, expected = (
            torch.ops.pdp.soft_mask(weight, *rest, None, False)[0] for weight in (dirty, clean)
        )
        assert torch.equal(w_hat[others], expected[others])
        grad, expected = (
            torch.ops.pdp.soft_mask_backward(given, None, clean, *rest)
            for given in (dirty_grad, clean_grad)
        )
        assert torch.equal(grad[others], expected[others])
    assert w_hat[place] == grad[place] == small
    assert torch.tensor(1e-30) * 1e-10 > 0, "this thread flushes denormals from now on"


def test_misaligned_pointers_change_nothing(masking):
    base = torch.randn(1001)
    t, tau = scalars(base, 0.7, 0.1)
    base, grad, *scalar = on_device(masking, base, torch.randn(1001), t, tau, False)
    aligned = masking.soft_mask(base, *scalar, None, False)[0]
    aligned_back = masking.soft_mask_backward(grad, None, base, *scalar)
    for offset in (1, 2, 3):
        view, view_grad = base[offset:], grad[offset:]
        assert torch.equal(masking.soft_mask(view, *scalar, None, False)[0], aligned[offset:])
        back = masking.soft_mask_backward(view_grad, None, view, *scalar)
        assert torch.equal(back, aligned_back[offset:])


def test_bitwise_repeatable_on_any_number_of_threads(masking, set_threads):
    weight, grad = torch.randn(2, 50_021)
    given = on_device(masking, weight, *scalars(weight, 0.7, 1e-4), False)
    grad = grad.to(masking.device)
    first = masking.soft_mask(*given, None, False)[0]
    first_back = masking.soft_mask_backward(grad, None, *given)
    for threads in (1, 1, 2, 3):
        set_threads(threads)
        assert torch.equal(masking.soft_mask(*given, None, False)[0], first)
        assert torch.equal(masking.soft_mask_backward(grad, None, *given), first_back)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_strides_and_temperature_stay_within_budget(data):
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    shape = data.draw(st.lists(st.integers(0, 7), max_size=4))
    weight = torch.randn(shape).permute(data.draw(st.permutations(range(len(shape)))))
    for dim in range(weight.dim()):
        step = data.draw(st.integers(1, 3))
        weight = weight.movedim(dim, 0)[::step].movedim(0, dim)
    tau = data.draw(st.floats(1e-6, 1e3))
    threshold = data.draw(st.floats(0, 4, width=32))
    native = SimpleNamespace(
        device="cpu",
        soft_mask=torch.ops.pdp.soft_mask,
        soft_mask_backward=torch.ops.pdp.soft_mask_backward,
    )
    check_soft_mask(native, weight, threshold, tau, data.draw(st.booleans()))


def test_forward_allocates_one_tensor():
    """It returns w_hat and, of a fixed size, t and tau."""
    weight = torch.randn(1 << 20)
    threshold = pdp_threshold(weight, 0.9)
    with torch.profiler.profile(profile_memory=True) as profile:
        pdp_mask(weight, threshold=threshold)
    allocated = sum(
        event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0
    )
    assert weight.nbytes <= allocated <= weight.nbytes + 4096


def test_saves_only_the_weight_and_two_scalars_for_the_backward():
    weight = torch.randn(1000, requires_grad=True)
    w_hat = pdp_mask(weight, 0.9, out_dtype=torch.bfloat16)
    saved = w_hat.grad_fn.saved_tensors
    assert saved[0] is weight
    assert [tuple(tensor.shape) for tensor in saved[1:]] == [(), ()]
