"""power_sums of a backend, held against sums in extended precision."""

import math

import numpy as np
import torch

from tests.support.oracle import answer
from tests.support.weights import denormals, with_special_values

NORMS = ((0.5, 1.0), (1.0, 2.0), (0.5, 2.0), (0.3, 1.7))
SIZES = (0, 1, 31, 33, 4097, 16_385, 100_003)  # the last are several tiles
ROWS = [(3, 5), (7, 1), (1, 40_009), (5, 20_011), (4000, 9), (11,), (0, 4), (4, 0), (6, 8, 5, 7)]


def exact_sums(weight, mask, p, q, per_row=False):
    """Return d, sum |w|^p and sum |w|^q of each group in extended precision, (groups, 3)."""
    shape = (weight.shape[0], weight[:1].numel()) if per_row else (1, weight.numel())
    magnitude = np.abs(weight.double().numpy().astype(np.longdouble)).reshape(shape)
    kept = np.ones(shape, dtype=bool) if mask is None else mask.numpy().reshape(shape)
    powers = (np.where(kept, magnitude**exponent, 0).sum(1) for exponent in (p, q))
    return np.stack([kept.sum(1), *powers], axis=1)


def formula(weight, p, q, mask=None):
    """Return 1 - d^(1/q - 1/p) ||w||_p / ||w||_q as the paper writes it."""
    d, sum_p, sum_q = exact_sums(weight.cpu(), mask, p, q)[0]
    p, q = np.longdouble(p), np.longdouble(q)
    return float(1 - d ** (1 / q - 1 / p) * sum_p ** (1 / p) / sum_q ** (1 / q))


def check_sums(power_sums, weights, masks, p, q, per_row=False):
    """Check the sums of a list of weights, of which those that are not finite are alike."""
    found = power_sums(weights, masks, p, q, per_row)
    expected = [
        answer(exact_sums, weight, mask, p, q, per_row)
        for weight, mask in zip(weights, masks, strict=True)
    ]
    expected = torch.tensor(np.concatenate(expected).astype(np.float64))
    assert torch.equal(found[:, 0], expected[:, 0])
    found, expected = (sums.masked_fill(~sums.isfinite(), math.nan) for sums in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0, equal_nan=True)


def check_sums_of_every_size_and_mask(power_sums, dtype, norms):
    weights = [torch.randn(size).to(dtype) for size in SIZES]
    for kept in (0.0, 0.5, 1.0):
        masks = [None if i == 1 else torch.rand(n) < kept for i, n in enumerate(SIZES)]
        check_sums(power_sums, weights, masks, *norms)
    check_sums(power_sums, weights, [None] * len(SIZES), *norms)


def check_sums_at_the_ends_of_the_range(power_sums, dtype, norms):
    """Check sums of inf, NaN, the largest magnitudes and the least ones."""
    # Of float64 weights the squares leave the range: those have a test of their own.
    extreme = torch.finfo(dtype if dtype != torch.float64 else torch.float32)
    weights = [
        with_special_values(999, dtype),
        torch.tensor([math.inf, -1.0, 0.0], dtype=dtype),
        torch.full((999,), extreme.max).to(dtype),
        torch.full((999,), extreme.smallest_normal).to(dtype),
    ]
    if dtype != torch.float64:
        weights.append(denormals(999, dtype))
    masks = [None] * len(weights)
    check_sums(power_sums, weights, masks, *norms)
    for weight in weights:
        check_sums(power_sums, [weight], [weight.isfinite()], *norms)


def check_sums_of_rows(power_sums, dtype):
    weights = [torch.randn(shape).to(dtype) for shape in ROWS]
    masks = [torch.rand(shape) < 0.5 if i % 2 else None for i, shape in enumerate(ROWS)]
    check_sums(power_sums, weights, masks, 0.5, 1.0, per_row=True)
