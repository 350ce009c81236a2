"""Multiply-accumulates of one inference: of the model, and of each weight that is pruned."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pdp_kernels.pruning.targets import Holder, Target

_ATTENTION_INPUTS = ("query", "key", "value")


@torch.no_grad()
def count_macs(model: nn.Module, entries: list[Target], inputs: Any) -> tuple[int, list[int]]:
    """(of the whole model, of each entry), dense; a weight that several layers use counts for all.

    The model is called once in evaluation mode. The whole is counted by torch's FlopCounterMode
    (two operations are one multiply-accumulate), the entries from what their layers work on.
    """
    counts = [0] * len(entries)
    modes = {layer: layer.training for layer in model.modules()}
    one_call = torch.backends.mha.get_fastpath_enabled()
    handles = []

    def count_calls(index: int, holder: Holder):
        def count(_, args, kwargs, output):
            uses = _uses_of_each_element(holder, args, kwargs, output)
            counts[index] += round(uses * entries[index].weight.numel())

        called = holder.layer if holder.attention is None else holder.attention
        handles.append(called.register_forward_hook(count, with_kwargs=True))

    try:
        for index, entry in enumerate(entries):
            for holder in entry.holders:
                count_calls(index, holder)
        model.eval()
        # Attention in one call would not call its parts, nor would all its kernels be counted.
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
            model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(one_call)
        for handle in handles:
            handle.remove()
        for layer, training in modes.items():
            layer.training = training
    return flops.get_total_flops() // 2, counts


def _uses_of_each_element(holder: Holder, args: tuple, kwargs: dict, output: Any) -> float:
    """How many products each element of a weight is in, in one call of its layer."""
    layer, name = holder.layer, holder.slot.name
    if holder.attention is not None or isinstance(layer, nn.MultiheadAttention):
        arguments = dict(zip(_ATTENTION_INPUTS, args, strict=False)) | kwargs
        query, key, value = (_vectors(arguments[name]) for name in _ATTENTION_INPUTS)
        by_name = {"k_proj_weight": key, "v_proj_weight": value}
        # A third of the joint projection is multiplied with each of them.
        return (query + key + value) / 3 if name == "in_proj_weight" else by_name.get(name, query)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return args[0].numel() / layer.in_channels
    if isinstance(layer, nn.modules.conv._ConvNd):
        return output.numel() / layer.out_channels
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return 0
    return _vectors(output)


def _vectors(tensor: torch.Tensor) -> int:
    """How many vectors along the last dimension."""
    return math.prod(tensor.shape[:-1])
