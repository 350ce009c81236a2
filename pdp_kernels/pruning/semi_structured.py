"""From N:M weights to sparse tensor cores: where the pattern breaks, and the conversion."""

from typing import NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from pdp_kernels.functional.compress import COMPRESSED_DTYPES, compress_2to4
from pdp_kernels.functional.validation import check_divisible, check_pattern, check_plain_weight
from pdp_kernels.pruning.layers import layer_weights


class GroupCheck(NamedTuple):
    """Whether a weight keeps at most N of every M consecutive elements.

    first_broken has the weight's coordinates, with the group's number in the place of `dim`: (3, 2)
    for M = 4 along dim 1 is weight[3, 8:12]. None where no group breaks the pattern.
    """

    name: str
    ok: bool
    broken: int
    first_broken: tuple[int, ...] | None


class SemiStructuredReport(NamedTuple):
    """The names of the weights converted, and of those skipped with the reason."""

    converted: list[str]
    skipped: dict[str, str]


@overload
def check_nm(model_or_tensor: Tensor, n: int = 2, m: int = 4, dim: int = -1) -> GroupCheck: ...


@overload
def check_nm(
    model_or_tensor: nn.Module, n: int = 2, m: int = 4, dim: int = -1
) -> list[GroupCheck]: ...


def check_nm(model_or_tensor, n=2, m=4, dim=-1):
    """Whether at most n of every m consecutive weights along dim are nonzero, and where not.

    NaN is a nonzero (arXiv 2305.11203, section 3.4, for the pattern; N is what is kept).

    Shapes and dtypes:
        model_or_tensor: a dense floating point tensor, or a module, of which the weights of all
            Linear and convolution layers are checked whose size along dim is a multiple of m.
            Weights that several layers share are checked once, under the first layer's name.
        n, m: 1 <= n < m <= 32.
        dim: the dimension the groups lie along: -1 for Linear layers, 1 for convolutions too (the
            input channels).

    Returns:
        A `GroupCheck` for a tensor, whose name is empty; a list of them for a module.

    Raises:
        TypeError: model_or_tensor is neither, or n, m or dim is no int.
        ValueError: n or m outside of its range; a tensor without dimension dim, or whose size along
            it is no multiple of m; a module without any weight to check.

    Example:
        >>> check_nm(torch.tensor([[1.0, 0.0, 2.0, 0.0], [1.0, 2.0, 0.0, 3.0]]))
        GroupCheck(name='', ok=False, broken=1, first_broken=(1, 0))
    """
    check_pattern(n, m, dim)
    if not isinstance(model_or_tensor, nn.Module):
        check_plain_weight("model_or_tensor", model_or_tensor)
        check_divisible("model_or_tensor", model_or_tensor, m, dim)
        return _check_groups("", model_or_tensor, n, m, dim)
    checks = [
        _check_groups(names[0], weight, n, m, dim)
        for names, weight, _ in layer_weights(model_or_tensor)
        if not isinstance(weight, SparseSemiStructuredTensor) and _divisible(weight, m, dim)
    ]
    if not checks:
        raise ValueError(
            f"model_or_tensor must have a dense weight of a Linear or convolution layer whose size "
            f"along dim {dim} is a multiple of m = {m}, got a {type(model_or_tensor).__name__} "
            "without any"
        )
    return checks


def to_semi_structured(model: nn.Module, *, strict: bool = True) -> SemiStructuredReport:
    """Replaces the 2:4 weights of Linear layers by torch.sparse.SparseSemiStructuredTensor.

    The model is changed in place, for inference: the new parameters take no gradient. Every group
    of 4 weights along the inputs must have at most 2 nonzeros already (`check_nm`); PyTorch itself
    drops the others silently. Weights that several Linear layers share are converted once and
    stay shared.

    PyTorch's backend is cuSPARSELt, or CUTLASS where cuSPARSELt is missing or
    SparseSemiStructuredTensor._FORCE_CUTLASS is set; for CUTLASS `compress_2to4` packs the weight.
    In inference torch.nn.MultiheadAttention and TransformerEncoderLayer pass these parameters to
    operators that take no sparse weight: torch.backends.mha.set_fastpath_enabled(False) before.

    Arguments:
        model: a module; its Linear layers' weights are looked at, all others stay as they are.
        strict: raise if any of these weights cannot be converted, and change nothing. Otherwise
            such weights are skipped.

    Returns:
        A `SemiStructuredReport`: `converted`, a list of parameter names, and `skipped`, the reason
        for each other one: dtype (bfloat16 or float16), shape (PyTorch's multiples), not 2:4 with
        the first offending group, or device (CUDA of compute capability 8.0; for CUTLASS 8.x).

    Raises:
        TypeError: model is no module.
        ValueError: strict, and some weight cannot be converted; all reasons are listed.

    Example:
        >>> to_semi_structured(torch.nn.Linear(64, 32).half(), strict=False).skipped
        {'weight': 'group (0, 0) of 4 has 4 nonzeros, not 2 (512 such groups)'}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
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
    for weight, layers in convertible:
        parameter = nn.Parameter(_compressed(weight.detach(), backend), requires_grad=False)
        for layer in layers:
            layer.weight = parameter
    return report


def _backend() -> type[SparseSemiStructuredTensor]:
    if SparseSemiStructuredTensor._FORCE_CUTLASS or not torch.backends.cusparselt.is_available():
        return SparseSemiStructuredTensorCUTLASS
    return SparseSemiStructuredTensorCUSPARSELT


def _obstacle(
    weight: Tensor, layers: list[nn.Module], backend: type[SparseSemiStructuredTensor]
) -> str | None:
    """Why a weight cannot be converted, if so."""
    if isinstance(weight, SparseSemiStructuredTensor):
        return "is semi-structured already"
    if not all("weight" in dict(layer.named_parameters(recurse=False)) for layer in layers):
        return "is computed from other parameters: remove the parametrization first"
    if weight.dtype not in COMPRESSED_DTYPES:
        return f"dtype {weight.dtype} is neither torch.bfloat16 nor torch.float16"
    smallest = backend._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
    rows, cols = smallest.sparse_min_rows, smallest.sparse_min_cols
    if weight.numel() == 0 or weight.shape[0] % rows or weight.shape[1] % cols:
        return f"shape {tuple(weight.shape)} is not a positive multiple of ({rows}, {cols})"
    check = _check_groups("", weight, 2, 4, -1)
    if not check.ok:
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
