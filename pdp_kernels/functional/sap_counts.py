"""Prune counts of SAP from the PQ Index."""

import torch
from torch import Tensor

from pdp_kernels.functional.validation import check_index, check_kept_counts, check_sap_settings

# A bound of the rounding error of a PQ Index. The largest error measured was 1e-13, for up to 10^7
# equal weights among zeros (p = 0.1, q = 1). The bound is below one weight in a group of 10^10.
_INDEX_ERROR = 1e-11

# Beyond it float64 does not hold every integer.
MAX_KEPT = 2**53


def sap_prune_counts(
    index: Tensor,
    kept: int | Tensor,
    p: float = 0.5,
    q: float = 1.0,
    *,
    eta: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
) -> Tensor:
    """Return how many more weights SAP prunes in each group, given the group's PQ Index.

    With d the number of weights kept so far and I their PQ Index (Algorithm 1 of arXiv 2302.05601):

        m = ceil(d (1 + eta)^(q / (p - q)) (1 - I)^(p q / (q - p)))
        k = floor(d clamp(gamma (1 - m / d), 0, beta))

    m is a lower bound of the number of weights that the group needs: d for equal weights (I = 0),
    c for c equal weights among zeros, and at least 1. Ceil and floor treat a product within the
    rounding error of an integer as that integer, so that these cases are exact. (m / d has the
    rounding error of I times p q / (q - p). Where p is close to q, they are exact in small groups
    only.)

    Args:
        index: I, float64, any shape, as `pq_index` returns it. NaN prunes none.
        kept: d, an int from 0 to 2^53 for all groups, or an integer tensor of the index's shape on
            its device.
        p: the smaller exponent of the index, 1e-5 <= p < q.
        q: the larger exponent of the index.
        eta: at least 0; a larger eta prunes more.
        gamma: positive; scales the fraction to prune.
        beta: the largest fraction to prune, in [0, 1].

    Returns:
        The counts k, int64, of the index's shape, on its device. `SAPPruner` prunes so many
        weights.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a number is out of its range; kept has another shape or device.

    Examples:
        >>> weight = torch.tensor([16.0, 1.0, 1.0, 1.0, 1.0, 0.0])
        >>> sap_prune_counts(pq_index(weight), weight.numel())  # ceil(64 / 20) = 4 are kept
        tensor(2)
    """
    check_sap_settings(p, q, eta, gamma, beta)
    check_index(index)
    check_kept_counts(kept, index)
    if isinstance(kept, int) and kept > MAX_KEPT:
        raise ValueError(f"kept must be at most 2**53, got {kept}")
    p, q, eta, gamma, beta = map(float, (p, q, eta, gamma, beta))
    kept = torch.as_tensor(kept, dtype=torch.float64, device=index.device)
    evenness = (1 - index.detach()).clamp(0, 1)
    power = p * q / (q - p)
    needed = kept * (1 + eta) ** (q / (p - q)) * evenness**power
    error = _INDEX_ERROR * (1 + power / evenness.clamp(min=_INDEX_ERROR))
    needed = torch.ceil(needed - (needed * error).clamp(max=0.5)).clamp(min=1)
    pruned = torch.minimum(gamma * (kept - needed), beta * kept) * (1 + _INDEX_ERROR)
    return torch.floor(pruned).clamp(min=0).nan_to_num(0).to(torch.int64)
