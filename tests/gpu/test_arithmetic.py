"""This card divides and exponentiates as exactly as the masks' error budget assumes."""

import pytest
import torch

from tests.support.allowances import APPROXIMATE_ULPS

pytestmark = pytest.mark.gpu

BLOCK = 1024


def divided_and_exponentiated(x, y):
    """x / y and e^-|x| as compiled Triton computes them, on the host."""
    pytest.importorskip("triton")
    from tests.gpu.arithmetic_kernel import divide_and_exponentiate

    x, y = x.cuda(), y.cuda()
    results = torch.empty_like(x), torch.empty_like(x)
    divide_and_exponentiate[(-(-len(x) // BLOCK),)](x, y, *results, len(x), block=BLOCK)
    return [result.cpu() for result in results]


def ulps(found, exact):
    """Return the largest error in ulp, relative to the exact results."""
    return ((found.double() - exact) / exact).abs() / torch.finfo(torch.float32).eps


def numbers(count):
    """Return numbers of every mantissa, with exponents at which nothing overflows."""
    return (1 + torch.rand(count)) * 2.0 ** torch.randint(-40, 41, (count,))


def test_division_and_exponential_are_off_by_no_more():
    x, y = numbers(2**17), numbers(2**17)
    quotient, _ = divided_and_exponentiated(x, y)
    assert (ulps(quotient, x.double() / y.double()) <= APPROXIMATE_ULPS + 0.5).all()
    x = torch.linspace(0, 87, 2**17)
    _, exponential = divided_and_exponentiated(x, torch.ones_like(x))
    assert (ulps(exponential, torch.exp(-x.double())) <= x + APPROXIMATE_ULPS + 0.5).all()


def test_powers_of_two_divide_exactly():
    x, y = numbers(2**17), 2.0 ** torch.randint(-60, 61, (2**17,))
    quotient, _ = divided_and_exponentiated(x, y)
    assert torch.equal(quotient, x / y)
    _, exponential = divided_and_exponentiated(torch.zeros(8), torch.ones(8))
    assert exponential.tolist() == [1] * 8
