"""The hard mask: exactly k weights pruned."""

import torch
from torch import Tensor

from pdp_kernels.distributed import order_statistics
from pdp_kernels.distributed.shards import is_distributed
from pdp_kernels.functional.threshold import prune_count
from pdp_kernels.functional.validation import check_weight


def hard_mask(weight: Tensor, sparsity: float | Tensor) -> Tensor:
    """Return the mask that prunes exactly the k = floor(r n + 1/2) weights of least magnitude.

    It is the soft mask rounded (Algorithm 1, line 26 of arXiv 2305.11203), with t as in
    `pdp_threshold`:

        mask = True where |w| > t, False where |w| < t

    Weights tied at t are pruned in row-major order, lowest flat index first. So the
    sparsity is exact in bfloat16 too, where ties are the rule, and every rank of a data-parallel
    job prunes the same weights. NaN counts as the largest magnitude.

    Args:
        weight: any shape; float64, float32, bfloat16 or float16. Ties follow the row-major order,
            so other layouts are copied once. Or a DTensor as in `pdp_thresholds`: ties follow the
            flat index in the global weight, and the host waits for the device if it is sharded.
        sparsity: the fraction r to prune, a number in [0, 1] or a 0-d floating point tensor on the
            weight's device.

    Returns:
        A bool mask of the weight's shape, contiguous; True where the weight is kept. For a DTensor
        a DTensor of the same placements.

    Raises:
        TypeError: as `pdp_thresholds`.
        ValueError: as `pdp_thresholds`.

    Examples:
        >>> hard_mask(torch.tensor([2.0, -1.0, 1.0, -3.0]), 0.5)
        tensor([ True, False, False,  True])
    """
    check_weight("weight", weight)
    count = prune_count(weight, sparsity)
    if is_distributed(weight):
        return order_statistics.hard_mask(weight, count)
    return torch.ops.pdp.hard_mask(weight.detach(), count)
