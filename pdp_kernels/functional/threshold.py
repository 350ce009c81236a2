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
    """Return the threshold of one weight: `pdp_thresholds` of a list of one.

    With v_1 <= ... <= v_n the sorted magnitudes |w| and k = floor(r n + 1/2):

        t = (v_k + v_{k+1}) / 2      (Algorithm 1, lines 14-16 of arXiv 2305.11203)

    k = 0 gives t = -inf (keep all), k = n gives t = +inf (prune all).

    Args:
        weight: any shape; float64, float32, bfloat16 or float16; any device; or a DTensor.
        sparsity: the fraction r to prune, a number in [0, 1] or a 0-d floating point tensor on the
            weight's device.

    Returns:
        The threshold t, shape (), float64 for a float64 weight, else float32; a constant for
        autograd.

    Raises:
        TypeError: as `pdp_thresholds`.
        ValueError: as `pdp_thresholds`.

    Examples:
        >>> t = pdp_threshold(torch.tensor([1.0, -2.0, 3.0, -4.0]), 0.5)  # between 2 and 3
        >>> t.item()
        2.5
    """
    check_weight("weight", weight)
    return threshold_of(weight, sparsity)


def pdp_thresholds(
    weights: Sequence[Tensor], sparsities: float | Sequence[float] | Tensor
) -> Tensor:
    """Return the threshold of each weight of a list.

    With v_1 <= ... <= v_n the sorted magnitudes |w| of a weight and k = floor(r n + 1/2):

        t = (v_k + v_{k+1}) / 2      (Algorithm 1, lines 14-16 of arXiv 2305.11203)

    k = 0 gives t = -inf (keep all), k = n gives t = +inf (prune all). NaN counts as the largest
    magnitude, above inf. The whole list takes a constant number of kernel launches and never
    waits for the device.

    Args:
        weights: L tensors of any shapes and any mix of float64, float32, bfloat16 and float16, on
            one device. Dense layouts (channels_last too) are read in place, others are copied
            once. Any may be a DTensor, with any mix of Shard and Replicate placements on a device
            mesh. Then all ranks of the mesh call with the same list, and get the same thresholds:
            those of the global weights, bit for bit. Only histograms of counts travel, in at most
            four collectives for the whole list (three for 16-bit weights, seven for float64).
        sparsities: the fraction r to prune: one number in [0, 1], or a list or tuple of one for
            each weight, or a floating point tensor of shape () or (L,) on the weights' device. A
            tensor is read on the device alone, so that a captured CUDA graph and a compiled
            function follow its values. They are not checked: a value outside [0, 1] acts as the
            nearer end, NaN as 0.

    Returns:
        The thresholds t, shape (L,), float64 if any weight is, else float32; constants for
        autograd. Each element equals `pdp_threshold` of that weight.

    Raises:
        TypeError: a weight is no dense tensor of those dtypes; sparsities are no numbers.
        ValueError: an empty list; several devices; another number of sparsities than of weights;
            a sparsity outside [0, 1] or NaN; a tensor of sparsities of another shape, on another
            device, or that requires a gradient; a DTensor with a Partial placement, or on a mesh
            that does not have this rank.

    Examples:
        >>> layers = [torch.tensor([1.0, -2.0, 3.0, -4.0]), torch.tensor([5.0, 6.0])]
        >>> pdp_thresholds(layers, [0.25, 0.5]).tolist()
        [1.5, 5.5]
    """
    check_weights("weights", weights)
    weights = [weight.detach() for weight in weights]
    if isinstance(sparsities, Tensor):
        check_ratio_tensor("sparsities", sparsities, ((), (len(weights),)), weights[0].device)
        return find_thresholds(weights, _counts_of_tensor(weights, sparsities))
    if isinstance(sparsities, (list, tuple)):
        each = list(sparsities)
        if len(each) != len(weights):
            raise ValueError(
                f"sparsities must hold one ratio for each of the {len(weights)} weights, "
                f"got {len(each)}"
            )
        for index, sparsity in enumerate(each):
            check_ratio(f"sparsities[{index}]", sparsity)
    else:
        check_ratio("sparsities", sparsities)
        each = [sparsities] * len(weights)
    return find_thresholds(weights, _prune_counts(weights, list(map(float, each))))


def threshold_of(weight: Tensor, sparsity: float | Tensor) -> Tensor:
    """Return the threshold of a checked weight, (). Checks the sparsity."""
    return find_thresholds([weight.detach()], prune_count(weight, sparsity)).squeeze(0)


def find_thresholds(weights: Sequence[Tensor], prune_counts: Tensor) -> Tensor:
    """Return the threshold of each detached weight, (L,), for counts on the weights' device."""
    if any(map(is_distributed, weights)):
        return order_statistics.thresholds(weights, prune_counts)
    return torch.ops.pdp.thresholds(weights, prune_counts)


def prune_count(weight: Tensor, sparsity: float | Tensor) -> Tensor:
    """Return k = floor(r n + 1/2) of one weight, int64 (1,) on its device. Checks the sparsity."""
    weights = [weight.detach()]
    if isinstance(sparsity, Tensor):
        check_ratio_tensor("sparsity", sparsity, ((),), weight.device)
        return _counts_of_tensor(weights, sparsity)
    check_ratio("sparsity", sparsity)
    return _prune_counts(weights, [float(sparsity)])


def _prune_counts(weights: Sequence[Tensor], sparsities: list[float]) -> Tensor:
    """Return k = floor(r n + 1/2) of each weight; n is the size of the global weight."""
    if any(map(is_distributed, weights)):
        return reference.prune_counts(weights, sparsities)
    return torch.ops.pdp.prune_counts(weights, sparsities)


def _counts_of_tensor(weights: Sequence[Tensor], sparsities: Tensor) -> Tensor:
    """Return k = floor(r n + 1/2) of each weight, for ratios that only the device knows."""
    sizes = _prune_counts(weights, [1.0] * len(weights))
    ratios = sparsities.to(torch.float64).nan_to_num(0).clamp(0, 1)
    return torch.floor(ratios * sizes + 0.5).to(torch.int64)
