"""Channel masks: norms, masks and gradients within the error budget, on every layout and device."""

import math

import pytest
import torch
from torch.func import grad, vmap

from pdp_kernels import (
    channel_norms,
    channel_report,
    hard_mask_channel,
    pdp_mask,
    pdp_mask_channel,
    pdp_threshold,
    pdp_thresholds,
)
from pdp_kernels.ops import reference
from tests.support.allowances import Allowances
from tests.support.backends import on_device
from tests.support.masks import (
    CHANNEL_SHAPES,
    LARGE_CHANNEL_SHAPES,
    REAL,
    allowance_of_channels,
    check_soft_mask_channel,
)
from tests.support.oracle import answer_of, assert_within_budget, doubled, each_choice
from tests.support.parameters import by_turns
from tests.support.weights import DTYPES, weight_of, with_special_values

# One channel, one weight a channel; channels too long for a program's registers; more channels than
# a tile has; short runs, and many long ones of a channel.
UNUSUAL_SHAPES = [((5, 4, 7), 2), ((1, 50), 0), ((50, 1), 1), ((1300,), 0), ((2, 17_001), 0)]
UNUSUAL_SHAPES += [((33, 9), 0), ((3, 5, 301), 1)]


@pytest.mark.parametrize(
    "shape_and_dim, dtype, relative", by_turns(CHANNEL_SHAPES, DTYPES, [False, True]), ids=str
)
def test_every_shape_stays_within_budget(masking, shape_and_dim, dtype, relative):
    shape, dim = shape_and_dim
    check_soft_mask_channel(masking, torch.randn(shape).to(dtype), dim, relative, rms=relative)


