"""Which weights of a model a configuration prunes, and what is done to each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from pdp_kernels.functional.validation import check_weight
from pdp_kernels.pruning.config import LayerPlan, PDPConfig
from pdp_kernels.pruning.layers import WeightSlot, weight_slots


@dataclass
class Holder:
    """A layer that holds a weight."""

    layer_name: str
    layer: nn.Module
    slot: WeightSlot
    attention: nn.Module | None  # whose output projection the layer is

    @property
    def weight_name(self) -> str:
        return f"{self.layer_name}.{self.slot.name}" if self.layer_name else self.slot.name

    def matches(self, entry: str | type) -> bool:
        """Whether an entry of a configuration means this layer or its weight."""
        layers = [self.layer] if self.attention is None else [self.layer, self.attention]
        if isinstance(entry, type):
            return any(isinstance(layer, entry) for layer in layers)
        names = (self.layer_name, self.weight_name)
        types = (cls.__name__ for layer in layers for cls in type(layer).__mro__)
        return any(fnmatchcase(name, entry) for name in names) or entry in types


@dataclass
class Target:
    """A weight to prune, with every layer that holds it, and what is to be done to it."""

    holders: list[Holder]
    plan: LayerPlan

    @property
    def name(self) -> str:
        return self.holders[0].weight_name

    @property
    def weight(self) -> Tensor:
        """The Parameter as it is now; it may be replaced at any time."""
        holder = self.holders[0]
        return holder.layer._parameters[holder.slot.name]

    def units(self, config: PDPConfig) -> int:
        """Of how many weights, or channels, some are pruned."""
        if self.plan.pattern.kind == "channel":
            return self.weight.shape[self.dim(config)]
        return self.weight.numel()

    def dim(self, config: PDPConfig) -> int:
        """The dimension along which channels lie, or groups are formed."""
        slot = self.holders[0].slot
        outputs = self.plan.pattern.kind == "channel" and config.channel_dim == "output"
        return slot.outputs if outputs else slot.inputs


def find_targets(model: nn.Module, config: PDPConfig) -> list[Target]:
    """The weights to prune, each once, in the order of model.named_modules()."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    groups = _by_weight(model)
    _check_used(config, [holder for holders in groups for holder in holders])
    selected = []
    for holders in groups:
        wanted = [holder for holder in holders if _is_wanted(holder, config)]
        override = _first_match(config.overrides, holders)
        left_alone = override in config.overrides and config.overrides[override] is None
        if not wanted or left_alone:
            continue
        if len(wanted) < len(holders):
            if config.include is None:
                continue  # an embedding shares it, say
            names = [holder.weight_name for holder in holders]
            raise ValueError(f"include must match all layers that share {names}, or none of them")
        _check_prunable(holders)
        plan = config.plan(config.overrides.get(override))
        entry = Target(holders, _with_own_share(plan, holders))
        if entry.weight.numel():
            _check_pattern_fits(entry, config)
            selected.append(entry)
    if not selected:
        raise ValueError(
            "model must have a weight that the configuration prunes, got a "
            f"{type(model).__name__} without any"
        )
    return selected


def _by_weight(model: nn.Module) -> list[list[Holder]]:
    """All weights of the model that could be pruned, as the layers that hold them."""
    attentions = {
        id(layer.out_proj): layer
        for layer in model.modules()
        if isinstance(layer, nn.MultiheadAttention)
    }
    groups: dict[object, list[Holder]] = {}
    for name, layer in model.named_modules():
        usual = weight_slots(layer)
        others = [
            WeightSlot(weight_name, 0, 1)
            for weight_name, weight in layer._parameters.items()
            if weight is not None and not usual and _dimensions(weight) >= 2
        ]
        for slot in usual or others:
            weight = layer._parameters.get(slot.name)
            # A weight that is computed from others has no Parameter: it is an error if selected.
            key = id(weight) if weight is not None else (id(layer), slot.name)
            groups.setdefault(key, []).append(Holder(name, layer, slot, attentions.get(id(layer))))
    return list(groups.values())


def _dimensions(weight: Tensor) -> int:
    return 2 if isinstance(weight, UninitializedTensorMixin) else weight.dim()


def _is_wanted(holder: Holder, config: PDPConfig) -> bool:
    if any(holder.matches(entry) for entry in config.exclude):
        return False
    if config.include is None:
        return bool(weight_slots(holder.layer))
    return any(holder.matches(entry) for entry in config.include)


def _first_match(entries: Mapping, holders: list[Holder]) -> str | None:
    matching = (entry for entry in entries if any(holder.matches(entry) for holder in holders))
    return next(matching, None)


def _with_own_share(plan: LayerPlan, holders: list[Holder]) -> LayerPlan:
    """The plan, with this layer's share of a configuration that gives shares by layer."""
    if not isinstance(plan.sparsity, Mapping):
        return plan
    entry = _first_match(plan.sparsity, holders)
    if entry is None:
        raise ValueError(
            f"sparsity must have a share for {holders[0].weight_name} (or exclude it), "
            f"got shares for {list(plan.sparsity)}"
        )
    return plan._replace(sparsity=plan.sparsity[entry])


def _check_used(config: PDPConfig, holders: list[Holder]) -> None:
    """A glob that matches nothing is a slip of the pen. A type may be excluded for good measure."""
    for field, entry in _entries(config):
        if not any(holder.matches(entry) for holder in holders):
            if field == "exclude" and isinstance(entry, type):
                continue
            raise ValueError(f"{field} must match layers of the model, got {entry!r} without any")


def _entries(config: PDPConfig) -> Iterator[tuple[str, str | type]]:
    shares = config.sparsity if isinstance(config.sparsity, Mapping) else ()
    fields = ("include", config.include or ()), ("exclude", config.exclude)
    for field, entries in (*fields, ("overrides", config.overrides), ("sparsity", shares)):
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
        weight = layer._parameters.get(holder.slot.name)
        if weight is None:
            raise ValueError(
                f"model must hold {name} as a parameter, got one that is computed from others: "
                "remove the parametrization first, or exclude it"
            )
        if isinstance(weight, UninitializedTensorMixin):
            raise ValueError(f"model's {name} must have its shape: run the lazy layer once first")
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


def _check_pattern_fits(entry: Target, config: PDPConfig) -> None:
    kind, dim = entry.plan.pattern.kind, entry.dim(config)
    if kind == "nm" and entry.weight.shape[dim] % entry.plan.pattern.m:
        raise ValueError(
            f"model's {entry.name} must have a number of inputs that is divisible by M = "
            f"{entry.plan.pattern.m}, got shape {tuple(entry.weight.shape)}; exclude it"
        )
    if kind == "channel" and dim == 1:
        for holder in entry.holders:
            if getattr(holder.layer, "groups", 1) > 1:
                raise ValueError(
                    f"model's {entry.name} must not be that of a grouped convolution, whose "
                    f"{config.channel_dim} channels are not along one dimension; exclude it"
                )
