"""Thresholds, hard masks and digit counts of a backend, held against the oracle: exactly."""

import torch

from pdp_kernels.ops import reference
from tests.support.oracle import answer, exact_hard_mask, exact_threshold
from tests.support.weights import HALVES, SIZES, weight_of


def check_thresholds(backend, weights, counts):
    """Check the thresholds of a list of weights."""
    given = [weight.to(backend.device) for weight in weights]
    found = backend.thresholds(given, torch.tensor(counts, device=backend.device)).cpu()
    exact = [answer(exact_threshold, *pair) for pair in zip(weights, counts, strict=True)]
    expected = torch.stack([t.to(found.dtype) for t in exact])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def check_hard_mask(backend, weight, count):
    """Check that exactly `count` weights are pruned, ties by lowest flat index."""
    counts = torch.tensor([count], device=backend.device)
    kept = backend.hard_mask(weight.to(backend.device), counts).cpu()
    assert kept.dtype == torch.bool
    assert (~kept).sum() == count
    assert torch.equal(kept, answer(exact_hard_mask, weight, count))


def digits_of(weights):
    return reference.DIGIT_BITS[weights[0].element_size()]


def keys_at(weights, fraction):
    """Return the key of each weight below which that fraction of its keys is; 0 if it is empty."""
    ordered = [reference.magnitude_keys(weight).sort().values for weight in weights]
    return [int(keys[int(fraction * (len(keys) - 1))]) if len(keys) else 0 for keys in ordered]


def check_digit_counts(backend, weights, keys=None):
    """Check every digit's pass, with the prefixes of the keys."""
    on_cpu = [weight.cpu() for weight in weights]
    keys = keys_at(on_cpu, 0.9) if keys is None else keys
    for digit in range(len(digits_of(weights))):
        shift = sum(digits_of(weights)[digit:])
        prefixes = torch.tensor([key >> shift for key in keys])
        expected = reference.digit_counts(on_cpu, prefixes, digit)
        found = backend.digit_counts(weights, prefixes.to(weights[0].device), digit)
        for actual, exact in zip(found, expected, strict=True):
            assert actual.dtype == torch.int64
            assert torch.equal(actual.cpu(), exact), f"digit {digit}"


def check_digit_counts_of_distribution(backend, distribution, dtype):
    weight = weight_of(distribution, 9973, dtype)
    keys = [keys_at([weight], fraction)[0] for fraction in (0.0, 0.9, 1.0)]
    keys.append(keys[-1] + 1)
    check_digit_counts(backend, [weight.to(backend.device)] * 4, keys)
    check_digit_counts(backend, [weight.to(backend.device), weight[:33].to(backend.device)])


def check_digit_counts_of_sizes(backend, dtype):
    sizes = (0, *SIZES[:-1], 0, 0, SIZES[-1], 0)
    weights = [torch.randn(size).to(backend.device, dtype) for size in sizes]
    check_digit_counts(backend, weights)


def check_digit_counts_of_both_halves(backend):
    weights = [torch.randn(40_009).to(backend.device, HALVES[i % 2]) for i in range(4)]
    check_digit_counts(backend, weights)
