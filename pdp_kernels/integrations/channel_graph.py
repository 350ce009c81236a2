"""Torch-Pruning's graph of the channels of a model, and a run of the model that records inputs."""

from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning as tp  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pdp_kernels.pruning.evaluation import run_model
from pdp_kernels.pruning.layers import weight_slots

Reads = dict[nn.Module, Tensor]  # for each layer, which inputs are not always zero


class _Conv1DPruner(tp.BasePruningFunc):  # type: ignore[misc]
    """Removes channels of Hugging Face's Conv1D, whose weight is (inputs, outputs)."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        kept = self._kept(self.get_out_channels(layer), idxs)
        layer.weight = self._prune_parameter_and_grad(layer.weight, kept, 1)
        layer.bias = self._prune_parameter_and_grad(layer.bias, kept, 0)
        layer.nf = len(kept)
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        kept = self._kept(self.get_in_channels(layer), idxs)
        layer.weight = self._prune_parameter_and_grad(layer.weight, kept, 0)
        layer.nx = len(kept)
        return layer

    def get_out_channels(self, layer: Any) -> int:
        return layer.weight.shape[1]

    def get_in_channels(self, layer: Any) -> int:
        return layer.weight.shape[0]

    def _kept(self, channels: int, idxs: Sequence[int]) -> list[int]:
        return sorted(set(range(channels)) - set(idxs))


def has_channels(layer: nn.Module) -> bool:
    """Whether it is a Linear, a convolution or Hugging Face's Conv1D."""
    return bool(weight_slots(layer)) and not isinstance(layer, nn.MultiheadAttention)


def trace(model: nn.Module, example_inputs: Any) -> Any:
    """Return the `torch_pruning.DependencyGraph` of a model.

    Raises:
        RuntimeError: Torch-Pruning cannot trace the model.
    """
    pruners = {
        type(layer): _Conv1DPruner()
        for layer in model.modules()
        if has_channels(layer) and not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))
    }
    try:
        return tp.DependencyGraph().build_dependency(
            model,
            example_inputs,
            forward_fn=_run_traced,
            output_transform=_differentiable,
            customized_pruners=pruners,
            verbose=False,
        )
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError) as error:
        raise RuntimeError(f"Torch-Pruning cannot trace the model: {error!r}") from error


@torch.no_grad()
def run_and_record(model: nn.Module, inputs: Any) -> tuple[Any, Reads]:
    """Return the outputs of a model, and which inputs of each layer are not always zero."""
    reads: Reads = {}

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = args[0] if args else next(iter(kwargs.values()))
        channels = -1 - len(getattr(layer, "kernel_size", ()))
        nonzero = values.movedim(channels, 0).flatten(1).ne(0).any(1)
        reads[layer] = reads[layer] | nonzero if layer in reads else nonzero

    layers = [layer for layer in model.modules() if has_channels(layer)]
    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        return run_model(model, inputs), {k: v.cpu() for k, v in reads.items()}
    finally:
        for handle in handles:
            handle.remove()


def _run_traced(model: nn.Module, inputs: Any) -> Any:
    """Run a model so that the graph shows its inputs, and no cache of Hugging Face's models."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    try:
        for config in cached:
            config.use_cache = False
        return run_model(model, tree_map(_tracked, inputs))
    finally:
        for config in cached:
            config.use_cache = True


def _tracked(value: Any) -> Any:
    """Return a copy of a floating point tensor from which gradients flow, and no leaf."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_().clone()
    return value


def _differentiable(outputs: Any) -> list[Tensor]:
    """Return the tensors of a model's outputs from which the graph can be traced."""
    leaves = tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
