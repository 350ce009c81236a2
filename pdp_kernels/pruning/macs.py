"""Multiply-accumulates of one inference, for the model and for each pruned weight."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pdp_kernels.pruning.evaluation import evaluated, run_model
from pdp_kernels.pruning.layers import ATTENTION_INPUTS
from pdp_kernels.pruning.targets import Holder, Target


@torch.no_grad()
def count_macs(model: nn.Module, targets: list[Target], inputs: Any) -> tuple[int, list[int]]:
    """Return the dense multiply-accumulates of the model and of each target.

    The model runs once, in evaluation mode. torch's FlopCounterMode counts the model (two
    operations are one multiply-accumulate). The inputs and outputs of its layers give the count of
    a target; a weight that several layers use counts in each of them.
    """
    counts = [0] * len(targets)
    handles = []

    def count_calls(index: int, holder: Holder) -> None:
        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            uses = _uses_of_each_element(holder, args, kwargs, output)
            counts[index] += round(uses * targets[index].weight.numel())

        called = holder.layer if holder.attention is None else holder.attention
        handles.append(called.register_forward_hook(count, with_kwargs=True))

    try:
        for index, target in enumerate(targets):
            for holder in target.holders:
                count_calls(index, holder)
        # FlopCounterMode misses the kernels of fused attention.
        flops = FlopCounterMode(display=False)
        with evaluated(model), sdpa_kernel(SDPBackend.MATH), flops:
            run_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return flops.get_total_flops() // 2, counts


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
        return args[0].numel() / layer.in_channels
    if isinstance(layer, nn.modules.conv._ConvNd):
        return output.numel() / layer.out_channels
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return 0
    return _vectors(output)


def _vectors(tensor: torch.Tensor) -> int:
    """Return the number of vectors along the last dimension."""
    return math.prod(tensor.shape[:-1])
