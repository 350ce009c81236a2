"""Weights of more than 2^31 elements: every element is reached, and none at another's place.

Fresh memory is NaN, so what is not written shows. Each test takes up to 20 GB.
"""

import pytest
import torch

from pdp_kernels import compress_2to4, hard_mask, pdp_mask, pdp_threshold, pq_index
from pdp_kernels.ops import reference

pytestmark = [pytest.mark.gpu, pytest.mark.large]

BEYOND_INT32 = 2**31


def zeros_but_the_last_two(*shape):
    weight = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    weight.view(-1)[-2:] = torch.tensor([1.0, 0.25])
    return weight


def number(value):
    return torch.tensor(value, device="cuda")


def test_threshold_and_hard_mask_are_exact():
    weight = zeros_but_the_last_two(BEYOND_INT32 + 5)
    size = weight.numel()
    ratio = torch.tensor((size - 1) / size, dtype=torch.float64, device="cuda")
    assert pdp_threshold(weight, ratio) == 0.625
    kept = hard_mask(weight, ratio)
    assert kept[-1].item() is False and kept[-2].item() is True
    assert kept.count_nonzero() == 1


def test_digit_counts_are_exact():
    weight = zeros_but_the_last_two(BEYOND_INT32 + 5)
    prefixes = torch.zeros(1, dtype=torch.int64, device="cuda")
    counts, above = torch.ops.pdp.digit_counts([weight], prefixes, 1)
    assert counts[0, 0] == counts.sum() == weight.numel() - 2
    assert above.item() == reference.magnitude_keys(weight[-1:]).item()


def test_pq_index_is_right():
    weight = zeros_but_the_last_two(BEYOND_INT32 + 5)
    expected = 1 - 1.5**2 / 1.25 / weight.numel()
    assert pq_index(weight).item() == pytest.approx(expected, rel=1e-12)


def test_mask_and_its_gradient_are_right():
    weight = zeros_but_the_last_two(BEYOND_INT32 + 5).requires_grad_()
    w_hat = pdp_mask(weight, threshold=number(0.5))
    assert w_hat[-2:].tolist() == [1, 0]
    assert not w_hat[:-2].any()
    (grad,) = torch.autograd.grad(w_hat, weight, torch.ones_like(weight))
    assert grad[-2:].tolist() == [1, 0]
    assert not grad[:-2].any()


def test_masks_of_a_list_and_their_gradients_are_right():
    weight = zeros_but_the_last_two(BEYOND_INT32 + 5)
    weights = [weight[:3], weight[-3:], weight]
    rest = (number(0.5).expand(3), number(1e-4).expand(3), False)
    first, last, w_hat = torch.ops.pdp.soft_mask_list(weights, *rest, None)
    assert last.tolist() == [0, 1, 0]
    assert torch.equal(w_hat[-3:], last) and not w_hat[:-2].any() and not first.any()
    del w_hat
    grads = [None, None, torch.ones_like(weight)]
    grad = torch.ops.pdp.soft_mask_list_backward(grads, weights, *rest)[2]
    assert grad[-2:].tolist() == [1, 0]
    assert not grad[:-2].any()


def test_n_m_masks_along_rows_are_right():
    """t is 0.125 in the last group, 0 in the others; there is nothing between."""
    weight = zeros_but_the_last_two(BEYOND_INT32 // 4 + 3, 4)
    given = (number(1e-4), 4, number(2), 1, False)
    w_hat, _ = torch.ops.pdp.soft_mask_nm(weight, *given, None, False)
    assert torch.equal(w_hat, weight)
    del w_hat
    grad = torch.ops.pdp.soft_mask_nm_backward(torch.ones_like(weight), None, weight, *given)
    assert grad[-1].tolist() == [0, 0, 1, 1]
    assert (grad[:-1] == 0.5).all()
    del grad
    kept = torch.ops.pdp.hard_mask_nm(weight, 4, number(2), 1)
    assert torch.equal(kept.all(0), torch.tensor([False, False, True, True], device="cuda"))
    assert not kept[:, :2].any()


def test_n_m_along_columns_whose_members_lie_more_than_2_to_31_apart():
    weight = torch.zeros(4, BEYOND_INT32 * 3 // 8, dtype=torch.bfloat16, device="cuda")
    weight[1:3] = 1.0
    given = (number(1e-4), 4, number(2), 0, False)
    w_hat, _ = torch.ops.pdp.soft_mask_nm(weight, *given, None, False)
    assert torch.equal(w_hat, weight)
    del w_hat
    kept = torch.ops.pdp.hard_mask_nm(weight, 4, number(2), 0)
    assert kept[1:3].all() and not kept[0].any() and not kept[3].any()


@pytest.mark.parametrize("dim", [0, 1])
def test_channel_masks_are_right(dim):
    columns = 2**15
    weight = torch.zeros(BEYOND_INT32 // columns + 1, columns, dtype=torch.bfloat16, device="cuda")
    weight[-1, -1] = 1.0
    norms = torch.ops.pdp.channel_norms(weight, dim, False)
    assert norms[-1] == 1 and not norms[:-1].any()
    given = (norms, number(0.5), number(1e-4), dim, False)
    w_hat, mask = torch.ops.pdp.soft_mask_channel(weight, *given, None)
    assert mask[-1] == 1 and not mask[:-1].any()
    assert torch.equal(w_hat, weight)
    del w_hat
    ones = torch.ones_like(weight)
    grad = torch.ops.pdp.soft_mask_channel_backward(ones, None, weight, *given, False)
    last = grad.select(dim, -1)
    assert (last == 1).all()
    assert grad.count_nonzero() == last.numel()


def test_packed_weights_are_right():
    """Rows that repeat have values and metadata that repeat."""
    rows, blocks = 64, 33
    weight = torch.randn(rows, max(64, BEYOND_INT32 // 2**11), device="cuda").bfloat16()
    expected, expected_metadata = compress_2to4(weight)
    values, metadata = compress_2to4(weight.repeat(blocks, 1))
    assert (values.view(blocks, rows, -1) == expected).all()
    # The words of two columns lie together, in the order of the rows.
    words = metadata.view(-1, blocks, 2 * rows)
    assert (words == expected_metadata.view(-1, 1, 2 * rows)).all()
