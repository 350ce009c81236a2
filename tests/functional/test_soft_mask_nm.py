"""N:M masks: exactly N of M kept, masks and gradients within the error budget, on every layout."""

import math

import pytest
import torch
from torch.func import grad, vmap

from pdp_kernels import hard_mask_nm, pdp_mask, pdp_mask_nm
from pdp_kernels.ops import reference
from tests.support.backends import on_device
from tests.support.masks import check_hard_mask_nm, check_soft_mask_nm, scalar, shape_of_groups
from tests.support.parameters import by_turns
from tests.support.weights import DTYPES, SPECIAL, weight_of

TABLE_6 = [(2, 4), (4, 8), (1, 4), (2, 8)]
UNUSUAL = [(1, 2), (3, 5), (6, 7), (5, 32), (31, 32)]
TWO = torch.tensor(2)  # pruned members


@pytest.mark.parametrize(
    "pattern, dtype, dim, relative", by_turns(TABLE_6, DTYPES, [0, -1], [False, True]), ids=str
)
def test_every_pattern_stays_within_budget(masking, pattern, dtype, dim, relative):
    n, m = pattern
    weight = torch.randn(shape_of_groups(m, dim)).to(dtype)
    check_soft_mask_nm(masking, weight, m, m - n, dim, relative)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("n, m", UNUSUAL)
def test_unusual_patterns_stay_within_budget(masking, n, m, dim):
    weight = torch.randn(shape_of_groups(m, dim))
    check_soft_mask_nm(masking, weight, m, m - n, dim, True)
    check_hard_mask_nm(masking, weight.round(), m, m - n, dim)


@pytest.mark.parametrize("pruned", [0, 1, 2, 3])
def test_each_number_of_pruned_members_stays_within_budget(masking, pruned):
    weight = torch.randn(21, 8)
    check_soft_mask_nm(masking, weight, 4, pruned, 1, False)
    check_hard_mask_nm(masking, weight, 4, pruned, 1)


@pytest.mark.parametrize("relative", [False, True], ids=["tau", "relative_tau"])
@pytest.mark.parametrize("pruned", [-3, 4, 2**40])
def test_counts_beyond_a_group_prune_none_or_all(masking, pruned, relative):
    weight = torch.randn(21, 8)
    count = torch.tensor([pruned])
    given = on_device(masking, weight, scalar(weight, 0.1), 4, count, 1, relative)
    w_hat, mask = masking.soft_mask_nm(*given, None, True)
    kept = masking.hard_mask_nm(*on_device(masking, weight, 4, count, 1))
    grad = masking.soft_mask_nm_backward(*on_device(masking, torch.ones_like(weight), None), *given)
    all_or_none = 1 if pruned < 0 else 0
    assert (mask == all_or_none).all() and (grad == all_or_none).all()
    assert (kept == all_or_none).all()
    assert torch.equal(w_hat.cpu(), weight * all_or_none)


@pytest.mark.parametrize("distribution", ["denormals", "signed zeros", "few distinct"])
def test_special_values_stay_within_budget(masking, distribution):
    for dtype in (torch.float32, torch.bfloat16):
        weight = weight_of(distribution, 480, dtype).view(20, 24)
        check_soft_mask_nm(masking, weight, 4, 2, 1, True)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**120])
def test_a_relative_temperature_makes_masks_independent_of_the_scale(masking, scale):
    weight = torch.randn(21, 8)
    rest = (scalar(weight, 0.1), 4, TWO, 1, True)
    masks = [
        masking.soft_mask_nm(*on_device(masking, each, *rest), None, True)[1]
        for each in (weight, weight * scale)
    ]
    assert torch.equal(*masks)


