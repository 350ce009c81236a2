"""Checks of arguments. Every public function calls them first; the code below trusts them."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from pdp_kernels.distributed.shards import is_distributed, shard_starts
from pdp_kernels.ops.arguments import DTYPES, MAX_GROUP

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

NUMBERS = (float, int, Real)  # those of every call first: Real is asked in Python
NORMS = ("l2", "rms")
COUNT_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# An index is off by up to 5e-15 / p, measured on up to 2 * 10^6 weights: by less than 1e-9 here.
SMALLEST_P = 1e-5
SCOPES = ("neuron", "layer", "global")
_DTYPE_NAMES = "torch.float64, torch.float32, torch.bfloat16 or torch.float16"


def check_weight(name: str, weight: object) -> None:
    """Accept a dense floating point tensor; a DTensor too."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(weight).__name__}")
    if weight.layout != torch.strided or weight.is_nested:
        got = "a nested tensor" if weight.is_nested else f"layout {weight.layout}"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {got}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"{name} must have dtype {_DTYPE_NAMES}, got {weight.dtype}")
    if is_distributed(weight):
        _check_placements(name, weight)


def check_plain_weight(name: str, weight: object) -> None:
    """Accept a dense floating point tensor that is no DTensor."""
    check_not_distributed(name, weight)
    check_weight(name, weight)


def check_has_shape(name: str, weight: Tensor) -> None:
    """Accept a tensor that is no parameter of a lazy layer without a shape."""
    if is_lazy(weight):
        raise ValueError(f"{name} must have its shape: run the lazy layer once first")


def check_has_values(name: str, weight: Tensor) -> None:
    """Accept a tensor that has a shape and is not on the meta device."""
    check_has_shape(name, weight)
    if weight.is_meta:
        raise ValueError(f"{name} must have values, got one on the meta device")


def check_not_distributed(name: str, weight: object) -> None:
    if isinstance(weight, Tensor) and is_distributed(weight):
        raise TypeError(f"{name} must be a plain tensor, got a DTensor: take its full_tensor()")


def _check_placements(name: str, weight: "DTensor") -> None:
    if any(placement.is_partial() for placement in weight.placements):
        raise ValueError(
            f"{name} must have placements Shard and Replicate, got {weight.placements}: "
            "redistribute it first"
        )
    if weight.device_mesh.get_coordinate() is None:
        raise ValueError(
            f"{name} must be on a device mesh that has this rank, got {weight.device_mesh}"
        )


def check_weights(name: str, weights: Sequence[Tensor], one_device: bool = True) -> None:
    """Accept a list of such tensors, any of which may be a DTensor."""
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence):
        raise TypeError(f"{name} must be a list or tuple of tensors, got {type(weights).__name__}")
    if not weights:
        raise ValueError(f"{name} must hold at least one tensor, got an empty list")
    for index, weight in enumerate(weights):
        check_weight(f"{name}[{index}]", weight)
        if one_device and weight.device != weights[0].device:
            raise ValueError(
                f"{name} must be on one device, got {weights[0].device} for {name}[0] and "
                f"{weight.device} for {name}[{index}]"
            )


def check_ratio(name: str, ratio: object) -> None:
    """Accept a number in [0, 1], where a tensor of them is accepted too."""
    check_fraction(name, ratio, "a number in [0, 1] or a tensor of them")


def check_fraction(name: str, fraction: object, accepted: str = "a number in [0, 1]") -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, NUMBERS):
        raise TypeError(f"{name} must be {accepted}, got {type(fraction).__name__}")
    if not 0 <= as_float(fraction) <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {fraction}")


def as_float(number: Any) -> float:
    """Return a number as a float: inf for an integer or fraction that is too large for one."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def check_ratio_tensor(
    name: str, ratios: Tensor, shapes: tuple[tuple[int, ...], ...], device: torch.device
) -> None:
    check_constant(name, ratios, device)
    if tuple(ratios.shape) not in shapes:
        accepted = " or ".join(map(str, shapes))
        raise ValueError(f"{name} must have shape {accepted}, got {tuple(ratios.shape)}")


def check_constant(name: str, value: Tensor, device: torch.device) -> None:
    """Accept a floating point tensor on the weights' device that requires no gradient."""
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating point dtype, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} must be on the weight's device {device}, got {value.device}")
    if value.requires_grad:
        raise ValueError(f"{name} must not require a gradient: it is a constant; detach it")


def check_one_given(sparsity: float | Tensor | None, threshold: Tensor | None) -> None:
    if (sparsity is None) == (threshold is None):
        given = "neither" if sparsity is None else "both"
        raise ValueError(f"exactly one of sparsity and threshold must be given, got {given}")