@pytest.mark.parametrize("shape, dim", UNUSUAL_SHAPES, ids=str)
def test_unusual_shapes_stay_within_budget(masking, shape, dim):
    check_soft_mask_channel(masking, torch.randn(shape), dim, True, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, dim", [((2, 9001), 0), ((9001, 3), 1)], ids=str)
def test_channels_of_many_weights_stay_within_budget(masking, shape, dim, dtype):
    check_soft_mask_channel(masking, torch.randn(shape).to(dtype), dim, True, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_products_that_cancel_stay_within_budget(masking, scale, dim, dtype):
    """A low temperature amplifies what rounding leaves of <g, W> = 0."""
    if dtype == torch.float16 and scale != 1:
        scale = {1e-12: 2.0**-10, 1e12: 2.0**10}[scale]
    weight, g = torch.randn(2, 20, 301, dtype=torch.float64)
    other = (1 - dim,)
    g -= weight * ((g * weight).sum(other, True) / weight.square().sum(other, True))
    weight, g = (weight * scale).to(dtype), (g / scale).to(dtype)
    norms = masking.channel_norms(weight.to(masking.device), dim, True).cpu()
    t = pdp_threshold(norms, 0.5)
    rest = (weight, norms, t, torch.tensor(1e-3, dtype=t.dtype), dim, True)
    exact = reference.soft_mask_channel_backward(*doubled(g, None, *rest), True)
    rounded = reference.soft_mask_channel_backward(g, None, *rest, True)
    found = masking.soft_mask_channel_backward(*on_device(masking, g, None, *rest), True)
    allowances = Allowances(masking, norms, t, rest[3], True)
    allowed = allowance_of_channels(allowances, g, None, weight, dim, True)
    assert_within_budget(found, answer_of(exact, rounded), allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_an_address_that_is_no_multiple_of_16_changes_nothing(masking, dim, dtype):
    weight, g = torch.randn(2, 9, 67).to(dtype)
    results = []
    for first in (0, 1):
        views = []
        for values in on_device(masking, weight, g):
            views.append(values.new_empty(values.numel() + 1)[first:][: values.numel()])
            views[-1].copy_(values.flatten())
        own, gradient = (view.view(9, 67) for view in views)
        norms = masking.channel_norms(own, dim, True)
        t = torch.ones_like(norms[0])
        rest = (own, norms, t, t, dim, True)
        w_hat, mask = masking.soft_mask_channel(*rest, None)
        back = masking.soft_mask_channel_backward(gradient, None, *rest, True)
        results.append((norms, w_hat, mask, back))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, dim", LARGE_CHANNEL_SHAPES, ids=str)
def test_large_weights_on_several_threads_stay_within_budget(
    selection, shape, dim, dtype, set_threads
):
    set_threads(3)
    check_soft_mask_channel(selection, torch.randn(shape).to(dtype), dim, True, True)


@pytest.mark.parametrize("rms", [False, True], ids=["l2", "rms"])
@pytest.mark.parametrize("distribution", ["heavy-tailed", "few distinct", "all equal"])
def test_every_distribution_stays_within_budget(masking, distribution, rms):
    for dim in (0, 1):
        weight = weight_of(distribution, 12 * 35, torch.float32).view(12, 35)
        check_soft_mask_channel(masking, weight, dim, True, rms)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_do_not_leave_the_range_of_float32(masking, scale):
    """Squares would: 1e-30 squared is 0, 1e30 squared is inf."""
    weight = torch.randn(20, 31) * scale
    check_soft_mask_channel(masking, weight, 0, True, False, grad_mask_scale=scale)
    norms = masking.channel_norms(torch.full((2, 4), scale).to(masking.device), 0, False)
    assert norms.tolist() == pytest.approx([2 * scale] * 2, rel=1e-7)


# Scales of weights, temperatures, and gradients of w_hat and of the mask, for which the factor of W
# in dW is 10^39 and more, or below 10^-38: out of the range of float32.
EXTREMES = [(1e-20, 1.0, 1.0, 1.0), (1e-38, 0.002, 1.0, 1e-9), (1e30, 1.0, 1e-9, 1.0)]


@pytest.mark.parametrize("scale, tau, g, g_mask", EXTREMES)
@pytest.mark.parametrize(
    "shape, dim", [((3, 2), 0), ((2, 3), 1), ((2, 3, 2), 1), ((70, 2), 0), ((3, 70), 0)]
)
def test_factors_of_gradients_may_leave_the_range_of_float32(
    masking, shape, dim, scale, tau, g, g_mask
):
    weight = (torch.rand(shape) + 1) * scale
    weight.view(-1)[0] = 0  # 0 times an infinite factor would be NaN
    norms = reference.channel_norms(weight, dim, False)
    rest = (weight, norms, norms[1], torch.tensor(tau), dim, True)
    for chosen in each_choice(torch.full(shape, g), torch.full((shape[dim],), g_mask)):
        exact = reference.soft_mask_channel_backward(*doubled(*chosen, *rest), False)
        for operators in (masking, reference):
            given = on_device(masking, *chosen, *rest, False)
            found = operators.soft_mask_channel_backward(*given)
            error = (found.cpu().double() - exact).abs().max()
            assert error <= 5e-6 * exact.abs().max()  # divisions of a GPU are off by 2 ulp


def test_a_subnormal_mask_is_flushed():
    weight = torch.tensor([[0.02, 0.01], [1.0, 1.0]])
    t, tau = torch.tensor(1.0), torch.tensor(1 / 90)  # the mask is e^-90, a subnormal number
    w_hat, mask = pdp_mask_channel(weight, threshold=t, relative_tau=tau, return_mask=True)
    assert mask[0] == 0 and mask[1] > 0 and not w_hat[0].any()
    rest = (weight, channel_norms(weight), t, tau, 0, True)
    grad = torch.ops.pdp.soft_mask_channel_backward(torch.ones(2, 2), None, *rest, False)
    assert (grad[0].abs() < 1e-36).all() and (grad[1] > 0.5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_are_walked_in_place_or_copied(masking, dtype):
    base = torch.randn(3, 8, 2, 4).to(dtype)
    layouts = [
        base.to(memory_format=torch.channels_last),
        base.transpose(0, 1),
        base.permute(3, 1, 2, 0),
        base[:, ::2],
        base[:1].expand(4, -1, -1, -1),
    ]
    for i, weight in enumerate(layouts):
        dim = (i + DTYPES.index(dtype)) % 2
        check_soft_mask_channel(masking, weight, dim, False, False)
    for weight in layouts[:3]:
        shapes = (weight.shape[1], (), ())  # of norms, threshold and temperature
        ones = [torch.ones(shape, dtype=REAL[dtype]) for shape in shapes]
        given = on_device(masking, weight, *ones)
        w_hat, _ = masking.soft_mask_channel(*given, 1, False, None)
        back = masking.soft_mask_channel_backward(
            given[0].contiguous(), None, *given, 1, False, False
        )
        assert w_hat.stride() == back.stride() == weight.stride()


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_out_dtype_stays_within_budget(masking, dtype, out_dtype):
    check_soft_mask_channel(masking, torch.randn(9, 30).to(dtype), 0, True, False, out_dtype)


def test_results_are_bitwise_repeatable_on_any_number_of_threads(masking, set_threads):
    weight, gradient = torch.randn(2, 34, 1001)
    for dim in (0, 1):
        runs = []
        for threads in (1, 2, 3, 1):
            set_threads(threads)
            given = on_device(masking, weight, *(torch.tensor(1.0),) * 2)
            norms = masking.channel_norms(given[0], dim, False)
            rest = (given[0], norms, *given[1:], dim, True)
            back = masking.soft_mask_channel_backward(
                gradient.to(masking.device), None, *rest, False
            )
            runs.append((norms, back))
        for norms, back in runs[1:]:
            assert torch.equal(norms, runs[0][0]) and torch.equal(back, runs[0][1])


def test_a_channel_that_is_not_finite_keeps_to_itself(masking):
    weight = torch.randn(9, 40)
    weight[2] = with_special_values(40, torch.float32)
    weight[5, 3] = math.nan
    rest = on_device(masking, weight, torch.tensor(1.0), torch.tensor(0.1))
    norms = masking.channel_norms(rest[0], 0, False)
    w_hat, mask = masking.soft_mask_channel(rest[0], norms, *rest[1:], 0, True, None)
    clean = torch.tensor([i for i in range(9) if i not in (2, 5)])
    assert norms.isfinite().cpu().nonzero().flatten().tolist() == clean.tolist()
    assert w_hat.cpu()[clean].isfinite().all()
    assert w_hat[5].isnan().all() and mask[5].isnan()


def test_channels_of_zeros_get_no_gradient_through_their_norm(device):
    weight = torch.zeros(4, 3, device=device)
    weight[1:] = torch.randn(3, 3)
    weight.requires_grad_()
    for temperature in ({"tau": 0.1}, {"relative_tau": 0.3}):
        w_hat, mask = pdp_mask_channel(weight, 0.25, return_mask=True, **temperature)
        (own,) = torch.autograd.grad(w_hat.sum() + mask.sum(), weight, retain_graph=True)
        (through_norms,) = torch.autograd.grad(mask.sum(), weight)
        assert own.isfinite().all() and through_norms.isfinite().all()
        assert through_norms[1:].any() and not through_norms[0].any()
        # Each pass computes m anew, and on a GPU with divisions and exponentials of its own.
        torch.testing.assert_close(own[0], mask[0].detach().expand(3), rtol=1e-5, atol=0)


def test_empty_weights_have_empty_masks(device):
    for shape, dim in (((0, 3), 0), ((3, 0), 0), ((0,), 0)):
        weight = torch.empty(shape, device=device, requires_grad=True)
        w_hat, mask = pdp_mask_channel(weight, 0.5, dim=dim, norm="rms", return_mask=True)
        w_hat.sum().backward()
        assert w_hat.shape == weight.grad.shape == shape
        assert mask.shape == channel_norms(weight, dim).shape == shape[dim : dim + 1]
        assert not mask.isnan().any()


def test_hand_computed():
    weight = torch.tensor([[3.0, 4.0], [0.3, 0.4], [6.0, 8.0], [0.0, 1.0]], dtype=torch.float64)
    assert channel_norms(weight).tolist() == pytest.approx([5, 0.5, 10, 1], rel=1e-15)
    assert channel_norms(weight, norm="rms")[0].item() == pytest.approx(5 / math.sqrt(2))
    # Half of the channels: t is 3. m = sigmoid((s^2 - 9) / 8), at s = 1 that is sigmoid(-1).
    weight.requires_grad_()
    w_hat, mask = pdp_mask_channel(weight, 0.5, tau=8.0, return_mask=True)
    m = 1 / (1 + math.e)
    assert mask[3].item() == pytest.approx(m, rel=1e-14)
    assert w_hat[3].tolist() == pytest.approx([0, m], rel=1e-14)
    gradient = torch.zeros(4, 2, dtype=torch.float64)
    gradient[3] = torch.tensor([2.0, 3.0])
    (own,) = torch.autograd.grad(w_hat, weight, gradient)
    # m g + 2/8 m (1 - m) <g, W> W with <g, W> = 3 and W = (0, 1).
    assert own[3].tolist() == pytest.approx([2 * m, 3 * m + 0.25 * m * (1 - m) * 3], rel=1e-14)


def test_a_channel_of_one_weight_is_masked_as_a_weight(device):
    weight = torch.randn(40, device=device, dtype=torch.float64, requires_grad=True)
    t = pdp_threshold(weight, 0.5)
    own, plain = (
        torch.autograd.grad(call(weight, threshold=t, tau=0.3).square().sum(), weight)[0]
        for call in (pdp_mask_channel, pdp_mask)
    )
    torch.testing.assert_close(own, plain, rtol=1e-12, atol=0)


def test_hard_mask_keeps_all_but_k_channels(device):
    weight = torch.randn(30, 5, 2, device=device)
    weight[10:20] = weight[:10]  # ties, of which the lower index goes first
    for dim, sparsity in ((0, 0.5), (0, 0.9), (1, 0.4), (-1, 1.0), (0, 0.0)):
        kept = hard_mask_channel(weight, sparsity, dim)
        count = weight.shape[dim]
        order = channel_norms(weight, dim).cpu().sort(stable=True).indices
        expected = torch.ones(count, dtype=torch.bool)
        expected[order[: math.floor(sparsity * count + 0.5)]] = False
        assert torch.equal(kept.cpu(), expected)


def test_hard_mask_is_where_the_soft_mask_exceeds_one_half(device):
    weight = torch.randn(64, 20, device=device)
    for norm in ("l2", "rms"):
        _, mask = pdp_mask_channel(weight, 0.7, norm=norm, return_mask=True)
        assert torch.equal(hard_mask_channel(weight, 0.7, norm=norm), mask > 0.5)


def test_rms_is_l2_with_a_temperature_of_the_fan_in(device):
    weight = torch.randn(16, 25, device=device, dtype=torch.float64)
    rms = pdp_mask_channel(weight, 0.5, tau=0.01, norm="rms")
    torch.testing.assert_close(rms, pdp_mask_channel(weight, 0.5, tau=0.25), rtol=1e-12, atol=0)


def test_thresholds_of_many_layers_at_once(device):
    layers = [torch.randn(shape, device=device) for shape in ((8, 5), (30, 3, 3), (4, 100))]
    thresholds = pdp_thresholds([channel_norms(layer) for layer in layers], [0.5, 0.9, 0.25])
    for layer, t, sparsity in zip(layers, thresholds, [0.5, 0.9, 0.25], strict=True):
        assert torch.equal(pdp_mask_channel(layer, threshold=t), pdp_mask_channel(layer, sparsity))


@pytest.mark.parametrize("norm", ["l2", "rms"])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gradcheck_goes_through_the_norm(device, dim, norm):
    weight = torch.randn(4, 3, 5, dtype=torch.float64, device=device, requires_grad=True)
    t = torch.tensor(1.5, dtype=torch.float64, device=device)
    for temperature in ({"tau": 0.5}, {"relative_tau": 0.3}):
        for return_mask in (False, True):
            assert torch.autograd.gradcheck(
                lambda w, chosen=temperature | {"return_mask": return_mask}: pdp_mask_channel(
                    w, threshold=t, dim=dim, norm=norm, **chosen
                ),
                weight,
            )


def test_differentiating_twice_is_an_error(device):
    weight = torch.randn(4, 3, device=device, requires_grad=True)
    (first,) = torch.autograd.grad(pdp_mask_channel(weight, 0.5).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        first.sum().backward()


def test_vmap_and_func_grad(device):
    weights = torch.randn(3, 6, 4, dtype=torch.float64, device=device)

    def loss(weight):
        return pdp_mask_channel(weight, 0.5, relative_tau=0.3).pow(3).sum()

    expected = torch.stack([grad(loss)(weight) for weight in weights])
    assert torch.equal(vmap(grad(loss))(weights), expected)
    norms = vmap(lambda w: channel_norms(w, 1))(weights)
    assert torch.equal(norms, torch.stack([channel_norms(w, 1) for w in weights]))


def test_autocast_writes_w_hat_and_mask_in_its_dtype(device):
    weight = torch.randn(8, 5, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        w_hat, mask = pdp_mask_channel(weight, 0.5, return_mask=True)
    assert w_hat.dtype == mask.dtype == torch.bfloat16
    assert torch.autograd.grad(w_hat.sum(), weight)[0].dtype == torch.float32


def test_saves_the_weight_its_norms_and_two_scalars():
    weight = torch.randn(30, 20, requires_grad=True)
    w_hat = pdp_mask_channel(weight, 0.5)
    saved = w_hat.grad_fn.saved_tensors
    assert saved[0] is weight
    assert [tuple(tensor.shape) for tensor in saved[1:]] == [(30,), (), ()]


def test_report_names_dead_channels():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 1, groups=2), torch.nn.Linear(5, 6)
    )
    with torch.no_grad():
        model[0].weight[[1, 3]] = 0
        model[0].bias[3] = 0
        model[0].weight[:, 2] = 0
    assert channel_report(model) == [("0", 4, [1, 3], [1]), ("1", 4, [], []), ("2", 6, [], [])]
    assert channel_report(model, dim=1) == [("0", 3, [2], []), ("2", 5, [], [])]
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Tensor"):
        channel_report(torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"dim must be 0 \(outputs\) or 1 \(inputs\), got 2"):
        channel_report(model, dim=2)
    with pytest.raises(TypeError, match="dim must be an int, got float"):
        channel_report(model, dim=1.0)
