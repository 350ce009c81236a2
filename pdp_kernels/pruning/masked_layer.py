"""Layers that compute with a masked weight: the class changes, the Parameter stays.

A layer shows the masked weight as its weight only while a forward runs. Everyone else (optimizer,
state_dict, DDP's buckets, FSDP's shards) sees the Parameter under its own name.
"""

import copyreg
import functools
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from pdp_kernels.pruning.adapters import is_tuner, is_tuner_class, merged_adapters
from pdp_kernels.pruning.layers import (
    is_quantized,
    layers_read,
    not_a_parameter,
    parameter_of,
    quantized,
)
from pdp_kernels.pruning.mask_buckets import MaskBuckets, bucketed
from pdp_kernels.pruning.masks import UnstructuredMask, WeightMask

DATA_PARALLEL = (
    "torch.nn.DataParallel cannot run layers that PDPPruner masks, as its replicas would share one "
    "masked weight: use DistributedDataParallel (torchrun), or one GPU "
    "(CUDA_VISIBLE_DEVICES=0)"
)


class MaskedLayer(nn.Module):
    """The first base of a masked layer's class, which `mask_model` makes.

    Attributes:
        pdp_masks: for each weight of the layer that is pruned, its mask.
        pdp_shown: for each of them, the masked weight while a forward that reads it runs, else
            None.
    """

    pdp_masks: dict[str, WeightMask]
    pdp_shown: dict[str, Tensor | None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for each in (*args, *kwargs.values()):
            if isinstance(each, torch.fx.Proxy):
                raise RuntimeError(
                    "torch.fx cannot trace layers that PDPPruner masks, as their weights would "
                    "become constants: trace pruner.pruned_copy(), or the model after finalize"
                )
        shown = []
        try:
            others = layers_read(self, self.training) if self._modules else ()
            for layer in (self, *others):
                if not isinstance(layer, MaskedLayer):
                    continue
                for name, mask in layer.pdp_masks.items():
                    if layer.pdp_shown[name] is None:
                        layer.pdp_shown[name] = _masked(layer, name, mask)
                        shown.append((layer, name))
            return super().forward(*args, **kwargs)
        finally:
            for layer, name in shown:
                layer.pdp_shown[name] = None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "MaskedLayer":
        module: Any = super()  # torch leaves _apply without annotations
        module._apply(fn, recurse)
        for name, mask in self.pdp_masks.items():
            mask.to(parameter_of(self, name))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, mask in self.pdp_masks.items():
            mask.weight_loaded |= f"{prefix}{name}" in state_dict

    def _replicate_for_data_parallel(self) -> "MaskedLayer":
        raise RuntimeError(DATA_PARALLEL)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(super().__reduce_ex__(protocol), _masked_class, tuple(self.pdp_masks))


class MaskedModel(nn.Module):
    """The first base of a masked model's class, if several of its weights may be in buckets.

    Code that asks for the class finds the name that it had.

    Attributes:
        pdp_buckets: the buckets from which its layers take their masked weights.
    """

    pdp_buckets: MaskBuckets

    def __init_subclass__(cls) -> None:
        """Do nothing, where a user's class might enter each of its subclasses into a registry."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__
        if torch.compiler.is_compiling() or not self.training:
            return call(*args, **kwargs)
        return self.pdp_buckets.run(self, lambda: call(*args, **kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(super().__reduce_ex__(protocol), _model_class)


def mask_model(model: nn.Module, masks: dict[nn.Module, dict[str, WeightMask]]) -> None:
    """Mask these layers, and parents that read their weights directly.

    Args:
        model: the model, changed in place.
        masks: for each layer the masks of its weights, by name.
    """
    for layer, own in masks.items():
        _mask_layer(layer, own)
    mask_parents(model)
    unstructured = [
        mask for own in masks.values() for mask in own.values() if type(mask) is UnstructuredMask
    ]
    # A GraphModule writes a new forward into its class when its graph changes.
    if len(unstructured) > 1 and not isinstance(model, (MaskedLayer, torch.fx.GraphModule)):
        cls: type = type(model)
        cast(MaskedModel, model).pdp_buckets = MaskBuckets()
        model.__class__ = _model_class(cls)


def mask_parents(model: nn.Module) -> None:
    """Mask the layers that read or change the weights of masked ones, where they are not yet.

    Raises:
        RuntimeError: adapters have been merged into a masked weight.
    """
    parents = []
    for layer in model.modules():
        if isinstance(layer, MaskedLayer):
            continue
        children = [c for c in layers_read(layer, training=False) if isinstance(c, MaskedLayer)]
        if children and merged_adapters(layer):
            raise RuntimeError(
                f"PEFT has merged adapters {merged_adapters(layer)} into weights that PDPPruner "
                "masks, and the masks would prune the sums: call unmerge_adapter(), or finalize "
                "before you merge"
            )
        if children or is_tuner(layer):
            parents.append(layer)
    for layer in parents:
        _mask_layer(layer, {})


def unmask_model(model: nn.Module) -> None:
    """Give the layers of a model back the classes they had before `mask_model`."""
    for layer in model.modules():
        cls: type = type(layer)
        if isinstance(layer, MaskedLayer):
            layer.__class__ = original_class(cls)
            del layer.pdp_masks, layer.pdp_shown
        elif isinstance(layer, MaskedModel):
            layer.__class__ = original_class(cls)
            del layer.pdp_buckets


def check_unmasked(model: nn.Module, advice: str) -> None:
    """Raise a ValueError, which ends with this advice, if a layer of the model is masked."""
    masked = [
        name or type(layer).__name__
        for name, layer in model.named_modules()
        if isinstance(layer, MaskedLayer)
    ]
    if masked:
        raise ValueError(
            f"model must not have the masks of a pruner, got them on {', '.join(masked)}: {advice}"
        )


@functools.cache
def original_class(cls: type) -> type:
    """Return the class that a layer or model of this class had before it was masked.

    FSDP may have put a class of its own on top of the masked one; the result then has it too.
    """
    if cls.__bases__[0] in (MaskedLayer, MaskedModel):
        return cls.__bases__[1]
    bases = tuple(original_class(base) if _is_masked(base) else base for base in cls.__bases__)
    namespace = {
        name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")
    }
    is_layer = MaskedLayer in cls.__mro__
    return type(cls.__name__.replace("Masked", "", int(is_layer)), bases, namespace)


def _is_masked(cls: type) -> bool:
    return MaskedLayer in cls.__mro__ or MaskedModel in cls.__mro__


def _mask_layer(layer: nn.Module, masks: dict[str, WeightMask]) -> None:
    cls: type = type(layer)
    masked = cast(MaskedLayer, layer)
    masked.pdp_masks = masks
    masked.pdp_shown = dict.fromkeys(masks)
    layer.__class__ = _masked_class(cls, tuple(masks))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_in_onnx_export() -> bool:
    onnx = sys.modules.get("torch.onnx")  # torch imports it when it is used first
    return onnx is not None and onnx.is_in_onnx_export()


def _masked(layer: MaskedLayer, name: str, mask: WeightMask) -> Tensor:
    """Return the weight for a forward: softly masked in training, else with exact zeros."""
    weight = parameter_of(layer, name)
    if layer.training and not torch.compiler.is_compiling():
        w_hat = bucketed(weight, mask)
        if w_hat is not None:
            return w_hat
    if is_quantized(weight):
        cls: type = type(layer)
        raise quantized(f"the {name} of a {original_class(cls).__name__}", weight)
    if _is_in_onnx_export():
        raise RuntimeError(
            "torch.onnx cannot export the masks of PDPPruner: export pruner.pruned_copy(), or the "
            "model after finalize"
        )
    return mask.soft(weight) if layer.training else mask.hard(weight)


@functools.cache
def _masked_class(cls: type, names: tuple[str, ...]) -> type:
    # FSDP and Dynamo report the class by its name and module.
    namespace: dict[str, Any] = {"__module__": __name__}
    namespace.update({name: _shown_or_parameter(name) for name in names})
    if is_tuner_class(cls):
        namespace["merge"] = _refuse_merge
    return type(f"Masked{cls.__name__}", (MaskedLayer, cls), namespace)


@functools.cache
def _model_class(cls: type) -> type:
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (MaskedModel, cls), names)


def _refuse_merge(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "PEFT cannot merge adapters into weights that PDPPruner masks, as the masks would prune "
        "the sums: call finalize first. The merged weights are dense; a new pruner can prune them"
    )


def _shown_or_parameter(name: str) -> property:
    def get(layer: MaskedLayer) -> Tensor:
        shown = layer.pdp_shown[name]
        return parameter_of(layer, name) if shown is None else shown

    def set(layer: MaskedLayer, value: object) -> None:
        raise not_a_parameter(layer, name)

    return property(get, set)


def _reduced(reduced: Any, masked_class: Callable[..., type], *names: tuple[str, ...]) -> Any:
    """Let a pickle name the class that a masked one was made from: that exists at run time only."""
    make, args, *rest = reduced
    if make is not copyreg.__newobj__:  # type: ignore[attr-defined]  # not in typeshed
        return make, args, *rest
    cls, *others = args
    return _new, (masked_class, original_class(cls), names, *others), *rest


def _new(
    masked_class: Callable[..., type], cls: type, names: tuple[tuple[str, ...], ...], *args: Any
) -> Any:
    masked: Any = masked_class(cls, *names)
    return masked.__new__(masked, *args)