def check_threshold(threshold: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(threshold, Tensor):
        raise TypeError(f"threshold must be a 0-d torch.Tensor, got {type(threshold).__name__}")
    check_constant("threshold", threshold, device)
    if threshold.dtype != dtype:
        raise TypeError(
            f"threshold must have dtype {dtype} (torch.float64 for float64 weights, else "
            f"torch.float32), got {threshold.dtype}"
        )
    if threshold.dim() != 0:
        raise ValueError(f"threshold must have shape (), got {tuple(threshold.shape)}")


def check_temperature(
    name: str, tau: float | Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    if isinstance(tau, Tensor):
        check_constant(name, tau, device)
        if tau.dim() != 0:
            raise ValueError(f"{name} must be a number or have shape (), got {tuple(tau.shape)}")
        return
    if isinstance(tau, bool) or not isinstance(tau, NUMBERS):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {type(tau).__name__}")
    limits = torch.finfo(dtype)
    # As a float, because NumPy's numbers compare in their own precision.
    if not limits.tiny <= as_float(tau) <= limits.max:
        raise ValueError(
            f"{name} must be positive and finite (at least {limits.tiny:.2g} and at most "
            f"{limits.max:.2g}), got {tau}"
        )


def check_out_dtype(out_dtype: torch.dtype | None) -> None:
    if out_dtype is not None and out_dtype not in DTYPES:
        raise TypeError(f"out_dtype must be {_DTYPE_NAMES}, got {out_dtype}")


def check_pattern(n: int, m: int, dim: int) -> None:
    for name, value in (("n", n), ("m", m), ("dim", dim)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not 1 <= n < m <= MAX_GROUP:
        raise ValueError(f"n and m must satisfy 1 <= n < m <= {MAX_GROUP}, got n = {n}, m = {m}")


def check_dim(name: str, weight: Tensor, dim: int) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    if not -weight.dim() <= dim < weight.dim():
        shape = tuple(weight.shape)
        raise ValueError(f"dim must be a dimension of {name}, whose shape is {shape}, got {dim}")


def check_one_of(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be {' or '.join(map(repr, accepted))}, got {value!r}")


def cut_groups(weight: Tensor, m: int, dim: int) -> str | None:
    """Return how the weight is sharded if that cuts groups of m along dim, else None."""
    if not is_distributed(weight):
        return None
    if all(start % m == 0 for start in shard_starts(weight, dim % weight.dim())):
        return None
    return f"placements {weight.placements} on a mesh of shape {tuple(weight.device_mesh.shape)}"


def check_divisible(name: str, weight: Tensor, m: int, dim: int) -> None:
    check_dim(name, weight, dim)
    if weight.shape[dim] % m != 0:
        raise ValueError(
            f"{name} must have a size along dim that is divisible by m, got shape "
            f"{tuple(weight.shape)}, dim = {dim}, m = {m}"
        )
    if placements := cut_groups(weight, m, dim):
        raise ValueError(
            f"{name} must not be sharded through groups of {m} along dim {dim}, got shape "
            f"{tuple(weight.shape)} with {placements}"
        )


def check_pruned(pruned: int | Tensor, n: int, m: int, device: torch.device) -> None:
    """Accept a number, or a tensor, whose value stays unread, on the weight's device."""
    if isinstance(pruned, Tensor):
        if pruned.dtype != torch.int64:
            raise TypeError(f"pruned must have dtype torch.int64, got {pruned.dtype}")
        if pruned.dim() != 0:
            raise ValueError(f"pruned must be an int or have shape (), got {tuple(pruned.shape)}")
        if pruned.device != device:
            raise ValueError(f"pruned must be on the weight's device {device}, got {pruned.device}")
        return
    if isinstance(pruned, bool) or not isinstance(pruned, int):
        raise TypeError(f"pruned must be an int or a 0-d tensor, got {type(pruned).__name__}")
    if not 0 <= pruned <= m - n:
        raise ValueError(f"pruned must be in [0, m - n] = [0, {m - n}], got {pruned}")


def check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_positive(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 < as_float(value) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_non_negative(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= as_float(value) < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def check_exponents(p: float, q: float) -> None:
    for name, value in (("p", p), ("q", q)):
        check_number(name, value)
    if not SMALLEST_P <= as_float(p) < as_float(q) < math.inf:
        raise ValueError(f"p and q must satisfy {SMALLEST_P} <= p < q < inf, got p = {p}, q = {q}")


def check_scope(scope: str) -> None:
    if scope not in SCOPES:
        raise ValueError(f'scope must be "neuron", "layer" or "global", got {scope!r}')


def check_has_rows(name: str, weight: Tensor) -> None:
    if weight.dim() == 0:
        raise ValueError(f'{name} must have a dimension 0 for scope = "neuron", got shape ()')


def check_kept(name: str, mask: Tensor | None, weight: Tensor) -> None:
    """Accept a mask of the unpruned weights, or None."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be None or a torch.Tensor, got {type(mask).__name__}")
    if mask.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {mask.layout}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype torch.bool, got {mask.dtype}")
    if mask.shape != weight.shape:
        raise ValueError(
            f"{name} must have the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}"
        )
    if is_distributed(weight) or is_distributed(mask):
        placed = [
            (each.device_mesh, each.placements) if is_distributed(each) else None
            for each in (mask, weight)
        ]
        if placed[0] != placed[1]:
            raise ValueError(f"{name} must be distributed as the weight is, got {mask!r}")
    if mask.device != weight.device:
        raise ValueError(
            f"{name} must be on the weight's device {weight.device}, got {mask.device}"
        )


def check_index(index: Tensor) -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.float64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be a torch.float64 tensor, got {got}")


def check_kept_counts(kept: int | Tensor, index: Tensor) -> None:
    """Accept the number of kept weights of each group. The values of a tensor are not read."""
    if isinstance(kept, int) and not isinstance(kept, bool):
        if kept < 0:
            raise ValueError(f"kept must be at least 0, got {kept}")
        return
    if not isinstance(kept, Tensor) or kept.dtype not in COUNT_DTYPES:
        got = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
        raise TypeError(f"kept must be an int or an integer torch.Tensor, got {got}")
    if kept.shape != index.shape:
        raise ValueError(
            f"kept must have the index's shape {tuple(index.shape)}, got {tuple(kept.shape)}"
        )
    if kept.device != index.device:
        raise ValueError(f"kept must be on the index's device {index.device}, got {kept.device}")


def check_sap_settings(p: float, q: float, eta: float, gamma: float, beta: float) -> None:
    check_exponents(p, q)
    check_non_negative("eta", eta)
    check_positive("gamma", gamma)
    check_fraction("beta", beta)
