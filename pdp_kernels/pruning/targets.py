"""Targets: the weights of a model that a configuration prunes, and how."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pdp_kernels.functional.validation import check_has_shape, check_weight
from pdp_kernels.pruning.adapters import (
    base_layer,
    find_adapted,
    merged_adapters,
    rewrites_base,
)
from pdp_kernels.pruning.config import LayerPlan, PDPConfig
from pdp_kernels.pruning.layers import WeightSlot, is_quantized, parameter_of, weight_slots
from pdp_kernels.pruning.masks import WeightMask


@dataclass
class Holder:
    """A layer that holds a weight.

    Attributes:
        layer_name: its name in the model.
        layer: the layer.
        slot: where the weight is in it.
        attention: the attention whose output projection the layer is, if it is one.
        tuners: the layers of PEFT that wrap this one.
        instead_of: for an adapter, the layer that it adapts (see `Adapted`).
        is_adapter: whether it is an adapter, or a layer that PEFT has put out of use.
    """

    layer_name: str
    layer: nn.Module
    slot: WeightSlot
    attention: nn.Module | None
    tuners: Sequence[nn.Module] = ()
    instead_of: "Holder | None" = None
    is_adapter: bool = False

    def has_its_name(self, model: nn.Module) -> bool:
        """Whether the model still has this layer under its name: no wrapper, no other layer."""
        module: nn.Module | None = model
        for name in self.layer_name.split(".") if self.layer_name else ():
            if module is None:  # asked in any other way, a module may call its __len__
                return False
            module = module._modules.get(name)
        return module is self.layer

    @property
    def weight_name(self) -> str:
        return f"{self.layer_name}.{self.slot.name}" if self.layer_name else self.slot.name

    @property
    def parameter(self) -> Tensor | None:
        """The weight as it is now, or None if the layer computes it from other parameters."""
        return dict(self.layer._parameters).get(self.slot.name)  # a ScriptModule's have no get

    def matches(self, entry: str | type) -> bool:
        """Whether an entry of a configuration matches this layer or its weight."""
        layers = [self.layer] if self.attention is None else [self.layer, self.attention]
        return _matches(entry, [self.layer_name, self.weight_name], layers)

    def is_meant_by(self, entry: str | type) -> bool:
        """Whether an entry of include means this layer: an adapter only if it means no other."""
        adapted = self.instead_of
        return self.matches(entry) and not (adapted is not None and adapted.matches(entry))


@dataclass
class Target:
    """A weight to prune.

    Attributes:
        holders: every layer that holds it.
        plan: how it is pruned.
    """

    holders: list[Holder]
    plan: LayerPlan

    @property
    def name(self) -> str:
        return self.holders[0].weight_name

    @property
    def weight(self) -> Tensor:
        """The Parameter as it is now; others may replace it at any time."""
        holder = self.holders[0]
        return parameter_of(holder.layer, holder.slot.name)

    @property
    def units(self) -> int:
        """The number of weights, or of channels, that the sparsity counts."""
        return self.plan.pattern.units(self.weight, self.holders[0].slot)

    def misfit(self) -> str | None:
        """Return why the weight cannot have the pattern of the plan, or None."""
        layers = [holder.layer for holder in self.holders]
        return self.plan.pattern.misfit(self.weight, self.holders[0].slot, layers)

    def new_mask(self) -> WeightMask:
        return self.plan.pattern.new_mask(self.holders[0].slot, self.plan.relative)


def _matches(entry: str | type, names: Sequence[str], modules: Sequence[nn.Module]) -> bool:
    """Whether an entry of a configuration matches one of the names, or the type of a module."""
    if isinstance(entry, type):
        return any(isinstance(module, entry) for module in modules)
    types = (cls.__name__ for module in modules for cls in type(module).__mro__)
    return (
        entry in names  # a name may have the special characters of a glob
        or any(fnmatchcase(name, entry) for name in names)
        or entry in types
    )


def find_targets(model: nn.Module, config: PDPConfig) -> list[Target]:
    """Return the weights to prune, each once, in the order of model.named_modules()."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    candidates = find_holders(model)
    targets = []
    wanted = [holders for holders in candidates if _is_wanted(holders, config)]
    _check_used(model, config, candidates, wanted)
    _check_not_quantized(wanted, config)
    _check_not_computed(wanted, config)
    for holders in wanted:
        _check_prunable(holders)
        target = Target(holders, _plan(holders, config))
        if target.weight.numel():
            targets.append(target)
    _check_patterns_fit(targets, config)
    if not targets:
        raise ValueError(
            "model must have a weight that the configuration prunes, got a "
            f"{type(model).__name__} without any"
        )
    return targets


