"""Prune counts of SAP at the ends of the range of their arguments."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from pdp_kernels import pq_index, sap_prune_counts

EVEN = torch.zeros((), dtype=torch.float64)  # the index of equal weights


@pytest.mark.parametrize("p, q", [(0.5, 1.0), (0.9999, 1.0), (1.0, 1 + 1e-8)])
def test_equal_weights_are_all_kept_however_close_p_is_to_q(p, q):
    for kept in (1, 7, 100_000, 25_000_000, 2**53):
        assert sap_prune_counts(EVEN, kept, p, q) == 0
    weight = torch.full((10_007,), 0.3)
    assert sap_prune_counts(pq_index(weight, p, q), 10_007, p, q) == 0


def test_more_weights_than_float64_counts_raise():
    assert sap_prune_counts(EVEN + 0.5, 2**53) > 0
    with pytest.raises(ValueError, match=rf"kept must be at most 2\*\*53, got {2**70}"):
        sap_prune_counts(EVEN, 2**70)


@pytest.mark.parametrize("number", [np.float16(0.9), np.float32(0.9), Fraction(9, 10)], ids=repr)
@pytest.mark.parametrize("name", ["p", "eta", "gamma", "beta"])
def test_numbers_of_other_types_count_as_their_doubles(name, number):
    index = torch.tensor([0.01, 0.3, 0.9], dtype=torch.float64)
    expected = sap_prune_counts(index, 2**40, **{name: float(number)})
    assert sap_prune_counts(index, 2**40, **{name: number}).equal(expected)
