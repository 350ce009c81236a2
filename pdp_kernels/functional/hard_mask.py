"""The hard mask: exactly k weights pruned."""

from torch import Tensor

from pdp_kernels.distributed import order_statistics
from pdp_kernels.distributed.shards import distributed_like, is_distributed
from pdp_kernels.functional.threshold import prune_count
from pdp_kernels.functional.validation import check_weight


def hard_mask(weight: Tensor, sparsity: float | Tensor) -> Tensor:
    """The mask that keeps all but exactly k = floor(r n + 1/2) weights of least magnitude.

    Of weights tied at the boundary those of lowest flat (row-major) index are pruned first, so the
    sparsity is met exactly in bfloat16 too, where ties are the rule, and every rank of a
    data-parallel job prunes the same weights (arXiv 2305.11203, Algorithm 1, line 26: the soft
    mask rounded). NaN counts as the largest magnitude.

    Shapes and dtypes:
        weight: any shape; float64, float32, bfloat16 or float16. Ties follow the row-major order,
            so other layouts are copied once. A DTensor as in `pdp_thresholds`; ties follow the flat
            index in the whole weight, and a sharded one makes the host wait for the device.
        sparsity: a number in [0, 1], or a 0-d floating point tensor on the weight's device.

    Returns:
        mask: bool, the weight's shape, contiguous; True where the weight is kept. Of a DTensor a
        DTensor of the same placements.

    Raises:
        TypeError, ValueError: as `pdp_thresholds`.

    Example:
        >>> hard_mask(torch.tensor([2.0, -1.0, 1.0, -3.0]), 0.5)
        tensor([ True, False, False,  True])
    """
    check_weight("weight", weight)
    kept = order_statistics.hard_mask_of_shard(weight, prune_count(weight, sparsity))
    return distributed_like(weight, kept) if is_distributed(weight) else kept
