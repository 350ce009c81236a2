"""Layers that compute with a masked weight: the class changes, the Parameter stays.

A layer shows the masked weight as its weight only while a forward of it, or of a module around it,
runs. Everyone else (optimizer, state_dict, DDP's buckets, FSDP's shards) sees the Parameter under
its own name.
"""

import copyreg
import functools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pdp_kernels.pruning.adapters import is_tuner_class, merged_adapters
from pdp_kernels.pruning.layers import (
    is_quantized,
    may_read_weights,
    not_a_parameter,
    parameter_of,
    quantized,
)
from pdp_kernels.pruning.mask_buckets import MaskBuckets, bucketed
from pdp_kernels.pruning.masks import UnstructuredMask, WeightMask
from pdp_kernels.pruning.user_warnings import warn_user

DATA_PARALLEL = (
    "torch.nn.DataParallel cannot run layers that PDPPruner masks, as its replicas would share one "
    "masked weight: use DistributedDataParallel (torchrun), or one GPU "
    "(CUDA_VISIBLE_DEVICES=0)"
)


class _Masked(nn.Module):
    """What the classes that `mask_model` makes have in common."""

    def __init_subclass__(cls) -> None:
        """Do nothing, where a user's class might enter each of its subclasses into a registry."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make a plain module, as where a Sequential makes one of its slice.

        Copies of a masked one, which code may make by `__new__` alone, are masked.
        """
        if "_parameters" not in vars(self):  # it is new
            self.__class__ = original_class(type(self))
            type(self).__init__(self, *args, **kwargs)
        else:
            super().__init__(*args, **kwargs)

    def __prepare_scriptable__(self) -> Any:
        """Raise an error where torch.jit.script would meet code that it cannot compile."""
        raise RuntimeError(
            "torch.jit.script cannot compile the masks of PDPPruner: script pruner.pruned_copy(), "
            "or the model after finalize"
        )


class MaskedLayer(_Masked):
    """The first base of a masked layer's class.

    Attributes:
        pdp_masks: for each weight of the layer that is pruned, its mask.
        pdp_shown: for each of them, the masked weight while a forward that reads it runs, else
            None.
    """

    pdp_masks: dict[str, WeightMask]
    pdp_shown: dict[str, Tensor | None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not _is_masked(self):
            return type(self).forward(self, *args, **kwargs)
        for each in (*args, *kwargs.values()):
            if isinstance(each, torch.fx.Proxy):
                raise RuntimeError(
                    "torch.fx cannot trace layers that PDPPruner masks, as their weights would "
                    "become constants: trace pruner.pruned_copy(), or the model after finalize"
                )
        return _run(super().forward, args, kwargs, self)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "MaskedLayer":
        module: Any = super()  # torch leaves _apply without annotations
        module._apply(fn, recurse)
        for name, mask in self.pdp_masks.items():
            mask.to(parameter_of(self, name))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, mask in self.pdp_masks.items():
            if f"{prefix}{name}" in state_dict:
                mask.weight_loaded = not mask.awaits_weight
                mask.to(parameter_of(self, name))  # by assignment it may be elsewhere

    def _replicate_for_data_parallel(self) -> "MaskedLayer":
        raise RuntimeError(DATA_PARALLEL)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self, super().__reduce_ex__(protocol), _masked_class, tuple(self.pdp_masks))


class MaskedParent(_Masked):
    """The first base of the class of a module that has masked layers in it.

    Its forward may read their weights without calling them. Code that asks for the class finds the
    name that it had.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _is_masked(self):
            return type(self).__call__(self, *args, **kwargs)
        call = super().__call__
        if torch.compiler.is_compiling() or "forward" not in vars(self):
            return call(*args, **kwargs)
        # Set on the instance, as by accelerate's mixed precision, it hides that of the class.
        return _run(call, args, kwargs, None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        masked_class = _model_class if isinstance(self, MaskedModel) else _parent_class
        return _reduced(self, super().__reduce_ex__(protocol), masked_class)


class MaskedModel(MaskedParent):
    """The first base of a masked model's class, if several of its weights may be in buckets.

    Attributes:
        pdp_buckets: the buckets from which its layers take their masked weights.
    """

    pdp_buckets: MaskBuckets

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _is_masked(self):
            return type(self).__call__(self, *args, **kwargs)
        call = super().__call__
        if torch.compiler.is_compiling() or not self.training:
            return call(*args, **kwargs)
        return self.pdp_buckets.run(self, lambda: call(*args, **kwargs))


def _is_masked(module: nn.Module) -> bool:
    """Whether a module whose method runs still has its masks.

    torch.compile, and code that sets a forward on an instance, hold methods from before
    `unmask_model`.
    """
    return isinstance(module, _Masked)


def mask_model(model: nn.Module, masks: dict[nn.Module, dict[str, WeightMask]]) -> None:
    """Mask these layers, and the modules that have them in them.

    Args:
        model: the model, changed in place.
        masks: for each layer the masks of its weights, by name.
    """
    classes = [_masked_class(type(layer), tuple(own)) for layer, own in masks.items()]
    for (layer, own), cls in zip(masks.items(), classes, strict=True):
        masked = cast(MaskedLayer, layer)
        masked.pdp_masks = own
        masked.pdp_shown = dict.fromkeys(own)
        layer.__class__ = cls
    unstructured = [
        mask for own in masks.values() for mask in own.values() if type(mask) is UnstructuredMask
    ]
    if len(unstructured) > 1 and not isinstance(model, (MaskedLayer, torch.fx.GraphModule)):
        cls = type(model)
        cast(MaskedModel, model).pdp_buckets = MaskBuckets()
        model.__class__ = _model_class(cls)
    mask_parents(model)


def mask_parents(model: nn.Module) -> None:
    """Mask the modules that may read the weights of masked layers in them, where they are not yet.

    Raises:
        RuntimeError: adapters have been merged into a masked weight.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    parents: dict[str, None] = {}
    for name, layer in modules.items():
        if isinstance(layer, MaskedLayer):
            parts = name.split(".") if name else []
            parents.update({".".join(parts[:length]): None for length in range(len(parts))})
    for name in parents:
        parent = modules[name]
        may_read = may_read_weights(type(parent)) or "forward" in vars(parent)
        if isinstance(parent, (MaskedLayer, MaskedParent)) or not may_read:
            continue
        if merged_adapters(parent):
            raise RuntimeError(
                f"PEFT has merged adapters {merged_adapters(parent)} into weights that PDPPruner "
                "masks, and the masks would prune the sums: call unmerge_adapter(), or finalize "
                "before you merge"
            )
        cls: type = type(parent)
        parent.__class__ = _parent_class(cls)


