"""The oracle of all tests: the reference in float64, and the error that a backend may have.

Answers are kept: all backends that a test runs on use the same ones.
"""

import hashlib
from collections import OrderedDict
from typing import NamedTuple

import torch

from pdp_kernels.ops import reference

_LIMIT = 2**28  # bytes of answers to keep
_answers: OrderedDict = OrderedDict()
_kept = {"bytes": 0}


def answer(function, *arguments):
    """Return function(*arguments), from an earlier call with equal arguments if there was one.

    The function must depend on nothing else: not on the state of a random number generator either.
    """
    key = (function.__name__, *map(_key, arguments))
    if key not in _answers:
        _answers[key] = function(*arguments)
        _kept["bytes"] += _bytes(_answers[key])
        while _kept["bytes"] > _LIMIT:
            _kept["bytes"] -= _bytes(_answers.popitem(last=False)[1])
    return _answers[key]


def _key(argument):
    if not isinstance(argument, torch.Tensor):
        return argument
    dense = argument.detach().clone(memory_format=torch.contiguous_format).flatten()
    data = dense.view(torch.uint8).numpy()
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return argument.dtype, argument.shape, argument.stride(), digest


def _bytes(value):
    if isinstance(value, tuple):
        return sum(map(_bytes, value))
    return getattr(value, "nbytes", 0)


def exact_threshold(weight: torch.Tensor, count: int) -> torch.Tensor:
    """Return the reference in float64, rounded once to the dtype of a threshold."""
    exact = reference.threshold(weight.cpu().double(), torch.tensor(count))
    return exact.to(reference.threshold_dtype([weight]))


def exact_hard_mask(weight: torch.Tensor, count: int) -> torch.Tensor:
    return reference.hard_mask(weight.cpu().double(), torch.tensor(count))


def doubled(*arguments):
    """Return the arguments with all tensors of numbers in float64; those of counts stay."""
    return [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    ]


class Answer(NamedTuple):
    """What a backend should return, and by how much it may differ."""

    exact: torch.Tensor
    dtype: torch.dtype
    budget: float


def answer_of(exact, rounded, stacked=False) -> Answer:
    """Return an answer with the budget 2 x (error of the reference in the storage dtype) + eps.

    eps is that of the storage dtype, relative to the largest exact value. For float64 the reference
    in the storage dtype is the exact one, whose own rounding counts: 16 eps.

    Args:
        exact: the reference in float64.
        rounded: the reference in the storage dtype.
        stacked: both are for a weight `with_neighbours`, and the answer is for the weight alone.
    """
    own = exact[0].clone() if stacked else exact
    if exact.numel() == 0:
        return Answer(own, rounded.dtype, 0.0)
    info = torch.finfo(rounded.dtype)
    eps = info.eps * (16 if rounded.dtype == torch.float64 else 1)
    error = torch.where(rounded.double() == exact, 0, rounded.double() - exact).abs().max()
    scale = own.abs().max().clamp(min=info.smallest_normal)
    return Answer(own, rounded.dtype, (2 * error + eps * scale).item())


def assert_within_budget(actual, answer: Answer, allowance=0.0):
    """Check that a backend's result is within the budget; `allowance`: see allowances.py."""
    assert actual.dtype == answer.dtype
    assert actual.shape == answer.exact.shape
    if actual.numel() == 0:
        return
    actual, exact = actual.cpu().double(), answer.exact
    error = torch.where(actual == exact, 0, actual - exact).abs().max()  # inf - inf is no error
    budget = answer.budget + allowance
    assert error <= budget, f"error {error:.3g} exceeds the budget {budget:.3g}"


def with_neighbours(weight):
    """Return a stack of the weight and of up to 63 more within 1% of it, 2^17 numbers together.

    A few numbers may happen to be rounded well, and at a low temperature few lie in the soft zone,
    where errors are largest: the reference's error is that around the weight.
    """
    copies = min(64, 1 + 2**17 // max(1, weight.numel()))
    generator = torch.Generator().manual_seed(weight.numel())
    shape = (copies, *weight.shape)
    nudges = 1 + 0.01 * torch.rand(shape, dtype=torch.float64, generator=generator)
    nudges[0] = 1
    return (weight.double() * nudges).to(weight.dtype)


def gradients_for(*shapes, dtype):
    """Return normal gradients, the same for the same shapes."""
    generator = torch.Generator().manual_seed(len(shapes))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def each_choice(grad_w_hat, grad_mask):
    """Return the gradients that a backward may be given: either alone, and both."""
    return [(grad_w_hat, None), (None, grad_mask), (grad_w_hat, grad_mask)]
