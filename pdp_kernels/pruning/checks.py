"""Checks of a pruner: whether its model, state and schedule fit what it is used for."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pdp_kernels.distributed.shards import local_shard
from pdp_kernels.functional.validation import check_non_negative
from pdp_kernels.pruning.config import SCHEDULE_FIELDS, PDPConfig
from pdp_kernels.pruning.layers import is_quantized, parameter_of, quantized
from pdp_kernels.pruning.masked_layer import mask_parents
from pdp_kernels.pruning.masks import WeightMask
from pdp_kernels.pruning.optimizers import parameter_ids
from pdp_kernels.pruning.plain_data import from_leaves
from pdp_kernels.pruning.targets import Target, find_holders
from pdp_kernels.pruning.user_warnings import warn_user

_shape = attrgetter("shape")


class Snapshot:
    """The structure of a model that a pruner relies on.

    Every step compares the model with it. Only if they differ must `check_layers`, `check_masks`
    and `check_ties` look for the reason, which takes several times as long.

    Args:
        model: the model.
        targets: its weights to prune. Each layer has its name.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target]) -> None:
        holders = [holder for target in targets for holder in target.holders]
        firsts = [target.holders[0] for target in targets]
        self._slots = [(holder.layer, holder.slot.name) for holder in firsts]
        self._tied = [target for target in targets if len(target.holders) > 1]
        weights = self._weights()
        self._ids = list(map(id, weights))
        own = {(id(holder.layer), holder.slot.name) for holder in holders}
        self._others = [
            holder
            for others in find_holders(model)
            for holder in others
            if (id(holder.layer), holder.slot.name) not in own
        ]
        self._other_ids = self._ids_of_others()
        self._types: list[type] = list(map(type, weights))
        self._shapes: list[torch.Size] = list(map(_shape, weights))
        self._layers = [holder.layer for holder in holders]
        self._masks = [dict(masks) for masks in self._layer_masks()]
        links: dict[tuple[nn.Module, str], nn.Module] = {}
        for holder in holders:
            module = model
            for name in holder.layer_name.split(".") if holder.layer_name else ():
                child = module.get_submodule(name)
                links[module, name] = child
                module = child
        self._links = list(links)
        self._children = list(links.values())

    def matches(self) -> bool:
        """Whether layers and weights, their types, shapes and masks are as they were."""
        weights = self._weights()
        return (
            list(map(id, weights)) == self._ids
            and self._ids_of_others() == self._other_ids
            and list(map(type, weights)) == self._types
            and list(map(_shape, weights)) == self._shapes
            and self._layer_masks() == self._masks
            and all(map(is_, self._linked(), self._children))
            and all(map(_is_tied, self._tied))
        )

    def _weights(self) -> list[Any]:
        return [layer._parameters.get(name) for layer, name in self._slots]

    def _ids_of_others(self) -> list[int]:
        return [id(holder.parameter) for holder in self._others]

    def _layer_masks(self) -> list[Any]:
        return [vars(layer).get("pdp_masks") for layer in self._layers]

    def _linked(self) -> list[nn.Module | None]:
        return [module._modules.get(name) for module, name in self._links]


def _is_tied(target: Target) -> bool:
    """Whether all layers that shared the weight still do."""
    weight = target.weight
    others = (parameter_of(each.layer, each.slot.name) for each in target.holders[1:])
    return all(other is weight or _shares_memory(other, weight) for other in others)


def _shares_memory(other: Tensor, weight: Tensor) -> bool:
    """Whether two tensors are one in memory, as after load_state_dict(assign=True).

    A pruner sets zeros in place, so that both have them.
    """
    if other.is_meta or weight.is_meta:
        return other.is_meta and weight.is_meta
    return local_shard(other).data_ptr() == local_shard(weight).data_ptr()


def check_layers(model: nn.Module, targets: Sequence[Target]) -> bool:
    """Raise a RuntimeError if a layer has been replaced. A wrapper around it does no harm.

    Masks the wrapper if it reads the weight itself, as PEFT's may.

    Returns:
        Whether a layer has a wrapper.
    """
    holders = (holder for target in targets for holder in target.holders)
    moved = [holder for holder in holders if not holder.has_its_name(model)]
    layers = set(map(id, model.modules())) if moved else set()
    for holder in moved:
        if id(holder.layer) not in layers:
            raise RuntimeError(
                f"the model no longer has the layer whose {holder.weight_name} is masked: make a "
                "new pruner after replacing a layer"
            )
    if moved:
        mask_parents(model)
    return bool(moved)


def check_masks(
    targets: Sequence[Target], masks: Sequence[WeightMask], shapes: Sequence[torch.Size]
) -> None:
    """Raise a RuntimeError if weights no longer have their masks or shapes."""
    for target, mask, shape in zip(targets, masks, shapes, strict=True):
        if is_quantized(target.weight):
            raise quantized(target.name, target.weight)
        if target.weight.shape != shape:
            raise RuntimeError(
                f"{target.name} had shape {tuple(shape)} and now has "
                f"{tuple(target.weight.shape)}: make a new pruner after replacing a weight by one "
                "of another shape. FullyShardedDataParallel flattens weights too: use fully_shard"
            )
        for holder in target.holders:
            held = vars(holder.layer).get("pdp_masks", {})
            if held.get(holder.slot.name) is not mask:
                raise RuntimeError(
                    f"{target.name} no longer has the masks of this pruner: another pruner, or "
                    "finalize, has taken the model over"
                )


