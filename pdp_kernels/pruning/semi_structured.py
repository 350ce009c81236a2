"""Conversion of 2:4 weights for sparse tensor cores, and a check of N:M patterns."""

from typing import NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from pdp_kernels.distributed.shards import is_distributed
from pdp_kernels.functional.compress import COMPRESSED_DTYPES, compress_2to4
from pdp_kernels.functional.validation import (
    check_divisible,
    check_has_values,
    check_not_distributed,
    check_pattern,
    check_plain_weight,
)
from pdp_kernels.pruning.layers import layer_weights, read_weight
from pdp_kernels.pruning.masked_layer import check_unmasked
from pdp_kernels.pruning.targets import default_holders


class GroupCheck(NamedTuple):
    """Whether a weight has at most N nonzeros in every M consecutive elements.

    Attributes:
        name: the weight's name in the model; empty for a tensor.
        ok: True if no group has more than N nonzeros.
        broken: the number of groups with more than N nonzeros.
        first_broken: the coordinates of the first of them, with the group's index in place of the
            element's along dim: (3, 2) for M = 4 along dim 1 is weight[3, 8:12]. None if ok.

    Examples:
        >>> check = check_nm(torch.nn.Linear(8, 2))[0]
        >>> check.name, check.ok, check.broken
        ('weight', False, 4)
    """

    name: str
    ok: bool
    broken: int
    first_broken: tuple[int, ...] | None


class SemiStructuredReport(NamedTuple):
    """The result of `to_semi_structured`.

    Attributes:
        converted: the names of the converted weights.
        skipped: the reason for each weight that was not converted, by name, of all that `PDPPruner`
            prunes by default.

    Examples:
        >>> report = to_semi_structured(torch.nn.Linear(64, 32), strict=False)
        >>> report.converted, report.skipped
        ([], {'weight': 'dtype torch.float32 is neither torch.bfloat16 nor torch.float16'})
    """

    converted: list[str]
    skipped: dict[str, str]


@overload
def check_nm(
    model_or_tensor: Tensor, n: int = 2, m: int = 4, dim: int | None = None
) -> GroupCheck: ...


@overload
def check_nm(
    model_or_tensor: nn.Module, n: int = 2, m: int = 4, dim: int | None = None
) -> list[GroupCheck]: ...


def check_nm(
    model_or_tensor: Tensor | nn.Module, n: int = 2, m: int = 4, dim: int | None = None
) -> GroupCheck | list[GroupCheck]:
    """Return whether at most n of every m consecutive weights along dim are nonzero.

    N counts the kept weights (section 3.4 of arXiv 2305.11203). NaN counts as a nonzero.

    Args:
        model_or_tensor: a dense floating point tensor, or a module. In a module, those weights are
            checked that `PDPPruner` prunes by default and whose size along dim is a multiple of m.
            A weight that several layers share is checked once, under the first layer's name.
        n: nonzeros allowed per group, 1 <= n < m.
        m: elements per group, at most 32.
        dim: the dimension along which the groups lie. Default: the last one of a tensor; in a
            module the inputs of each weight, as `PDPPruner` prunes it (1, but 0 of transposed
            convolutions and Hugging Face's Conv1D).

    Returns:
        A `GroupCheck` with an empty name for a tensor, a list of them for a module.

    Raises:
        TypeError: model_or_tensor is neither, or a DTensor, or has one; n, m or dim is no int.
        ValueError: n or m is out of its range; a tensor has no dimension dim, or its size along dim
            is no multiple of m; a module has no weight to check, or one of a lazy layer without a
            shape; a weight on the meta device.

    Examples:
        >>> check_nm(torch.tensor([[1.0, 0.0, 2.0, 0.0], [1.0, 2.0, 0.0, 3.0]]))
        GroupCheck(name='', ok=False, broken=1, first_broken=(1, 0))
    """
    check_pattern(n, m, -1 if dim is None else dim)
    if not isinstance(model_or_tensor, (nn.Module, Tensor)):
        raise TypeError(
            "model_or_tensor must be a torch.nn.Module or a torch.Tensor, got "
            f"{type(model_or_tensor).__name__}"
        )
    if not isinstance(model_or_tensor, nn.Module):
        dim = -1 if dim is None else dim
        check_plain_weight("model_or_tensor", model_or_tensor)
        check_has_values("model_or_tensor", model_or_tensor)
        check_divisible("model_or_tensor", model_or_tensor, m, dim)
        return _check_groups("", model_or_tensor, n, m, dim)
    checks = []
    for first, *_ in default_holders(model_or_tensor):
        weight = read_weight(first.layer, first.slot.name)
        check_not_distributed(f"model_or_tensor's {first.weight_name}", weight)
        check_has_values(f"model_or_tensor's {first.weight_name}", weight)
        along = first.slot.inputs if dim is None else dim
        if not isinstance(weight, SparseSemiStructuredTensor) and _divisible(weight, m, along):
            checks.append(_check_groups(first.weight_name, weight, n, m, along))
    if not checks:
        raise ValueError(
            "model_or_tensor must have a dense weight that PDPPruner prunes by default and whose "
            f"size along {'its inputs' if dim is None else f'dim {dim}'} is a multiple of m = {m}, "
            f"got a {type(model_or_tensor).__name__} without any"
        )
    return checks


