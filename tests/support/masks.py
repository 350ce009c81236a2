"""Soft masks of a backend, held against the oracle: one function for each kind of mask."""

import torch

from pdp_kernels import pdp_threshold
from pdp_kernels.ops import reference
from tests.support.allowances import Allowances, largest
from tests.support.backends import on_device
from tests.support.oracle import (
    answer,
    answer_of,
    assert_within_budget,
    doubled,
    each_choice,
    gradients_for,
    with_neighbours,
)
from tests.support.weights import DTYPES

REAL = {dtype: reference.threshold_dtype([torch.empty(0, dtype=dtype)]) for dtype in DTYPES}


def scalar(weight, value):
    """Return a threshold or temperature in the dtype that goes with a weight."""
    return torch.tensor(value, dtype=REAL[weight.dtype])


def _soft_mask_answers(weight, t, tau, relative, out_dtype):
    stack, rest = with_neighbours(weight), (t, tau, relative)
    exact = reference.soft_mask(*doubled(stack, *rest), None, True)
    rounded = reference.soft_mask(stack, *rest, out_dtype, True)
    results = tuple(answer_of(*pair, stacked=True) for pair in zip(exact, rounded, strict=True))
    grads = gradients_for(weight.shape, weight.shape, dtype=out_dtype)
    backward = tuple(
        answer_of(
            reference.soft_mask_backward(*doubled(*chosen, stack, *rest)),
            reference.soft_mask_backward(*chosen, stack, *rest),
            stacked=True,
        )
        for chosen in each_choice(*grads)
    )
    return grads, results, backward


def check_soft_mask(backend, weight, threshold, tau, relative, out_dtype=None):
    """Check the forward with its mask, and the backward through either result and both."""
    rest = (scalar(weight, threshold), scalar(weight, tau), relative)
    out_dtype = out_dtype or weight.dtype
    grads, results, backward = answer(_soft_mask_answers, weight, *rest, out_dtype)
    allowances = Allowances(backend, weight, *rest)
    found = backend.soft_mask(*on_device(backend, weight, *rest), out_dtype, True)
    for actual, expected, factor in zip(found, results, (weight, 1), strict=True):
        assert_within_budget(actual, expected, largest(factor * allowances.mask))
    for chosen, expected in zip(each_choice(*grads), backward, strict=True):
        actual = backend.soft_mask_backward(*on_device(backend, *chosen, weight, *rest))
        assert_within_budget(actual, expected, allowances.of_gradient(*chosen))


SINGLE = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (0,), (1,), (7,), (33, 3), (4097,), (5, 8, 3, 3)]


def layers(dtypes, scale=1.0):
    """Return weights of every shape, by turns of the dtypes; the last is channels_last."""
    weights = [
        (scale * torch.randn(shape)).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(SHAPES)
    ]
    weights[-1] = weights[-1].to(memory_format=torch.channels_last)
    return weights


def table(weights, low, high):
    """Return one number for each weight, with the stride of a table's column."""
    columns = torch.full((len(weights), 4), torch.nan, dtype=REAL[weights[0].dtype])
    columns[:, 1] = torch.linspace(low, high, len(weights))
    return columns[:, 1]


def check_soft_mask_list(backend, weights, thresholds, taus, relative, out_dtype=None):
    """Check the forward, and the backward of gradients in the output's dtype."""
    layers = list(zip(weights, thresholds, taus, strict=True))
    rest = on_device(backend, thresholds, taus, relative)
    # The answers of soft_mask, of which the first result and the first choice of gradients count.
    answers = [
        answer(_soft_mask_answers, *layer, relative, out_dtype or layer[0].dtype)
        for layer in layers
    ]
    allowances = [Allowances(backend, *layer, relative) for layer in layers]
    on_its_device = [weight.to(backend.device) for weight in weights]
    found = backend.soft_mask_list(on_its_device, *rest, out_dtype)
    for weight, actual, (_, results, _), allowed in zip(
        weights, found, answers, allowances, strict=True
    ):
        assert_within_budget(actual, results[0], largest(weight * allowed.mask))
    grads = [each[0][0] for each in answers]
    gradients = [grad.to(backend.device) for grad in grads]
    found = backend.soft_mask_list_backward(gradients, on_its_device, *rest)
    for grad, actual, (_, _, backward), allowed in zip(
        grads, found, answers, allowances, strict=True
    ):
        assert_within_budget(actual, backward[0], allowed.of_gradient(grad, None))


def shape_of_groups(m, dim):
    """Return a shape with more groups than a block of the native kernel, none a power of two."""
    other = 3 if m > 8 else 37
    return (other, 3 * m) if dim in (-1, 1) else (3 * m, other)


def _soft_mask_nm_answers(weight, tau, m, pruned, dim, relative, out_dtype):
    given = (weight, tau, m, pruned, dim, relative)
    exact = reference.soft_mask_nm(*doubled(*given), None, True)
    rounded = reference.soft_mask_nm(*given, out_dtype, True)
    results = tuple(answer_of(*pair) for pair in zip(exact, rounded, strict=True))
    grads = gradients_for(weight.shape, weight.shape, dtype=out_dtype)
    backward = tuple(
        answer_of(
            reference.soft_mask_nm_backward(*doubled(*chosen, *given)),
            reference.soft_mask_nm_backward(*chosen, *given),
        )
        for chosen in each_choice(*grads)
    )
    return grads, results, backward