def test_nothing_pruned_is_the_identity(device):
    weight = torch.randn(6, 8, device=device, requires_grad=True)
    w_hat, mask = pdp_mask_nm(weight, 2, 4, pruned=0, return_mask=True)
    assert torch.equal(w_hat, weight)
    assert (mask == 1).all()
    (own,) = torch.autograd.grad(w_hat.sum(), weight)
    assert (own == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, m", TABLE_6)
def test_hard_mask_prunes_ties_by_lowest_index(masking, n, m, dtype):
    for dim in (0, 1):
        check_hard_mask_nm(
            masking, torch.randint(-2, 3, shape_of_groups(m, dim)).to(dtype), m, m - n, dim
        )
        check_hard_mask_nm(
            masking, torch.full(shape_of_groups(m, dim), 0.3).to(dtype), m, m - n, dim
        )


@pytest.mark.parametrize("distribution", SPECIAL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_mask_of_special_values_is_exact(masking, distribution, dtype):
    check_hard_mask_nm(masking, weight_of(distribution, 480, dtype).view(20, 24), 4, 2, 1)


def test_hard_mask_is_where_the_soft_mask_exceeds_one_half(device):
    weight = torch.randn(40, 16, device=device)
    for n, m in TABLE_6:
        _, mask = pdp_mask_nm(weight, n, m, return_mask=True)
        assert torch.equal(hard_mask_nm(weight, n, m), mask > 0.5)


def test_hand_computed():
    weight = torch.tensor([0.1, -0.4, 0.3, 0.2, 5.0, 5.0, -5.0, 5.0], dtype=torch.float64)
    w_hat, mask = pdp_mask_nm(weight, 2, 4, tau=0.05, return_mask=True)
    # The first group's t is 0.25; in the second all are at t.
    expected = [1 / (1 + math.exp(-(w * w - 0.0625) / 0.05)) for w in weight[:4].tolist()]
    assert mask.tolist() == pytest.approx(expected + [0.5] * 4, rel=1e-14)
    assert torch.equal(w_hat, mask * weight)
    assert hard_mask_nm(weight, 2, 4).int().tolist() == [0, 1, 1, 0, 0, 0, 1, 1]


def test_each_group_is_a_layer_of_its_own(device):
    weight = torch.randn(5, 12, device=device)
    w_hat = pdp_mask_nm(weight, 1, 4, relative_tau=0.3)
    for group, result in zip(weight.view(-1, 4), w_hat.view(-1, 4), strict=True):
        torch.testing.assert_close(result, pdp_mask(group, 0.75, relative_tau=0.3))


def test_nan_and_inf_stay_in_their_own_groups(masking):
    clean, dirty = torch.randn(2, 10, 8)
    dirty = clean.clone()
    dirty[0, 1], dirty[3, 4], dirty[9, 7] = math.nan, math.inf, -math.inf
    others = torch.ones(10, 2, dtype=torch.bool)
    others[0, 0] = others[3, 1] = others[9, 1] = False
    results = []
    for weight in (clean, dirty):
        given = on_device(masking, weight, scalar(weight, 0.1), 4, TWO, 1, True)
        w_hat = masking.soft_mask_nm(*given, None, False)[0]
        back = masking.soft_mask_nm_backward(*on_device(masking, clean, None), *given)
        results.append([reference.groups(r.cpu(), 4, 1)[others] for r in (w_hat, back)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("relative", [False, True])
def test_where_all_are_pruned_nan_spreads_to_no_other_member(masking, relative):
    weight = torch.tensor([[1.0, 2.0, math.nan, 3.0]])
    given = on_device(masking, weight, scalar(weight, 1.0), 4, torch.tensor(4), 1, relative)
    w_hat, mask = masking.soft_mask_nm(*given, None, True)
    back = masking.soft_mask_nm_backward(*on_device(masking, weight, weight), *given)
    for found in (w_hat, mask, back):
        assert torch.equal(found.cpu().isnan(), weight.isnan())
        assert not found.nan_to_num().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_give_the_same_numbers_and_dense_ones_keep_their_strides(masking, dtype):
    base = torch.randn(4, 8, 3, 5).to(dtype)
    tau = scalar(base, 0.1)
    dense = [base.to(memory_format=torch.channels_last), base.transpose(1, 2).contiguous().mT]
    dense[1] = dense[1].permute(0, 3, 2, 1)  # sizes 4, 3, 5, 8 become 4, 5, 8, 3
    copied = [base[:, :, :, ::2], base[:1].expand(4, -1, -1, -1)]
    for weight in [*dense, *copied]:
        dim = list(weight.shape).index(8)
        given = (tau, 4, TWO, dim, True)
        rows = masking.soft_mask_nm(*on_device(masking, weight.contiguous(), *given), None, True)
        own = masking.soft_mask_nm(*on_device(masking, weight, *given), None, True)
        assert torch.equal(own[0], rows[0]) and torch.equal(own[1], rows[1])
        kept = masking.hard_mask_nm(*on_device(masking, weight, 4, TWO, dim))
        assert torch.equal(kept.cpu(), reference.hard_mask_nm(weight, 4, TWO, dim))
        grad_w_hat = torch.randn(weight.shape).to(dtype)
        back = masking.soft_mask_nm_backward(*on_device(masking, grad_w_hat, None, weight, *given))
        rows_back = masking.soft_mask_nm_backward(
            *on_device(masking, grad_w_hat, None, weight.contiguous(), *given)
        )
        assert torch.equal(back, rows_back)
        if any(weight is one for one in dense):
            assert own[0].stride() == back.stride() == kept.stride() == weight.stride()


def test_every_out_dtype_stays_within_budget(masking):
    for dtype in DTYPES:
        check_soft_mask_nm(masking, torch.randn(9, 8).to(dtype), 4, 2, 1, True, torch.bfloat16)


def test_bitwise_repeatable_on_any_number_of_threads(masking, set_threads):
    weight = torch.randn(1000, 40)  # more than two threads' grains of weights
    given = on_device(masking, weight, scalar(weight, 0.1), 4, TWO, 1, False)
    first = masking.soft_mask_nm(*given, None, False)[0]
    for threads in (1, 1, 2, 3):
        set_threads(threads)
        assert torch.equal(masking.soft_mask_nm(*given, None, False)[0], first)


@pytest.mark.parametrize("relative", [False, True], ids=["tau", "relative_tau"])
def test_gradcheck(device, relative):
    """Nudge only members that t does not depend on: the gradient takes t for a constant."""
    outer = torch.tensor([[0.1, 0.9], [-0.2, 1.3]], dtype=torch.float64, device=device)
    inner = torch.tensor([[0.5, 0.7], [0.5, -0.8]], dtype=torch.float64, device=device)
    tau = {"relative_tau" if relative else "tau": 0.4}

    def masked(free):
        return pdp_mask_nm(torch.cat([free, inner], dim=1), 2, 4, return_mask=True, **tau)

    assert torch.autograd.gradcheck(masked, outer.requires_grad_())


def test_gradient_is_that_of_the_mask_at_constant_thresholds(device):
    """Compare every member with autograd through Eq. 1."""
    weight = torch.randn(6, 8, dtype=torch.float64, device=device, requires_grad=True)
    t = reference.group_thresholds(weight.detach(), 4, TWO.to(device), 1)
    grouped = reference.groups(weight, 4, 1)
    by_autograd = torch.sigmoid((grouped**2 - t**2) / 0.1) * grouped
    (expected,) = torch.autograd.grad(by_autograd.square().sum(), weight)
    (own,) = torch.autograd.grad(pdp_mask_nm(weight, 2, 4, tau=0.1).square().sum(), weight)
    torch.testing.assert_close(own, expected)


def test_vmap_and_func_grad(device):
    weights = torch.randn(3, 8, 5, device=device)

    def masked(weight):
        return pdp_mask_nm(weight, 2, 4, dim=0, tau=0.1)

    assert torch.equal(vmap(masked)(weights), torch.stack([masked(w) for w in weights]))
    loss = grad(lambda w: masked(w).square().sum())
    assert torch.equal(vmap(loss)(weights), torch.stack([loss(w) for w in weights]))
    kept = vmap(lambda w: hard_mask_nm(w, dim=0))(weights)
    assert torch.equal(kept, torch.stack([hard_mask_nm(w, dim=0) for w in weights]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(device, dynamic):
    torch.compiler.reset()

    def masked(weight):
        return pdp_mask_nm(weight, 2, 4, relative_tau=0.3, out_dtype=torch.bfloat16)

    compiled = torch.compile(masked, fullgraph=True, dynamic=dynamic)
    weight = torch.randn(6, 16, device=device, requires_grad=True)
    assert torch.equal(compiled(weight), masked(weight))
    grads = [torch.autograd.grad(f(weight).sum(), weight)[0] for f in (compiled, masked)]
    assert torch.equal(*grads)


def test_compiles_once_for_a_schedule_in_a_tensor(device):
    torch.compiler.reset()
    masked = torch.compile(lambda w, count: pdp_mask_nm(w, 1, 4, pruned=count), fullgraph=True)
    weight = torch.randn(6, 16, device=device, requires_grad=True)
    for pruned in range(4):
        count = torch.tensor(pruned, device=device)
        with torch.compiler.set_stance("default" if pruned == 0 else "fail_on_recompile"):
            found = masked(weight, count)
        expected = pdp_mask_nm(weight, 1, 4, pruned=pruned)
        assert torch.equal(found, expected)
        grads = [torch.autograd.grad(w_hat.sum(), weight)[0] for w_hat in (found, expected)]
        assert torch.equal(*grads)


def test_a_backward_after_the_count_was_written_is_an_error(device):
    """As after a write of tau: the backward would be that of another mask."""
    weight = torch.randn(6, 16, device=device, requires_grad=True)
    count = torch.tensor(1, device=device)
    w_hat = pdp_mask_nm(weight, pruned=count)
    count.fill_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        w_hat.sum().backward()


def test_autocast_writes_w_hat_in_its_dtype(device):
    weight = torch.randn(4, 8, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        w_hat = pdp_mask_nm(weight)
    assert w_hat.dtype == torch.bfloat16
    assert torch.autograd.grad(w_hat.sum(), weight)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"n": 4}, ValueError, "1 <= n < m <= 32, got n = 4, m = 4"),
        ({"n": 0}, ValueError, "got n = 0"),
        ({"n": 2, "m": 33}, ValueError, "got n = 2, m = 33"),
        ({"n": 2.0}, TypeError, "n must be an int, got float"),
        ({"m": 5}, ValueError, r"shape \(6, 8\), dim = -1, m = 5"),
        ({"dim": 0}, ValueError, r"shape \(6, 8\), dim = 0, m = 4"),
        ({"dim": 2}, ValueError, r"shape is \(6, 8\), got 2"),
        ({"dim": True}, TypeError, "dim must be an int, got bool"),
    ],
)
@pytest.mark.parametrize("call", [pdp_mask_nm, hard_mask_nm])
def test_bad_groups_raise(call, options, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(6, 8), **options)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"pruned": 3}, ValueError, r"pruned must be in \[0, m - n\] = \[0, 2\], got 3"),
        ({"pruned": -1}, ValueError, "got -1"),
        ({"pruned": 1.0}, TypeError, "pruned must be an int or a 0-d tensor, got float"),
        ({"pruned": torch.tensor(1.0)}, TypeError, "pruned must have dtype torch.int64, got"),
        ({"pruned": torch.tensor([1])}, ValueError, r"or have shape \(\), got \(1,\)"),
        ({"pruned": torch.tensor(1, device="meta")}, ValueError, "device cpu, got meta"),
        ({"tau": 0}, ValueError, "tau must be positive"),
        ({"tau": 0.1, "relative_tau": 0.1}, ValueError, "at most one of"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype must be"),
    ],
)
def test_bad_options_raise(options, error, message):
    with pytest.raises(error, match=message):
        pdp_mask_nm(torch.randn(6, 8), **options)


def test_bad_weights_raise():
    for call in (pdp_mask_nm, hard_mask_nm):
        with pytest.raises(TypeError, match="weight must have dtype"):
            call(torch.ones(4, 8, dtype=torch.int8))
        with pytest.raises(ValueError, match=r"dimension of weight, whose shape is \(\)"):
            call(torch.tensor(1.0))
