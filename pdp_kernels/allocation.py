"""How much each layer loses under one global budget."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pdp_kernels._validation import check_ratio, check_weights
from pdp_kernels.reference import threshold_dtype

_DIGIT_BITS = 11


@torch.no_grad()
def global_prune_counts(
    weights: Sequence[Tensor], sparsity: float, *, max_layer_sparsity: float = 1.0
) -> list[int]:
    """How many weights of each layer fall under one threshold over all layers.

    With k = floor(r N + 1/2) of the N weights of all layers together (Algorithm 1, lines 8-9 of
    arXiv 2305.11203)::

        k_i = how many of layer i are among the k of least magnitude;  sum k_i = k

    exactly: of weights tied at the boundary those of the earlier layers are pruned first. Where a
    layer would lose more than its cap floor(max_layer_sparsity n_i), it loses its cap, and the
    rest of the budget is shared out again over the layers below theirs.

    The k-th magnitude is found digit by digit, by counting: the weights are never put together in
    one tensor. A few reads of each and a few values read back to the host: meant to be called once.

    Shapes and dtypes:
        weights: L tensors of any shapes and any mix of float64, float32, bfloat16 and float16, on
            any devices.
        sparsity: r, in [0, 1].
        max_layer_sparsity: in [0, 1].

    Returns:
        The k_i, a list of L ints.

    Raises:
        TypeError: as `pdp_thresholds`.
        ValueError: as `pdp_thresholds`; caps that leave less than k to prune.

    Example:
        >>> layers = [torch.tensor([1.0, -2.0, 3.0, -4.0]), torch.tensor([5.0, 6.0])]
        >>> global_prune_counts(layers, 0.5)
        [3, 0]
        >>> global_prune_counts(layers, 0.5, max_layer_sparsity=0.5)
        [2, 1]
    """
    check_weights("weights", weights, one_device=False)
    check_ratio("sparsity", sparsity)
    check_ratio("max_layer_sparsity", max_layer_sparsity)
    sizes = [weight.numel() for weight in weights]
    budget, caps = check_budget(sizes, sparsity, max_layer_sparsity)
    dtype = threshold_dtype(weights)
    counts = {}
    while len(counts) < len(sizes):
        free = [layer for layer in range(len(sizes)) if layer not in counts]
        left = budget - sum(counts.values())
        shares = _counts_below([weights[layer] for layer in free], left, dtype)
        found = dict(zip(free, shares, strict=True))
        capped = {layer: caps[layer] for layer, count in found.items() if count > caps[layer]}
        counts |= capped or found
    return [counts[layer] for layer in range(len(sizes))]


def check_budget(
    sizes: Sequence[int], sparsity: float, max_layer_sparsity: float
) -> tuple[int, list[int]]:
    """How many are to be pruned in all, and at most of each layer."""
    budget = math.floor(sparsity * sum(sizes) + 0.5)
    caps = [math.floor(max_layer_sparsity * size) for size in sizes]
    if sum(caps) < budget:
        raise ValueError(
            f"max_layer_sparsity must leave {budget} to prune for sparsity = {sparsity}, "
            f"got {max_layer_sparsity}, which leaves {sum(caps)}"
        )
    return budget, caps


def _counts_below(weights: Sequence[Tensor], count: int, dtype: torch.dtype) -> list[int]:
    """How many of each weight are among the `count` of least magnitude of all together."""
    if count == 0:
        return [0] * len(weights)
    largest = _magnitude_of_rank(weights, count, dtype)
    below = [int((_bits(weight, dtype) < largest).sum()) for weight in weights]
    tied = [int((_bits(weight, dtype) == largest).sum()) for weight in weights]
    left = count - sum(below)
    counts = []
    for under, ties in zip(below, tied, strict=True):
        taken = min(ties, left)
        left -= taken
        counts.append(under + taken)
    return counts


def _magnitude_of_rank(weights: Sequence[Tensor], rank: int, dtype: torch.dtype) -> int:
    """The bits of the rank-th (from 1) magnitude: digits are fixed from the highest down."""
    prefix, shift = 0, torch.finfo(dtype).bits - 1
    while shift > 0:
        width = min(_DIGIT_BITS, shift)
        histogram = sum(_digit_counts(weight, dtype, prefix, shift, width) for weight in weights)
        cumulative = histogram.cumsum(0)
        digit = int(torch.searchsorted(cumulative, rank))
        rank -= int(cumulative[digit - 1]) if digit else 0
        prefix = prefix << width | digit
        shift -= width
    return prefix


def _digit_counts(weight: Tensor, dtype: torch.dtype, prefix: int, shift: int, width: int):
    """How often each digit follows the prefix that ends above bit `shift`."""
    bits = _bits(weight, dtype)
    digits = bits[bits >> shift == prefix] >> (shift - width) & ((1 << width) - 1)
    return torch.bincount(digits, minlength=1 << width).cpu()


def _bits(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Magnitudes as integers of the same order; NaN comes above inf."""
    integers = torch.int64 if dtype == torch.float64 else torch.int32
    return weight.detach().abs().to(dtype).flatten().view(integers)
