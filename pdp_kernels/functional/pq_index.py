"""The PQ Index: how unevenly magnitudes are spread over the weights, and so how many to prune."""

import math
from collections.abc import Sequence
from typing import Literal, cast, overload

import torch
from torch import Tensor

from pdp_kernels.distributed import sums as distributed_sums
from pdp_kernels.distributed.shards import is_distributed
from pdp_kernels.functional.validation import (
    check_exponents,
    check_has_rows,
    check_kept,
    check_scope,
    check_weight,
    check_weights,
)

Scope = Literal["neuron", "layer", "global"]


@overload
def pq_index(
    weight: Tensor,
    p: float = 0.5,
    q: float = 1.0,
    *,
    mask: Tensor | None = None,
    scope: Scope = "layer",
) -> Tensor: ...


@overload
def pq_index(
    weight: Sequence[Tensor],
    p: float = 0.5,
    q: float = 1.0,
    *,
    mask: Sequence[Tensor | None] | None = None,
    scope: Literal["layer", "global"] = "layer",
) -> Tensor: ...


@overload
def pq_index(
    weight: Sequence[Tensor],
    p: float = 0.5,
    q: float = 1.0,
    *,
    mask: Sequence[Tensor | None] | None = None,
    scope: Literal["neuron"],
) -> list[Tensor]: ...


def pq_index(
    weight: Tensor | Sequence[Tensor],
    p: float = 0.5,
    q: float = 1.0,
    *,
    mask: Tensor | Sequence[Tensor | None] | None = None,
    scope: Scope = "layer",
) -> Tensor | list[Tensor]:
    """Return the PQ Index of each tensor, of each neuron, or of all weights together.

    Over the d unpruned weights, with 0 < p < q (definition 1 of arXiv 2302.05601):

        I = 1 - d^(1/q - 1/p) ||w||_p / ||w||_q

    0 for weights of equal magnitude, 1 - d^(1/q - 1/p) for a single nonzero one: the sparser the
    weights, the larger. The weights are read once. A whole list takes a constant number of kernel
    launches and never waits for the device. Equal input gives equal bits, whatever the number of
    threads. p and q out of 0.5, 1 and 2 are fast; others cost a pow for each weight.

    Args:
        weight: any shape; float64, float32, bfloat16 or float16; any device. Or a list or tuple of
            L such tensors, on one device. Dense layouts are read in place, others are copied once.
            For scope "neuron" so are those whose dimension 0 is not the outermost in memory.
            DTensors as in `pdp_thresholds`; those not sharded by rows are redistributed once.
        p: the smaller exponent, 1e-5 <= p < q: rounding errors of I grow as 1/p.
        q: the larger exponent.
        mask: bool, the weight's shape; True where the weight is unpruned. Pruned weights count
            neither in d nor in the norms. For a DTensor a DTensor of its placements, as
            `hard_mask` returns it. For a list of weights a list of masks, with None where nothing
            is pruned. A layout other than the weight's costs a copy of both.
        scope: "layer": one index for each tensor. "neuron": one for each row of dimension 0.
            "global": one for all weights together.

    Returns:
        The index I, float64 for all weights; a constant for autograd. For a tensor shape ()
        ("layer", "global") or (rows,) ("neuron"). For a list (L,) ("layer"), () ("global"), or a
        list of (rows,) ("neuron").

        I is 0 with no unpruned weight, and where all unpruned weights are 0 (or so small that
        |w|^p underflows for all), as for equal weights of any other size. I is NaN where a weight
        is NaN or infinite, and where the sum of |w|^q overflows float64 or (q > 1) is subnormal.

    Raises:
        TypeError: a weight is no dense tensor of those dtypes; p or q is no number; a mask is no
            bool tensor.
        ValueError: not 1e-5 <= p < q < inf; an unknown scope; an empty list; several devices; a
            mask of another shape or on another device, or another number of masks than of weights;
            scope "neuron" for a weight of shape ().

    Examples:
        >>> pq_index(torch.tensor([0.0, 0.0, 0.0, 4.0])).item()  # 1 - 4^(1 - 2)
        0.75
    """
    single = not isinstance(weight, (list, tuple))
    if isinstance(weight, (list, tuple)):
        check_weights("weight", weight)
        weights, masks = list(weight), _list_of_masks(mask, len(weight))
        places = [f"[{index}]" for index in range(len(weights))]
    else:
        check_weight("weight", weight)
        weights, masks, places = [weight], [cast("Tensor | None", mask)], [""]
    check_exponents(p, q)
    check_scope(scope)
    for place, kept, of in zip(places, masks, weights, strict=True):
        check_kept(f"mask{place}", kept, of)
        if scope == "neuron":
            check_has_rows(f"weight{place}", of)

    p, q = float(p), float(q)
    sums = _power_sums([of.detach() for of in weights], masks, p, q, scope == "neuron")
    if scope == "global":
        return index_of(sums.sum(0), p, q)
    index = index_of(sums, p, q)
    if scope == "neuron" and not single:
        return list(index.split([of.shape[0] for of in weights]))
    return index.squeeze(0) if scope == "layer" and single else index


def _power_sums(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    p: float,
    q: float,
    per_row: bool,
) -> Tensor:
    if any(map(is_distributed, weights)):
        return distributed_sums.power_sums(weights, masks, p, q, per_row)
    return torch.ops.pdp.power_sums(weights, masks, p, q, per_row)


def index_of(sums: Tensor, p: float, q: float) -> Tensor:
    """Return I of (..., 3) sums (d, sum |w|^p, sum |w|^q), float64 (...).

    Computed as 1 - (S_p / S_q^(p/q) d^(p/q - 1))^(1/p). The p-th power of the quotient of the norms
    lies between 1 and d^(1 - p/q), so no step overflows, however many or large the weights. No
    logarithm costs digits of a result near 0: I of equal weights is 0 to 1e-14. Rounding errors do
    not take it below 0.
    """
    count, sum_p, sum_q = sums.unbind(-1)
    index = 1 - (sum_p / sum_q ** (p / q) * count ** (p / q - 1)) ** (1 / p)
    index = index.clamp(min=0).masked_fill(sum_q == math.inf, math.nan)
    if q > 1:  # a subnormal power has lost digits; |w| itself and its roots have not
        index = index.masked_fill(sum_q < torch.finfo(torch.float64).tiny, math.nan)
    return index.masked_fill(sum_p == 0, 0.0)


def _list_of_masks(
    mask: Tensor | Sequence[Tensor | None] | None, count: int
) -> list[Tensor | None]:
    if mask is None:
        return [None] * count
    if not isinstance(mask, (list, tuple)):
        raise TypeError(
            f"mask must be None or a list of masks for a list of weights, got {type(mask).__name__}"
        )
    if len(mask) != count:
        raise ValueError(
            f"mask must hold one mask for each of the {count} weights, got {len(mask)}"
        )
    return list(mask)