def check_soft_mask_nm(backend, weight, m, pruned, dim, relative, out_dtype=None):
    """Check the forward with its mask, and the backward through either result and both."""
    dim, tau, pruned = dim % weight.dim(), scalar(weight, 0.1), torch.tensor(pruned)
    given = (weight, tau, m, pruned, dim, relative)
    out_dtype = out_dtype or weight.dtype
    grads, results, backward = answer(_soft_mask_nm_answers, *given, out_dtype)
    groups = reference.groups(weight, m, dim)
    thresholds = reference.group_thresholds(weight, m, pruned, dim)
    allowances = Allowances(backend, groups, thresholds, tau, relative)
    found = backend.soft_mask_nm(*on_device(backend, *given), out_dtype, True)
    for actual, expected, factor in zip(found, results, (groups, 1), strict=True):
        assert_within_budget(actual, expected, largest(factor * allowances.mask))
    for chosen, expected in zip(each_choice(*grads), backward, strict=True):
        by_group = [None if grad is None else reference.groups(grad, m, dim) for grad in chosen]
        actual = backend.soft_mask_nm_backward(*on_device(backend, *chosen, *given))
        assert_within_budget(actual, expected, allowances.of_gradient(*by_group))


def check_hard_mask_nm(backend, weight, m, pruned, dim):
    """Check that each group keeps the reference's weights, m - pruned of them."""
    count, dim = torch.tensor(pruned), dim % weight.dim()
    kept = backend.hard_mask_nm(*on_device(backend, weight, m, count, dim)).cpu()
    assert torch.equal(kept, reference.hard_mask_nm(weight.double(), m, count, dim))
    assert (reference.groups(kept, m, dim).sum(-1) == m - pruned).all()


# Shapes and dims: rows, columns, the inside of a kernel.
CHANNEL_SHAPES = [((33, 70), 0), ((9, 70), 1), ((4, 20, 3, 3), 1)]
# For backends that are not interpreted: several pieces of runs, of rows, and threads to share them.
LARGE_CHANNEL_SHAPES = [
    ((70, 40_001), 0),
    ((3, 200_003), 0),
    ((300, 1100), 1),
    ((500, 40, 3, 3), 1),
]


def _norm_answer(weight, dim, rms):
    exact = reference.channel_norms(weight.double(), dim, rms)
    return answer_of(exact, reference.channel_norms(weight, dim, rms))


def _soft_mask_channel_answers(
    weight, norms, t, tau, dim, relative, rms, out_dtype, grad_mask_scale
):
    rest = (norms, t, tau, dim, relative)
    exact = reference.soft_mask_channel(*doubled(weight, *rest), None)
    rounded = reference.soft_mask_channel(weight, *rest, out_dtype)
    results = tuple(answer_of(*pair) for pair in zip(exact, rounded, strict=True))
    grad_w_hat, grad_mask = gradients_for(weight.shape, norms.shape, dtype=out_dtype)
    grads = grad_w_hat, grad_mask * grad_mask_scale
    backward = tuple(
        answer_of(
            reference.soft_mask_channel_backward(*doubled(*chosen, weight, *rest), rms),
            reference.soft_mask_channel_backward(*chosen, weight, *rest, rms),
        )
        for chosen in each_choice(*grads)
    )
    return grads, results, backward


def check_soft_mask_channel(
    backend, weight, dim, relative, rms, out_dtype=None, tau=0.1, grad_mask_scale=1
):
    """Check the norms, the forward, and the backward through either result and both."""
    out_dtype = out_dtype or weight.dtype
    norms = backend.channel_norms(weight.to(backend.device), dim, rms).cpu()
    assert_within_budget(norms, answer(_norm_answer, weight, dim, rms))

    t = pdp_threshold(norms, 0.5)
    if not t.isfinite():
        t = norms.max()  # of one channel
    size = norms.square().mean().item() or 1.0
    rest = (norms, t, scalar(weight, tau if relative else tau * size), dim, relative)
    given = (weight, *rest, rms, out_dtype, grad_mask_scale)
    grads, results, backward = answer(_soft_mask_channel_answers, *given)
    allowances = Allowances(backend, norms, t, rest[2], relative)
    of_mask = reference.along(allowances.mask, weight, dim)
    found = backend.soft_mask_channel(*on_device(backend, weight, *rest), out_dtype)
    for actual, expected, factor in zip(found, results, (weight, 1), strict=True):
        assert_within_budget(actual, expected, largest(factor * of_mask))
    for chosen, expected in zip(each_choice(*grads), backward, strict=True):
        actual = backend.soft_mask_channel_backward(
            *on_device(backend, *chosen, weight, *rest), rms
        )
        allowed = allowance_of_channels(allowances, *chosen, weight, dim, rms)
        assert_within_budget(actual, expected, allowed)


def allowance_of_channels(allowances, grad_w_hat, grad_mask, weight, dim, rms):
    """Of dW = m g + pull W. <g, W>, summed in float64, is exact in what comes through m."""
    through_mask = 0 if grad_mask is None else grad_mask.double()
    allowed = 0.0
    if grad_w_hat is not None:
        products = reference.channels(grad_w_hat.double() * weight.double(), dim)
        through_mask = through_mask + products.sum(1)
        allowed = largest(reference.along(allowances.mask, weight, dim) * grad_w_hat)
    scale, tau, slope = allowances.scale, allowances.tau, allowances.slope
    pull = 2 / scale / scale / tau * slope * through_mask
    if rms:
        pull = pull / reference.fan_in(weight, dim)
    return allowed + largest(reference.along(pull, weight, dim) * weight)