def default_holders(model: nn.Module) -> list[list[Holder]]:
    """Return the holders of each weight that a pruner prunes by default."""
    return [holders for holders in find_holders(model) if _is_wanted(holders, PDPConfig(0.5))]


def layout(
    targets: Sequence[Target],
) -> dict[str, tuple[tuple[int, ...], torch.dtype, torch.device]]:
    """Return the shape, dtype and device of each weight, by name."""
    return {
        target.name: (tuple(target.weight.shape), target.weight.dtype, target.weight.device)
        for target in targets
    }


def _check_patterns_fit(targets: list[Target], config: PDPConfig) -> None:
    """Raise one ValueError for all weights that cannot have their patterns."""
    reasons = {target.name: reason for target in targets if (reason := target.misfit())}
    if reasons:
        texts = "; ".join(f"model's {name} {reason}" for name, reason in reasons.items())
        left_out = [*config.exclude, *reasons]
        raise ValueError(f"{texts}: exclude={left_out!r} leaves out what does not fit")


def _check_not_quantized(wanted: list[list[Holder]], config: PDPConfig) -> None:
    """Raise one TypeError for all weights that a library has quantized."""
    found = {}
    for holders in wanted:
        weight = holders[0].parameter
        if weight is not None and is_quantized(weight):
            found[holders[0].weight_name] = weight
    if found:
        name, weight = next(iter(found.items()))
        left_out = [*config.exclude, *found]
        raise TypeError(
            f"model's {name} must be an ordinary tensor, got {type(weight).__name__}: prune first "
            f"and quantize the pruned model; exclude={left_out!r} leaves out what is quantized"
        )


def _check_not_computed(wanted: list[list[Holder]], config: PDPConfig) -> None:
    """Raise one ValueError for all weights that are no parameters of their layers."""
    found = [holders[0].weight_name for holders in wanted if holders[0].parameter is None]
    if found:
        left_out = [*config.exclude, *found]
        raise ValueError(
            f"model must hold {', '.join(found)} as parameters, got what layers compute from "
            "others: remove the parametrizations first, or take fully_shard in place of "
            f"FullyShardedDataParallel; exclude={left_out!r} leaves out what is computed"
        )


def find_holders(model: nn.Module) -> list[list[Holder]]:
    """Return the holders of each weight that a configuration may select."""
    attentions = {
        id(base_layer(layer.out_proj)): layer
        for layer in model.modules()
        if isinstance(layer, nn.MultiheadAttention)
    }
    adapted = find_adapted(model)
    names = {id(layer): name for name, layer in model.named_modules()}
    by_weight: dict[object, list[Holder]] = {}
    for name, layer in model.named_modules():
        slots = weight_slots(layer) or [
            WeightSlot(weight_name, outputs=0, inputs=1)
            for weight_name, weight in layer._parameters.items()
            if weight is not None and _dimensions(weight) >= 2
        ]
        for slot in slots:
            holder = Holder(name, layer, slot, attentions.get(id(layer)))
            weight = holder.parameter
            # A parametrized weight has no Parameter: an error, but only if it is to be pruned.
            key = id(weight) if weight is not None else (id(layer), slot.name)
            holder.tuners = adapted.tuners.get(id(layer), ())
            holder.is_adapter = id(layer) in adapted.instead_of
            other = adapted.instead_of.get(id(layer))
            if other is not None:
                holder.instead_of = Holder(names[id(other)], other, slot, None)
            by_weight.setdefault(key, []).append(holder)
    return list(by_weight.values())


def _dimensions(weight: Tensor) -> int:
    return 2 if is_lazy(weight) else weight.dim()


def _is_wanted(holders: list[Holder], config: PDPConfig) -> bool:
    """Whether the configuration prunes the weight that these layers share."""
    override = _first_match(config.overrides, holders)
    wanted = [holder for holder in holders if _is_included(holder, config)]
    if not wanted or (override is not None and config.overrides[override] is None):
        return False
    if len(wanted) == len(holders):
        return True
    if config.include is None:
        return False  # an embedding shares it, for example
    names = [holder.weight_name for holder in holders]
    raise ValueError(f"include must match all layers that share {names}, or none of them")