def to_semi_structured(model: nn.Module, *, strict: bool = True) -> SemiStructuredReport:
    """Replace the 2:4 weights of Linear layers by torch.sparse.SparseSemiStructuredTensor.

    The function changes the model in place, for inference: the new parameters require no gradient.
    Every group of 4 weights along the inputs must have at most 2 nonzeros already (`check_nm`);
    PyTorch's own conversion drops others silently. A weight that several Linear layers share is
    converted once and stays shared.

    PyTorch's backend is cuSPARSELt, or CUTLASS if cuSPARSELt is missing or
    SparseSemiStructuredTensor._FORCE_CUTLASS is set. `compress_2to4` packs the weights for CUTLASS.
    In inference torch.nn.MultiheadAttention and TransformerEncoderLayer pass these parameters to
    operators that accept no sparse weight: call torch.backends.mha.set_fastpath_enabled(False)
    first.

    Args:
        model: a module. The weights of its Linear layers are candidates; others stay as they are.
        strict: True raises an error if some candidate cannot be converted, and changes nothing.
            False skips such weights.

    Returns:
        A `SemiStructuredReport`. Its reasons are the dtype (not bfloat16 or float16), the shape (no
        multiple of PyTorch's), the pattern (with the first group that is not 2:4), and the device
        (not CUDA of compute capability 8.0 or later; 8.x for CUTLASS). Last it names what is no
        candidate: other layers that `PDPPruner` prunes by default.

    Raises:
        TypeError: model is no module.
        ValueError: the model has the masks of a pruner; or strict, and some candidate cannot be
            converted. The message lists all reasons.

    Examples:
        >>> to_semi_structured(torch.nn.Linear(64, 32).half(), strict=False).skipped
        {'weight': 'group (0, 0) of 4 has 4 nonzeros, not 2 (512 such groups)'}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_unmasked(model, "finalize its pruner first, or give pruner.pruned_copy()")
    backend = _backend()
    report = SemiStructuredReport([], {})
    convertible = []
    for names, weight, layers in layer_weights(model, nn.Linear):
        obstacle = _obstacle(weight, layers, backend)
        if obstacle is None:
            convertible.append((weight, layers))
            report.converted.extend(names)
        else:
            report.skipped.update(dict.fromkeys(names, obstacle))
    if strict and report.skipped:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in report.skipped.items())
        raise ValueError(f"weights that cannot be semi-structured:{reasons}")
    report.skipped.update(_no_candidates(model))
    for weight, layers in convertible:
        parameter = nn.Parameter(_compressed(weight.detach(), backend), requires_grad=False)
        for layer in layers:
            layer.weight = parameter
    return report


def _no_candidates(model: nn.Module) -> dict[str, str]:
    """Return, by name, that a weight that `PDPPruner` prunes by default is not a Linear layer's."""
    return {
        holder.weight_name: f"is of a {type(holder.layer).__name__}, not of a Linear layer"
        for holders in default_holders(model)
        for holder in holders
        if not isinstance(holder.layer, nn.Linear)
    }


