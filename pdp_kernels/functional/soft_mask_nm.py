"""N:M masks: every group of M consecutive weights is a layer of its own and keeps N."""

from typing import Literal, overload

import torch
from torch import Tensor

from pdp_kernels.distributed.shards import is_distributed, map_shards
from pdp_kernels.functional.soft_mask import (
    autocast_dtype,
    gradient_temperature_of,
    masked_weight,
    temperature_of,
)
from pdp_kernels.functional.validation import (
    check_divisible,
    check_out_dtype,
    check_pattern,
    check_pruned,
    check_weight,
)


@overload
def pdp_mask_nm(
    weight: Tensor,
    n: int = 2,
    m: int = 4,
    *,
    dim: int = -1,
    tau: float | Tensor | None = None,
    relative_tau: float | Tensor | None = None,
    gradient_tau: float | Tensor | None = None,
    pruned: int | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_mask: Literal[False] = False,
) -> Tensor: ...


@overload
def pdp_mask_nm(
    weight: Tensor,
    n: int = 2,
    m: int = 4,
    *,
    dim: int = -1,
    tau: float | Tensor | None = None,
    relative_tau: float | Tensor | None = None,
    gradient_tau: float | Tensor | None = None,
    pruned: int | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_mask: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def pdp_mask_nm(
    weight: Tensor,
    n: int = 2,
    m: int = 4,
    *,
    dim: int = -1,
    tau: float | Tensor | None = None,
    relative_tau: float | Tensor | None = None,
    gradient_tau: float | Tensor | None = None,
    pruned: int | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_mask: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def pdp_mask_nm(
    weight: Tensor,
    n: int = 2,
    m: int = 4,
    *,
    dim: int = -1,
    tau: float | Tensor | None = None,
    relative_tau: float | Tensor | None = None,
    gradient_tau: float | Tensor | None = None,
    pruned: int | Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the N:M masked weight, with the paper's analytic gradient.

    `pdp_mask` where every group of M consecutive weights along ``dim`` is a layer of its own. With
    v_1 <= ... <= v_M the sorted magnitudes of a group and k = pruned, by default M - N:

        t     = (v_k + v_{k+1}) / 2                     (section 3.4 of arXiv 2305.11203)
        m(w)  = sigmoid((w^2 - t^2) / tau)              (Eq. 1)
        dw    = g (m + 2 w^2 / tau  m (1 - m))          (Eq. 2; t is a constant)

    N weights are KEPT of every M. Thresholds never reach memory: forward and backward are one pass
    over the weight each. Only the weight, tau and pruned are saved for backward.

    Sparse tensor cores multiply along the input features: dim -1 of a Linear weight, dim 1 of a
    convolution's. Prune a convolution with dim=1.

    Args:
        weight: any shape whose size along dim is divisible by m; float64, float32, bfloat16 or
            float16. Dense layouts are read in place for any dim, others are copied once. Or a
            DTensor whose shards do not cut groups.
        n: how many weights of a group are kept, 1 <= n < m.
        m: the size of a group, at most 32. Sparse tensor cores run 2:4.
        dim: the dimension that is cut into groups.
        tau: the temperature, as in `pdp_mask`.
        relative_tau: the relative temperature, as in `pdp_mask`; it follows each group's own t.
        gradient_tau: the temperature of Eq. 2, as in `pdp_mask`. From scratch 2:4 groups train
            better with one that stays at 1 (relative) while the mask's falls: pruned weights go on
            learning. `PDPConfig` has other recommendations for 1:4 and for fine-tuning.
        pruned: how many weights of a group are pruned now, 0 to m - n (default), so that a
            schedule can ramp up. 0 is the identity. An int, or an int64 tensor, (), on the weight's
            device. A tensor is read on the device alone (unchecked), so that a schedule needs
            neither recompilation nor another graph capture.
        out_dtype: the dtype of w_hat (and of the mask), as in `pdp_mask`.
        return_mask: also return m(w).

    Returns:
        w_hat, of the weight's shape and (for dense layouts) strides. With return_mask
        (w_hat, m), differentiable through both. It cannot be differentiated twice.

    Raises:
        TypeError: a weight, temperature, pruned or out_dtype of the wrong type or dtype; n, m or
            dim no int.
        ValueError: n and m not as above; no such dim; a size not divisible by m; pruned outside
            [0, m - n]; both temperatures, or one that is not positive and finite; a tensor of the
            wrong shape, on another device, or (a temperature) that requires a gradient; a DTensor
            as in `pdp_thresholds`, or whose shards cut groups.

    Examples:
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
    check_pruned(pruned, n, m, weight.device)
    temperature, relative = temperature_of(weight, tau, relative_tau)
    of_gradient = gradient_temperature_of(weight, gradient_tau, temperature)
    if out_dtype is None:
        out_dtype = autocast_dtype(weight)
    group = (m, dim % weight.dim())
    temperatures = (temperature, of_gradient)
    constants = (_count(pruned, weight), *temperatures, group, relative, out_dtype, return_mask)
    w_hat, mask = masked_weight(weight, constants)
    return (w_hat, mask) if return_mask else w_hat


def _count(pruned: int | Tensor, weight: Tensor) -> Tensor:
    """Return the number as a tensor on the weight's device."""
    if isinstance(pruned, Tensor):
        return pruned
    return torch.full((), pruned, dtype=torch.int64, device=weight.device)


def hard_mask_nm(weight: Tensor, n: int = 2, m: int = 4, dim: int = -1) -> Tensor:
    """Return the mask that keeps exactly the N largest of every M consecutive weights along dim.

    Of equal magnitudes the lowest index is pruned first; NaN counts as the largest. The mask is
    True where the mask of `pdp_mask_nm` exceeds 1/2, except for ties at the boundary (arXiv
    2305.11203, section 3.4).

    Args:
        weight: as in `pdp_mask_nm`.
        n: how many weights of a group are kept, 1 <= n < m.
        m: the size of a group, at most 32.
        dim: the dimension that is cut into groups.

    Returns:
        A bool mask of the weight's shape and (for dense layouts) strides; True where kept.

    Raises:
        TypeError: as `pdp_mask_nm`.
        ValueError: as `pdp_mask_nm`.

    Examples:
        >>> hard_mask_nm(torch.tensor([1.0, -1.0, 3.0, 0.5]), 2, 4)
        tensor([False,  True,  True, False])
    """
    check_weight("weight", weight)
    check_pattern(n, m, dim)
    check_divisible("weight", weight, m, dim)
    group = (m, _count(m - n, weight), dim % weight.dim())
    weight = weight.detach()
    if is_distributed(weight):
        return map_shards(lambda shard: torch.ops.pdp.hard_mask_nm(shard, *group), weight)
    return torch.ops.pdp.hard_mask_nm(weight, *group)
