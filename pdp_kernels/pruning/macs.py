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


@torch.no_grad()
def count_macs(model: nn.Module, targets: list[Target], inputs: Any) -> tuple[int, list[int]]:
    """Return the dense multiply-accumulates of the model and of each target.

    The model runs once, in evaluation mode. torch's FlopCounterMode counts the model (two
    operations are one multiply-accumulate), except recurrent layers, whose inputs say how often
    they use their weights: it misses their fused kernels. The inputs and outputs of layers give the
    count of a target; a weight that several layers use counts in each of them.
    """
    counts = [0] * len(targets)
    handles = []

    def count_calls(index: int, holder: Holder) -> None:
        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            uses = _uses_of_each_element(holder, args, kwargs, output)
            counts[index] += round(uses * targets[index].weight.numel())

        called = holder.layer if holder.attention is None else holder.attention
        handles.append(called.register_forward_hook(count, with_kwargs=True))

    flops = FlopCounterMode(display=False)
    before: list[int] = []  # what was counted when a recurrent layer was called
    corrections: list[int] = []

    def begin_recurrent(*_: object) -> None:
        before.append(flops.get_total_flops())

    def end_recurrent(
        layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: object
    ) -> None:
        counted = (flops.get_total_flops() - before.pop()) // 2
        corrections.append(_recurrent_macs(layer, first_argument(args, kwargs)) - counted)

    try:
        for layer in model.modules():
            if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
                handles.append(layer.register_forward_pre_hook(begin_recurrent))
                handles.append(layer.register_forward_hook(end_recurrent, with_kwargs=True))
        for index, target in enumerate(targets):
            for holder in target.holders:
                count_calls(index, holder)
        # FlopCounterMode misses the kernels of fused attention.
        with evaluated(model), sdpa_kernel(SDPBackend.MATH), flops:
            run_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return flops.get_total_flops() // 2 + sum(corrections), counts


def _recurrent_macs(layer: nn.Module, inputs: torch.Tensor | PackedSequence) -> int:
    """Return the multiply-accumulates of a recurrent layer: each step uses each matrix once."""
    if isinstance(inputs, PackedSequence):
        inputs = inputs.data
    matrices = (weight for weight in layer.parameters(recurse=False) if weight.dim() == 2)
    return _vectors(inputs) * sum(matrix.numel() for matrix in matrices)


def _uses_of_each_element(
    holder: Holder, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> float:
    """Return the number of products that use one element of the weight, in one layer call."""
    layer, name = holder.layer, holder.slot.name
    if holder.attention is not None or isinstance(layer, nn.MultiheadAttention):
        arguments = dict(zip(ATTENTION_INPUTS, args, strict=False)) | kwargs
        query, key, value = (_vectors(arguments[name]) for name in ATTENTION_INPUTS)
        by_name = {"k_proj_weight": key, "v_proj_weight": value}
        # The joint projection multiplies a third of its rows with each of them.
        return (query + key + value) / 3 if name == "in_proj_weight" else by_name.get(name, query)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return first_argument(args, kwargs).numel() / layer.in_channels
    if isinstance(layer, nn.modules.conv._ConvNd):
        return output.numel() / layer.out_channels
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return 0
    return _vectors(output)


def _vectors(tensor: torch.Tensor) -> int:
    """Return the number of vectors along the last dimension."""
    return math.prod(tensor.shape[:-1])