def _backend() -> type[SparseSemiStructuredTensor]:
    if SparseSemiStructuredTensor._FORCE_CUTLASS or not torch.backends.cusparselt.is_available():
        return SparseSemiStructuredTensorCUTLASS
    return SparseSemiStructuredTensorCUSPARSELT


def _obstacle(
    weight: Tensor, layers: list[nn.Module], backend: type[SparseSemiStructuredTensor]
) -> str | None:
    """Return why a weight cannot be converted, or None if it can."""
    if isinstance(weight, SparseSemiStructuredTensor):
        return "is semi-structured already"
    if not all("weight" in dict(layer.named_parameters(recurse=False)) for layer in layers):
        return "is computed from other parameters: remove the parametrization first"
    if is_distributed(weight):
        return "is a DTensor: gather the model's state_dict into an unsharded model"
    if is_lazy(weight):
        return "has no shape yet: run the lazy layer once first"
    if weight.is_meta:
        return "is on the meta device, without values"
    if weight.dtype not in COMPRESSED_DTYPES:
        return f"dtype {weight.dtype} is neither torch.bfloat16 nor torch.float16"
    smallest = backend._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
    rows, cols = smallest.sparse_min_rows, smallest.sparse_min_cols
    if weight.numel() == 0 or weight.shape[0] % rows or weight.shape[1] % cols:
        return f"shape {tuple(weight.shape)} is not a positive multiple of ({rows}, {cols})"
    check = _check_groups("", weight, 2, 4, -1)
    if check.first_broken is not None:
        row, group = check.first_broken
        nonzeros = int(weight[row, 4 * group : 4 * group + 4].count_nonzero())
        return (
            f"group {check.first_broken} of 4 has {nonzeros} nonzeros, not 2 "
            f"({check.broken} such groups)"
        )
    return _device_obstacle(weight.device, backend)


def _device_obstacle(device: torch.device, backend: type[SparseSemiStructuredTensor]) -> str | None:
    if device.type != "cuda":
        return f"device {device} has no sparse tensor cores: move the model to CUDA first"
    capability = torch.cuda.get_device_capability(device)
    cutlass = backend is SparseSemiStructuredTensorCUTLASS
    if capability < (8, 0) or (cutlass and capability >= (9, 0)):
        accepted = "8.x for CUTLASS" if cutlass else "8.0 or later"
        return f"device {device} has compute capability {capability}, not {accepted}"
    return None


def _compressed(
    weight: Tensor, backend: type[SparseSemiStructuredTensor]
) -> SparseSemiStructuredTensor:
    weight = weight.contiguous()
    if backend is SparseSemiStructuredTensorCUSPARSELT:
        return backend.from_dense(weight)
    values, metadata = compress_2to4(weight)
    return backend(
        weight.shape,
        packed=values,
        meta=metadata,
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
    )


def _check_groups(name: str, weight: Tensor, n: int, m: int, dim: int) -> GroupCheck:
    dim %= weight.dim()
    groups = weight.detach().unflatten(dim, (-1, m))
    broken = (groups.count_nonzero(dim + 1) > n).nonzero()
    first = tuple(broken[0].tolist()) if len(broken) else None
    return GroupCheck(name, first is None, len(broken), first)


def _divisible(weight: Tensor, m: int, dim: int) -> bool:
    return -weight.dim() <= dim < weight.dim() and weight.shape[dim] % m == 0
