"""Multiply-accumulates of one inference, for the model and for each pruned weight."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import FlopCounterMode

from pdp_kernels.pruning.evaluation import evaluated, run_model
from pdp_kernels.pruning.layers import ATTENTION_INPUTS, first_argument
from pdp_kernels.pruning.targets import Holder, Target

# FlopCounterMode misses their kernels, in which each vector of the first input uses each matrix.
_MISSED = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)

_aten = torch.ops.aten


def _grouped_flops(a: torch.Size, b: torch.Size, *_: object, **__: object) -> int:
    """Return the operations of a grouped product, as of the experts of a mixture.

    Offsets cut rows of a, columns of b, or what is summed over. Without them both have groups.
    """
    groups = a[0] if len(a) == len(b) == 3 else 1
    return 2 * groups * a[-2] * a[-1] * b[-1]


def _vector_flops(matrix: torch.Size, *_: object, **__: object) -> int:
    return 2 * math.prod(matrix)


def _added_vector_flops(_: torch.Size, matrix: torch.Size, *__: object, **___: object) -> int:
    return 2 * math.prod(matrix)


# The operations of more products that FlopCounterMode misses, by the shapes of their arguments.
_MISSED_PRODUCTS = {
    _aten._grouped_mm: _grouped_flops,
    _aten.mv: _vector_flops,
    _aten.addmv: _added_vector_flops,
}


@torch.no_grad()
def count_macs(model: nn.Module, targets: list[Target], inputs: Any) -> tuple[int, list[int]]:
    """Return the dense multiply-accumulates of the model and of each target.

    The model runs once, in evaluation mode. torch's FlopCounterMode counts the model and each layer
    (two operations are one multiply-accumulate), except recurrent and bilinear layers, whose inputs
    say how often they use their weights. A weight that several layers use counts in each of them.
    """
    counts = [0] * len(targets)
    indices: dict[nn.Module, list[int]] = {
        layer: [] for layer in model.modules() if isinstance(layer, _MISSED)
    }
    handles = []
    flops = FlopCounterMode(display=False, custom_mapping=_MISSED_PRODUCTS)
    before: list[int] = []  # what was counted when a layer was called
    corrections: list[int] = []

    def begin(*_: object) -> None:
        before.append(flops.get_total_flops())

    def end(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: object) -> None:
        counted = (flops.get_total_flops() - before.pop()) // 2
        macs = counted
        if isinstance(layer, _MISSED):
            macs = max(counted, _vectors(first_argument(args, kwargs)) * _matrix_size(layer))
        corrections.append(macs - counted)
        for index in indices[layer]:
            counts[index] += macs * targets[index].weight.numel() // _matrix_size(layer)

    def count_projections(index: int, holder: Holder) -> None:
        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: object) -> None:
            uses = _uses_of_each_element(holder.slot.name, args, kwargs)
            counts[index] += round(uses * targets[index].weight.numel())

        attention = holder.layer if holder.attention is None else holder.attention
        handles.append(attention.register_forward_hook(count, with_kwargs=True))

    try:
        for index, target in enumerate(targets):
            for holder in target.holders:
                if holder.attention is not None or isinstance(holder.layer, nn.MultiheadAttention):
                    count_projections(index, holder)
                elif not _has_matrices_inside(holder.layer):
                    indices.setdefault(holder.layer, []).append(index)
        for layer in indices:
            handles.append(layer.register_forward_pre_hook(begin))
            handles.append(layer.register_forward_hook(end, with_kwargs=True))
        # FlopCounterMode misses the kernels of fused attention.
        with evaluated(model), sdpa_kernel(SDPBackend.MATH), flops:
            # Its hooks, which tell modules apart, raise errors for views of Parameters.
            flops.mod_tracker.__exit__()
            run_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return flops.get_total_flops() // 2 + sum(corrections), counts


def _matrix_size(layer: nn.Module) -> int:
    """Return the number of elements in the layer's own matrices, among which products divide."""
    own = layer._parameters.values()
    return sum(each.numel() for each in own if each is not None and each.dim() >= 2)


def _has_matrices_inside(layer: nn.Module) -> bool:
    """Whether layers in it have matrices, whose products are not told from those of its own."""
    return any(_matrix_size(inner) for child in layer.children() for inner in child.modules())


def _uses_of_each_element(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Return the number of products that use one element of an attention's weight, in one call."""
    arguments = dict(zip(ATTENTION_INPUTS, args, strict=False)) | kwargs
    query, key, value = (_vectors(arguments[name]) for name in ATTENTION_INPUTS)
    by_name = {"k_proj_weight": key, "v_proj_weight": value}
    # The joint projection multiplies a third of its rows with each of them.
    return (query + key + value) / 3 if name == "in_proj_weight" else by_name.get(name, query)


def _vectors(inputs: torch.Tensor | PackedSequence) -> int:
    """Return the number of vectors along the last dimension."""
    tensor = inputs.data if isinstance(inputs, PackedSequence) else inputs
    return math.prod(tensor.shape[:-1])
