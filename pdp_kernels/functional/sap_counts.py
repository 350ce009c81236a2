"""How many weights SAP prunes, from the PQ Index."""

import torch
from torch import Tensor

from pdp_kernels.functional.validation import check_index, check_kept_counts, check_sap_settings

# Bounds the rounding error of a PQ Index: the largest measured was 1e-13, with up to 10^7 equal
# weights among zeros (p = 0.1, q = 1). Of a group of 10^10 weights it is still less than one.
_INDEX_ERROR = 1e-11


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
    """How many more weights SAP prunes in each group, from the group's PQ Index.

    With d the weights kept so far and I their PQ Index::

        m = ceil(d (1 + eta)^(q / (p - q)) (1 - I)^(p q / (q - p)))
        k = floor(d clamp(gamma (1 - m / d), 0, beta))

    (Algorithm 1 of arXiv 2302.05601). m weights are a lower bound of what the group needs: d for
    equal weights (I = 0), c where c equal weights stand among zeros, at least 1. Both roundings
    forgive the error of float64, so that these come out exactly: a product within that error of an
    integer is that integer.

    Shapes and dtypes:
        index: I, float64, any shape, as `pq_index` returns it. NaN prunes none.
        kept: d, an int for all groups, or an integer tensor of the index's shape on its device.
        p, q: the norms of the index, 0 < p < q.
        eta: at least 0; more prunes more.
        gamma: positive; scales the share to prune.
        beta: the largest share to prune, in [0, 1].

    Returns:
        k: int64, the index's shape, on its device; not yet selected: see `SAPPruner`.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a number outside of its range; kept of another shape or device.

    Example:
        >>> weight = torch.tensor([16.0, 1.0, 1.0, 1.0, 1.0, 0.0])
        >>> sap_prune_counts(pq_index(weight), weight.numel())  # ceil(64 / 20) = 4 are kept
        tensor(2)
    """
    check_sap_settings(p, q, eta, gamma, beta)
    check_index(index)
    check_kept_counts(kept, index)
    kept = torch.as_tensor(kept, dtype=torch.float64, device=index.device)
    share = (1 - index.detach()).clamp(0, 1)
    power = p * q / (q - p)
    needed = kept * (1 + eta) ** (q / (p - q)) * share**power
    error = _INDEX_ERROR * (1 + power / share.clamp(min=_INDEX_ERROR))
    needed = torch.ceil(needed * (1 - error)).clamp(min=1)
    pruned = torch.minimum(gamma * (kept - needed), beta * kept) * (1 + _INDEX_ERROR)
    return torch.floor(pruned).clamp(min=0).nan_to_num(0).to(torch.int64)
