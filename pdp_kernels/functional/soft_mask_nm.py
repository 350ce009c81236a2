"""N:M masks: every group of M consecutive weights is a layer of its own and keeps N."""

import torch
from torch import Tensor

from pdp_kernels.distributed.shards import map_shards
from pdp_kernels.functional.soft_mask import autocast_dtype, temperature_of
from pdp_kernels.functional.validation import (
    check_divisible,
    check_out_dtype,
    check_pattern,
    check_pruned,
    check_weight,
)
from pdp_kernels.ops.autograd import MaskedWeight


def pdp_mask_nm(
    weight: Tensor,
    n: int = 2,
    m: int = 4,
    *,
    dim: int = -1,
    tau: float | Tensor | None = None,
    relative_tau: float | Tensor | None = None,
    pruned: int | None = None,
    out_dtype: torch.dtype | None = None,
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The N:M masked weight, with the analytic gradient of the paper.

    `pdp_mask` (Eq. 1 and 2 of arXiv 2305.11203) where every group of M consecutive weights along
    ``dim`` is a layer of its own (section 3.4): N are KEPT of every M, so t is the midpoint between
    the M-N-th and the next magnitude of the group. Thresholds never reach memory: forward and
    backward are one pass over the weight each, and only the weight and tau are kept between.

    Sparse tensor cores multiply along the input features, which are dim -1 of a Linear weight and
    dim 1 of a convolution's: prune a convolution with dim=1.

    Shapes and dtypes:
        weight: any shape whose size along dim is divisible by m; float64, float32, bfloat16 or
            float16. Dense layouts are walked in place whatever dim is, others copied once. A
            DTensor must not be sharded through groups.
        n, m: 1 <= n < m <= 32; 2:4 is what sparse tensor cores run.
        dim: the dimension that is cut into groups.
        tau, relative_tau: as in `pdp_mask`; a relative temperature follows each group's own t.
        pruned: how many of a group are pruned now, 0 to m - n (default), so that a schedule can
            ramp up; 0 is the identity.
        out_dtype, return_mask: as in `pdp_mask`.

    Returns:
        w_hat, of the weight's shape and (for dense layouts) strides; with return_mask
        (w_hat, m), differentiable through both. It cannot be differentiated twice.

    Raises:
        TypeError: a weight, temperature or out_dtype of the wrong type or dtype; n, m, dim or
            pruned no int.
        ValueError: n and m not as above; no such dim; a size not divisible by m; pruned outside
            [0, m - n]; both temperatures, or one that is not positive and finite.

    Example:
        >>> weight = torch.tensor([[0.1, -0.4, 0.3, 0.2]])
        >>> pdp_mask_nm(weight, 2, 4)
        tensor([[ 0.0000, -0.4000,  0.3000,  0.0000]])
    """
    check_weight("weight", weight)
    check_out_dtype(out_dtype)
    check_pattern(n, m, dim)
    check_divisible("weight", weight, m, dim)
    if pruned is None:
        pruned = m - n
    check_pruned(pruned, n, m)
    temperature, relative = temperature_of(weight, tau, relative_tau)
    if out_dtype is None:
        out_dtype = autocast_dtype(weight)
    group = (m, pruned, dim % weight.dim())
    w_hat, mask = map_shards(
        lambda part: MaskedWeight.apply(
            part, None, temperature, group, relative, out_dtype, return_mask
        ),
        weight,
    )
    return (w_hat, mask) if return_mask else w_hat


def hard_mask_nm(weight: Tensor, n: int = 2, m: int = 4, dim: int = -1) -> Tensor:
    """The mask that keeps exactly the N largest of every M consecutive weights along dim.

    Of equal magnitudes the lowest index is pruned first; NaN counts as the largest. It is where
    `pdp_mask_nm`'s mask exceeds 1/2, but for ties at the boundary (arXiv 2305.11203, section 3.4).

    Shapes and dtypes:
        weight, n, m, dim: as in `pdp_mask_nm`.

    Returns:
        mask: bool, of the weight's shape and (for dense layouts) strides; True where kept.

    Raises:
        TypeError, ValueError: as `pdp_mask_nm`.

    Example:
        >>> hard_mask_nm(torch.tensor([1.0, -1.0, 3.0, 0.5]), 2, 4)
        tensor([False,  True,  True, False])
    """
    check_weight("weight", weight)
    check_pattern(n, m, dim)
    check_divisible("weight", weight, m, dim)
    return map_shards(
        lambda part: torch.ops.pdp.hard_mask_nm(part, m, m - n, dim % weight.dim()),
        weight.detach(),
    )