def unmask_model(model: nn.Module) -> None:
    """Give the layers of a model back the classes they had before `mask_model`."""
    for layer in model.modules():
        cls: type = type(layer)
        if isinstance(layer, MaskedLayer):
            del layer.pdp_masks, layer.pdp_shown
        elif isinstance(layer, MaskedModel):
            del layer.pdp_buckets
        if issubclass(cls, _Masked):
            layer.__class__ = original_class(cls)


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


def original_class(cls: type) -> type:
    """Return the class that a layer or module of this class had before it was masked.

    FSDP may have put a class of its own on top of the masked one; the result then has it too.
    """
    if cls.__bases__[0] in (MaskedLayer, MaskedParent, MaskedModel):
        return cls.__bases__[1]
    return _cached(_wrapper_of_original, cls)


def _wrapper_of_original(cls: type) -> type:
    bases = tuple(
        original_class(base) if issubclass(base, _Masked) else base for base in cls.__bases__
    )
    namespace = {
        name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")
    }
    is_layer = MaskedLayer in cls.__mro__
    return type(cls.__name__.replace("Masked", "", int(is_layer)), bases, namespace)


# Weak: a class that a function defines, and all that its methods hold, may go with its last module.
_classes: "weakref.WeakValueDictionary[tuple[Any, ...], type]" = weakref.WeakValueDictionary()


def _cached(make: Callable[..., type], *args: Any) -> type:
    """Return a class of these arguments: the same one, as long as anything has it."""
    key = make, *args
    made = _classes.get(key)
    if made is None:
        made = _classes[key] = make(*args)
    return made


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_in_onnx_export() -> bool:
    onnx = sys.modules.get("torch.onnx")  # torch imports it when it is used first
    return onnx is not None and onnx.is_in_onnx_export()


def _masked(layer: MaskedLayer, name: str, mask: WeightMask) -> Tensor:
    """Return the weight for a forward: softly masked in training, else with exact zeros."""
    weight = parameter_of(layer, name)
    softly = layer.training and not mask.follows
    if softly and not torch.compiler.is_compiling():
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
    return mask.soft(weight) if softly else mask.hard(weight)


class _Read(NamedTuple):
    """A masked weight that a forward has read as the weight of a layer."""

    layer: MaskedLayer
    name: str
    w_hat: Tensor
    contents: tuple[int, int] | None

    def check(self, reader: MaskedLayer | None) -> None:
        """Tell of a forward that has written into the masked weight.

        Args:
            reader: the layer whose forward it was. It has computed with what it wrote.

        Warns:
            UserWarning: the layer itself has written.

        Raises:
            RuntimeError: a module around the layer has, in vain.
        """
        if self.contents is None or _contents(self.w_hat) in (self.contents, None):
            return
        cls = original_class(type(self.layer))
        text = (
            f"writes into the {self.name} of a {cls.__name__} that PDPPruner masks, which does not "
            "reach the Parameter: change the Parameter after optimizer.step instead, or exclude "
            "the layer"
        )
        if self.layer is not reader:
            raise RuntimeError(f"the forward of a module {text}")
        warn_user(f"the layer's forward {text}")


class _Running(threading.local):
    """What the innermost forward of a masked layer or parent in this thread has read."""

    reads: list[_Read] | None = None


_running = _Running()


