"""The PQ Index: how unevenly magnitudes are spread over the weights, and so how many to prune."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pdp_kernels.distributed.sums import power_sums
from pdp_kernels.functional.validation import (
    check_exponents,
    check_has_rows,
    check_kept,
    check_scope,
    check_weight,
    check_weights,
)


def pq_index(
    weight: Tensor | Sequence[Tensor],
    p: float = 0.5,
    q: float = 1.0,
    *,
    mask: Tensor | Sequence[Tensor | None] | None = None,
    scope: str = "layer",
) -> Tensor | list[Tensor]:
    """The PQ Index of each tensor, of each neuron, or of all weights together.

    Over the d unpruned weights, with 0 < p < q (definition 1 of arXiv 2302.05601)::

        I = 1 - d^(1/q - 1/p) ||w||_p / ||w||_q

    0 for weights of equal magnitude, 1 - d^(1/q - 1/p) for a single nonzero one: the sparser the
    weights, the larger. The weights are read once, and a whole list takes a constant number of
    kernel launches and never waits for the device. Equal input gives equal bits, whatever the
    number of threads. p and q out of 0.5, 1 and 2 are fast; others cost a pow for each weight.

    Shapes and dtypes:
        weight: any shape; float64, float32, bfloat16 or float16; any device. Or a list or tuple of
            L such tensors, on one device. Dense layouts are read in place, others copied once; so
            are those whose dimension 0 is not the outermost in memory if scope is "neuron".
            DTensors as in `pdp_thresholds`; those not sharded by rows are moved once.
        p, q: the two norms, 0 < p < q.
        mask: bool, the weight's shape (for a DTensor one of its placements, as `hard_mask`
            gives it); True where the weight is unpruned. What is pruned does not
            count, neither in d nor in the norms. For a list of weights a list of masks, with None
            where nothing is pruned. A layout other than the weight's costs a copy of both.
        scope: "layer": one index for each tensor. "neuron": one for each row of dimension 0.
            "global": one for all weights together.

    Returns:
        I: float64, whatever the weights are; a constant for autograd. Shape () for "layer" of a
            tensor, (L,) for "layer" of a list, () for "global"; (rows,) for "neuron" of a tensor,
            of a list a list of those.

        With no unpruned weight I is 0. It is 0 too where all of them are 0: I does not depend on
        the scale, and is 0 for equal weights of any other size. Where a weight is NaN or infinite,
        and where the sum of |w|^q overflows float64 or (q > 1) falls below its normal numbers, I is
        NaN.

    Raises:
        TypeError: a weight is no dense tensor of those dtypes; p or q is no number; a mask is no
            bool tensor.
        ValueError: not 0 < p < q < inf; an unknown scope; an empty list; several devices; a mask of
            another shape or on another device, or another number of masks than of weights; scope
            "neuron" for a weight of shape ().

    Example:
        >>> pq_index(torch.tensor([0.0, 0.0, 0.0, 4.0])).item()  # 1 - 4^(1 - 2)
        0.75
    """
    single = not isinstance(weight, (list, tuple))
    if single:
        check_weight("weight", weight)
        weights, masks, names = [weight], [mask], ["mask"]
    else:
        check_weights("weight", weight)
        weights, masks = list(weight), _list_of_masks(mask, len(weight))
        names = [f"mask[{index}]" for index in range(len(weight))]
    check_exponents(p, q)
    check_scope(scope)
    for name, kept, of in zip(names, masks, weights, strict=True):
        check_kept(name, kept, of)
    if scope == "neuron":
        for index, of in enumerate(weights):
            check_has_rows("weight" if single else f"weight[{index}]", of)

    weights = [of.detach() for of in weights]
    p, q = float(p), float(q)
    sums = power_sums(weights, masks, p, q, scope == "neuron")
    if scope == "global":
        return index_of(sums.sum(0), p, q)
    index = index_of(sums, p, q)
    if scope == "neuron" and not single:
        return list(index.split([of.shape[0] for of in weights]))
    return index.squeeze(0) if scope == "layer" and single else index


def index_of(sums: Tensor, p: float, q: float) -> Tensor:
    """I of (..., 3) sums (d, sum |w|^p, sum |w|^q), float64 (...).

    Written as 1 - (S_p / S_q^(p/q) d^(p/q - 1))^(1/p): the quotient of the norms to the power p
    lies between 1 and d^(1 - p/q), so that no step overflows however many or large the weights, and
    there is no logarithm to lose digits of a result near 0. One of equal weights is 0 to 1e-14.
    """
    count, sum_p, sum_q = sums.unbind(-1)
    index = 1 - (sum_p / sum_q ** (p / q) * count ** (p / q - 1)) ** (1 / p)
    index = index.masked_fill(sum_q == math.inf, math.nan)
    if q > 1:  # a denormal power has lost digits; |w| itself, and its roots, have not
        index = index.masked_fill(sum_q < torch.finfo(torch.float64).tiny, math.nan)
    return index.masked_fill(sum_p == 0, 0.0)


def _list_of_masks(mask: Sequence[Tensor | None] | None, count: int) -> list[Tensor | None]:
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