def check_ties(model: nn.Module, targets: Sequence[Target]) -> None:
    """Raise a RuntimeError if layers share other weights than they did without their masks."""
    for target in targets:
        if not _is_tied(target):
            names = ", ".join(holder.weight_name for holder in target.holders)
            raise RuntimeError(
                f"{names} were one weight and no longer are: tie them again, or make a new pruner"
            )
    numbers = {id(target.weight): len(target.holders) for target in targets}
    for holders in find_holders(model):
        if len(holders) > numbers.get(id(holders[0].parameter), len(holders)):
            names = ", ".join(holder.weight_name for holder in holders)
            raise RuntimeError(
                f"{names} are one weight now and were not when it was masked: tie weights first, "
                "and make a new pruner"
            )


def check_state(state: Mapping[str, Any], own: Mapping[str, Any], free: Sequence[str] = ()) -> None:
    """Raise an error if a state is not of a pruner with this configuration and model.

    Args:
        state: the state to check.
        own: the pruner's state.
        free: the fields of the configuration that may differ.
    """
    if state.keys() != own.keys():
        raise ValueError(f"state_dict must have keys {list(own)}, got {list(state)}")
    if not isinstance(state["config"], Mapping):
        raise TypeError(
            f"state_dict['config'] must be a mapping, got {type(state['config']).__name__}"
        )
    # A field that is younger than the state has its default there.
    found = {field.name: field.default for field in fields(PDPConfig)}
    found.update(from_leaves(state["config"]))
    for name, value in from_leaves(own["config"]).items():
        if name not in free and found[name] != value:
            hint = ": new_schedule=True goes on with this pruner's schedule"
            raise ValueError(
                f"state_dict must be of a configuration with {name} = {value!r}, "
                f"got {found[name]!r}{hint if name in SCHEDULE_FIELDS else ''}"
            )
    if state["weights"] != own["weights"]:
        raise ValueError(
            f"state_dict must have the weights {own['weights']}, got {state['weights']}"
        )
    thresholds = state["thresholds"]
    names = list(thresholds) if isinstance(thresholds, Mapping) else thresholds
    if not isinstance(thresholds, Mapping) or thresholds.keys() != own["thresholds"].keys():
        raise ValueError(
            f"state_dict must have thresholds of {list(own['thresholds'])}, got {names}"
        )


def check_state_values(state: Mapping[str, Any], targets: Sequence[Target], missing: int) -> None:
    """Raise an error if a state of this model has a value that no pruner has.

    Args:
        state: the state, which `check_state` has accepted.
        targets: the weights to prune.
        missing: the prune count of weights that have none yet.
    """
    check_non_negative("state_dict['progress']", state["progress"])
    counts = state["prune_counts"]
    name = "state_dict['prune_counts']"
    if not isinstance(counts, Tensor) or counts.is_floating_point():
        raise TypeError(f"{name} must be an integer tensor, got {_described(counts)}")
    sizes = [target.units for target in targets]
    given = counts.flatten().tolist()
    are_counts = len(given) == len(sizes) and all(
        0 <= count <= size for count, size in zip(given, sizes, strict=True)
    )
    if counts.dim() != 1 or (not are_counts and given != [missing] * len(sizes)):
        raise ValueError(
            f"{name} must have {len(sizes)} counts, at most {sizes}, got {counts.tolist()}"
        )
    for of_weight, threshold in state["thresholds"].items():
        name = f"state_dict['thresholds'][{of_weight!r}]"
        if not isinstance(threshold, Tensor) or not threshold.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {_described(threshold)}")
        if threshold.shape != ():  # NaN among weights that are NaN
            raise ValueError(f"{name} must be a 0-d tensor, got {threshold}")


def _described(value: object) -> str:
    return f"one of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def check_length(config: PDPConfig, epochs: float) -> None:
    """Warn if a training of this many epochs ends before the ramp does."""
    reached = config.ramp_at(epochs)
    if reached < 1:
        warn_user(
            f"a training of {epochs:g} epochs ends before the ramp does, at {config.ramp_end:g}, "
            f"with {reached:.0%} of the sparsity: PDPConfig.for_epochs fits a "
            "schedule to a training"
        )


def check_end(config: PDPConfig, progress: float, masks: Sequence[WeightMask]) -> None:
    """Warn if a pruner is finalized that has not pruned these weights gradually to the end."""
    reached = config.ramp_at(progress)
    if reached < 1:
        warn_user(
            f"finalize was called at progress {progress:g} with {reached:.0%} of the sparsity "
            "reached: the rest is pruned at once"
        )
    elif any(mask.weight_loaded for mask in masks):
        warn_user(
            "finalize prunes weights that were loaded after the last step. If they are from before "
            f"progress {config.ramp_end:g}, where the ramp ends, they have not learned to do "
            "without the others: choose the best checkpoint after the ramp, and load the pruner's "
            "state_dict with its weights"
        )


def check_detached(hook: RemovableHandle | None) -> None:
    """Raise a RuntimeError if an optimizer still has the hook that steps the pruner."""
    hooks = None if hook is None else hook.hooks_dict_ref()
    if hook is not None and hooks is not None and hook.id in hooks:
        raise RuntimeError(
            "the pruner is attached already, and would take two steps at once: call remove() of "
            "the handle that attach returned"
        )


def check_optimizer(optimizer: Optimizer, model: nn.Module, targets: Sequence[Target]) -> None:
    """Raise a ValueError if the optimizer trains no weight to prune, though some are trained.

    Where all of them are frozen, as below PEFT's adapters, it must train others of the model.
    """
    trained = [target.weight for target in targets if target.weight.requires_grad]
    expected = set(map(id, trained or model.parameters()))
    if not parameter_ids(optimizer) & expected:
        what = f"that the pruner prunes, such as {targets[0].name}" if trained else "of the model"
        raise ValueError(
            f"optimizer must have a weight {what}, got a {type(optimizer).__name__} without any"
        )