def _is_included(holder: Holder, config: PDPConfig) -> bool:
    if any(holder.matches(entry) for entry in config.exclude):
        return False
    if config.include is None:
        return bool(weight_slots(holder.layer)) and not holder.is_adapter
    return any(holder.is_meant_by(entry) for entry in config.include)


def _first_match(entries: Mapping[str, Any], holders: list[Holder]) -> str | None:
    matching = (entry for entry in entries if any(holder.matches(entry) for holder in holders))
    return next(matching, None)


def _plan(holders: list[Holder], config: PDPConfig) -> LayerPlan:
    """Return how the weight is pruned, with the layer's own fraction if there are such."""
    override = _first_match(config.overrides, holders)
    changes = None if override is None else config.overrides[override]
    if not isinstance(config.sparsity, Mapping):
        return config.plan(changes)
    entry = _first_match(config.sparsity, holders)
    plan = config.plan(changes, None if entry is None else config.sparsity[entry])
    if plan.sparsity is None:
        raise ValueError(
            f"sparsity must have a fraction for {holders[0].weight_name} (or exclude it), "
            f"got fractions for {list(config.sparsity)}"
        )
    return plan


def _check_used(
    model: nn.Module, config: PDPConfig, candidates: list[list[Holder]], wanted: list[list[Holder]]
) -> None:
    """Reject entries that match no layer, except a type that is excluded as a precaution.

    A type of modules around layers that would be pruned is no such precaution.
    """
    for field, entry in _entries(config):
        if any(holder.matches(entry) for holders in candidates for holder in holders):
            continue
        is_precaution = field == "exclude" and isinstance(entry, type)
        globs = _globs_inside(model, entry, wanted if is_precaution else candidates)
        if globs or not is_precaution:
            hint = f": {globs!r} match those inside others" if globs else ""
            raise ValueError(
                f"{field} must match layers of the model, got {entry!r} without any{hint}"
            )


def _globs_inside(model: nn.Module, entry: str | type, candidates: list[list[Holder]]) -> list[str]:
    """Return a glob for the layers in each module that an entry matches, if it has candidates."""
    names = [holder.layer_name for holders in candidates for holder in holders]
    prefixes = (
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if _matches(entry, [name], [module])
    )
    return [f"{prefix}*" for prefix in prefixes if any(name.startswith(prefix) for name in names)]


def _entries(config: PDPConfig) -> Iterator[tuple[str, str | type]]:
    fractions = config.sparsity if isinstance(config.sparsity, Mapping) else ()
    fields = ("include", config.include or ()), ("exclude", config.exclude)
    for field, entries in (*fields, ("overrides", config.overrides), ("sparsity", fractions)):
        for entry in entries:
            yield field, entry


def _check_prunable(holders: list[Holder]) -> None:
    for holder in holders:
        layer, name = holder.layer, holder.weight_name
        if isinstance(layer, nn.RNNBase):
            raise ValueError(
                f"model's {name} cannot be pruned: a {type(layer).__name__} keeps its weights in a "
                "list of its own; exclude it"
            )
        if isinstance(layer, torch.jit.ScriptModule):
            raise ValueError(
                f"model's {name} cannot be pruned: masks would not reach the compiled forward of a "
                "torch.jit.ScriptModule; prune before you script, or exclude it"
            )
        weight = parameter_of(layer, holder.slot.name)
        check_has_shape(f"model's {name}", weight)
        for tuner in holder.tuners:
            _check_tuner(name, tuner)
        if "forward" in vars(layer):
            raise ValueError(
                f"model's layer {holder.layer_name!r} must have the forward of its class, got one "
                "set on the instance, which masks would not reach; exclude it"
            )
        check_weight(f"model's {name}", weight)
        if weight.dim() < 2:
            raise ValueError(
                f"model's {name} must have two dimensions or more, got shape "
                f"{tuple(weight.shape)}: FullyShardedDataParallel flattens weights, fully_shard "
                "does not"
            )


def _check_tuner(name: str, tuner: nn.Module) -> None:
    if merged_adapters(tuner):
        raise ValueError(
            f"model's {name} must not have merged adapters, got {merged_adapters(tuner)}: call "
            "unmerge_adapter(), or prune the model that merge_and_unload() returns"
        )
    if rewrites_base(tuner):
        raise ValueError(
            f"model's {name} cannot be pruned: this layer of PEFT (lora.{type(tuner).__name__}) "
            "writes into it in each forward; exclude it"
        )
