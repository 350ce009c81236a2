"""Thresholds: the midpoint between two neighbouring magnitudes of each weight."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pdp_kernels.distributed import order_statistics
from pdp_kernels.distributed.shards import is_distributed
from pdp_kernels.functional.validation import (
    check_ratio,
    check_ratio_tensor,
    check_weight,
    check_weights,
)
from pdp_kernels.ops import reference


def pdp_threshold(weight: Tensor, sparsity: float | Tensor) -> Tensor:
    """The threshold that prunes a share of one weight: `pdp_thresholds` of a list of one.

    Shapes and dtypes:
        weight: any shape; float64, float32, bfloat16 or float16; any device; or a DTensor.
        sparsity: a number in [0, 1], or a 0-d floating point tensor on the weight's device.

    Returns:
        t: shape (), float64 for a float64 weight, else float32; a constant for autograd.

    Raises:
        TypeError, ValueError: as `pdp_thresholds`.

    Example:
        >>> t = pdp_threshold(torch.tensor([1.0, -2.0, 3.0, -4.0]), 0.5)  # between 2 and 3
        >>> t.item()
        2.5
    """
    check_weight("weight", weight)
    counts = prune_count(weight, sparsity)
    return order_statistics.thresholds([weight.detach()], counts).squeeze(0)


def pdp_thresholds(
    weights: Sequence[Tensor], sparsities: float | Sequence[float] | Tensor
) -> Tensor:
    """The thresholds of a list of weights, found together.

    With v_1 <= ... <= v_n the sorted magnitudes |w| of a weight and k = floor(r n + 1/2)::

        t = (v_k + v_{k+1}) / 2      (Algorithm 1, lines 14-16 of arXiv 2305.11203)

    k = 0 gives t = -inf (all kept), k = n gives t = +inf (all pruned). NaN counts as the largest
    magnitude, above inf. The whole list takes a constant number of kernel launches and never
    waits for the device.

    Shapes and dtypes:
        weights: L tensors of any shapes and any mix of float64, float32, bfloat16 and float16, on
            one device. Dense layouts (channels_last too) are read in place, others copied once.
            Any may be a DTensor, with any mix of Shard and Replicate placements on a device mesh:
            then all ranks of the mesh call with the same list, and get the same thresholds, those
            of the whole weights bit for bit. Histograms travel, weights do not: for the whole list
            at most four collectives (three for 16-bit weights, seven for float64), int64 counts.
        sparsities: the share r to prune: one number in [0, 1], or one for each weight, or a
            floating point tensor of shape () or (L,) on the weights' device. A tensor is read on
            the device alone, so a captured CUDA graph and a compiled function follow its values;
            they are not checked, and a share outside [0, 1] acts as the nearer end.

    Returns:
        t: (L,), float64 if any weight is, else float32; constants for autograd. Each equals what
        `pdp_threshold` gives for that weight.

    Raises:
        TypeError: a weight is no dense tensor of those dtypes; sparsities are no numbers.
        ValueError: an empty list; several devices; another number of sparsities than of weights;
            a sparsity outside [0, 1] or NaN; a tensor of sparsities that requires a gradient.

    Example:
        >>> layers = [torch.tensor([1.0, -2.0, 3.0, -4.0]), torch.tensor([5.0, 6.0])]
        >>> pdp_thresholds(layers, [0.25, 0.5]).tolist()
        [1.5, 5.5]
    """
    check_weights("weights", weights)
    weights = [weight.detach() for weight in weights]
    if isinstance(sparsities, Tensor):
        check_ratio_tensor("sparsities", sparsities, ((), (len(weights),)), weights[0].device)
        return order_statistics.thresholds(weights, _counts_of_tensor(weights, sparsities))
    if not isinstance(sparsities, (list, tuple)):
        check_ratio("sparsities", sparsities)
        sparsities = [sparsities] * len(weights)
    if len(sparsities) != len(weights):
        raise ValueError(
            f"sparsities must hold one ratio for each of the {len(weights)} weights, "
            f"got {len(sparsities)}"
        )
    for index, sparsity in enumerate(sparsities):
        check_ratio(f"sparsities[{index}]", sparsity)
    counts = _prune_counts(weights, [float(sparsity) for sparsity in sparsities])
    return order_statistics.thresholds(weights, counts)


def prune_count(weight: Tensor, sparsity: float | Tensor) -> Tensor:
    """k = floor(r n + 1/2) of one weight, int64 (1,) on its device; checks the sparsity."""
    weights = [weight.detach()]
    if isinstance(sparsity, Tensor):
        check_ratio_tensor("sparsity", sparsity, ((),), weight.device)
        return _counts_of_tensor(weights, sparsity)
    check_ratio("sparsity", sparsity)
    return _prune_counts(weights, [float(sparsity)])


def _prune_counts(weights: Sequence[Tensor], sparsities: list[float]) -> Tensor:
    """k = floor(r n + 1/2) of each weight; of a DTensor n is the size of the whole."""
    if any(map(is_distributed, weights)):
        return reference.prune_counts(weights, sparsities)
    return torch.ops.pdp.prune_counts(weights, sparsities)


def _counts_of_tensor(weights: Sequence[Tensor], sparsities: Tensor) -> Tensor:
    """k = floor(r n + 1/2) where the ratios are known to the device alone."""
    sizes = _prune_counts(weights, [1.0] * len(weights))
    return torch.floor(sparsities.to(torch.float64) * sizes + 0.5).to(torch.int64)