def _run(forward: Callable[..., Any], args: Any, kwargs: Any, layer: MaskedLayer | None) -> Any:
    """Return what a forward returns, which reads masked weights as those of their layers.

    Args:
        forward: the forward of a module.
        args: its arguments.
        kwargs: its arguments by name.
        layer: the module, if its own weights are masked.
    """
    # Dynamo knows no thread-local variables. Where it compiles, all code reads masked weights.
    is_eager = not torch.compiler.is_compiling()
    outer = _running.reads if is_eager else None
    reads: list[_Read] = []
    try:
        if layer is not None:
            for name in layer.pdp_masks:
                if layer.pdp_shown[name] is None:
                    layer.pdp_shown[name] = _read(layer, name, reads)
        if is_eager:
            _running.reads = reads
        result = forward(*args, **kwargs)
        if is_eager:
            for read in reads:
                read.check(layer)
        return result
    finally:
        if is_eager:
            _running.reads = outer
        for read in reads:
            read.layer.pdp_shown[read.name] = None


def _read(layer: MaskedLayer, name: str, reads: list[_Read]) -> Tensor:
    """Return a masked weight, and note that a forward has read it."""
    w_hat = _masked(layer, name, layer.pdp_masks[name])
    reads.append(_Read(layer, name, w_hat, _contents(w_hat)))
    return w_hat


def _contents(w_hat: Tensor) -> tuple[int, int] | None:
    """Return what changes when code writes into a tensor. None where nothing shows that."""
    if (
        torch.compiler.is_compiling()
        or type(w_hat) is not Tensor
        or w_hat.is_inference()
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    return w_hat._version, w_hat.data_ptr()


def _masked_class(cls: type, names: tuple[str, ...]) -> type:
    return _cached(_make_masked_class, cls, names)


def _make_masked_class(cls: type, names: tuple[str, ...]) -> type:
    # FSDP and Dynamo report the class by its name and module.
    namespace: dict[str, Any] = {"__module__": __name__}
    namespace.update({name: _shown_or_parameter(name) for name in names})
    return type(f"Masked{cls.__name__}", (MaskedLayer, cls), namespace)


def _parent_class(cls: type) -> type:
    return _cached(_make_parent_class, cls, MaskedParent)


def _model_class(cls: type) -> type:
    return _cached(_make_parent_class, cls, MaskedModel)


def _make_parent_class(cls: type, base: type) -> type:
    names = ("__module__", "__qualname__", "__doc__")
    namespace: dict[str, Any] = {name: getattr(cls, name) for name in names}
    if may_read_weights(cls):
        namespace["forward"] = _reading_forward(cls)
    if is_tuner_class(cls):
        namespace["merge"] = _refuse_merge
    return type(cls.__name__, (base, cls), namespace)


def _reading_forward(cls: Any) -> Callable[..., Any]:
    @functools.wraps(cls.forward)  # whose signature others inspect
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run(cls.forward, (self, *args), kwargs, None)

    return forward


def _refuse_merge(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "PEFT cannot merge adapters into weights that PDPPruner masks, as the masks would prune "
        "the sums: call finalize first. The merged weights are dense; a new pruner can prune them"
    )


def _shown_or_parameter(name: str) -> property:
    def get(layer: MaskedLayer) -> Tensor:
        w_hat = layer.pdp_shown[name]
        if w_hat is not None:
            return w_hat
        if torch.compiler.is_compiling() or (_running.reads is None and _runs_again()):
            return _masked(layer, name, layer.pdp_masks[name])
        if _running.reads is None:
            return parameter_of(layer, name)
        w_hat = _read(layer, name, _running.reads)
        # Not with gradients: a checkpointed layer must save the same when it runs again.
        if not torch.is_grad_enabled():
            layer.pdp_shown[name] = w_hat
        return w_hat

    def set(layer: MaskedLayer, value: object) -> None:
        raise not_a_parameter(layer, name)

    return property(get, set)


def _runs_again() -> bool:
    """Whether a backward pass runs code of a forward again, as activation checkpointing does.

    Hooks, and optimizers that step in a backward pass, run without gradients.
    """
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1


def _reduced(module: _Masked, reduced: Any, masked_class: Any, *names: tuple[str, ...]) -> Any:
    """Let a pickle name the class that a masked one was made from: that exists at run time only."""
    make, args, *rest = reduced
    if make is copyreg.__newobj__:  # type: ignore[attr-defined]  # not in typeshed
        cls, *others = args
        return _new, (masked_class, original_class(cls), names, *others), *rest
    if isinstance(make, type) and issubclass(make, _Masked):  # a call of the module's class
        masks = {name: value for name, value in vars(module).items() if name[:4] == "pdp_"}
        return _call, (masked_class, original_class(make), names, masks, *args), *rest
    return make, args, *rest


def _new(
    masked_class: Callable[..., type], cls: type, names: tuple[tuple[str, ...], ...], *args: Any
) -> Any:
    return cls.__new__(masked_class(cls, *names), *args)


def _call(
    masked_class: Callable[..., type],
    cls: type,
    names: tuple[tuple[str, ...], ...],
    masks: dict[str, Any],
    *args: Any,
) -> Any:
    module = cls(*args)
    module.__class__ = masked_class(cls, *names)
    vars(module).update(masks)
    return module
