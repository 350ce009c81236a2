"""Layers that compute with a masked weight: a class of their own, the Parameter where it was.

The masked weight is visible as the layer's weight inside its forward alone. Everybody else, be it
optimizer, state_dict, DDP's buckets or FSDP's shards, sees the Parameter under its own name.
"""

import copyreg
import functools
from typing import Any

import torch
from torch import Tensor, nn

from pdp_kernels.distributed.order_statistics import hard_mask_of_shard
from pdp_kernels.distributed.shards import (
    global_indices,
    is_distributed,
    is_sharded,
    local_shard,
    map_shards,
)
from pdp_kernels.distributed.sums import channel_norms, shard_by_channels
from pdp_kernels.functional.soft_mask import autocast_dtype
from pdp_kernels.functional.validation import check_divisible
from pdp_kernels.ops.autograd import MaskedChannels, MaskedWeight
from pdp_kernels.ops.reference import threshold_dtype
from pdp_kernels.pruning.config import LayerPlan
from pdp_kernels.pruning.layers import layers_read


class WeightMask:
    """How one weight is masked: the constants of its soft mask, and how much a hard one prunes.

    All are tensors that the pruner writes to in place, so that a compiled or captured training step
    follows the schedule.
    """

    def __init__(self, relative: bool):
        self.relative = relative
        self.tau: Tensor | None = None  # ()
        self.threshold: Tensor | None = None  # ()
        self.prune_count: Tensor | None = None  # (1,), int64

    def selected_from(self, weight: Tensor) -> Tensor:
        """The magnitudes among which the threshold lies."""
        return weight

    def soft(self, weight: Tensor) -> Tensor:
        """w_hat, differentiable."""
        out_dtype = autocast_dtype(weight)
        return map_shards(
            lambda part: MaskedWeight.apply(
                part, self.threshold, self.tau, None, self.relative, out_dtype, False
            )[0],
            weight,
        )

    def values(self, weight: Tensor) -> Tensor:
        """The values of the soft mask on this rank, one for each that is selected from."""
        return torch.ops.pdp.soft_mask(
            local_shard(weight), self.threshold, self.tau, self.relative, self.tau.dtype, True
        )[1]

    def kept(self, weight: Tensor) -> Tensor:
        """The exact hard mask, which broadcasts with this rank's part of the weight."""
        return hard_mask_of_shard(weight, self.prune_count)

    def to(self, weight: Tensor) -> None:
        """Follows a weight to its device and dtype."""
        dtype = threshold_dtype([weight])
        self.tau = self.tau.to(weight.device, dtype)
        self.threshold = self.threshold.to(weight.device, dtype)
        self.prune_count = self.prune_count.to(weight.device)


class ChannelWeightMask(WeightMask):
    def __init__(self, relative: bool, dim: int, rms: bool):
        super().__init__(relative)
        self.dim = dim
        self.rms = rms

    def selected_from(self, weight: Tensor) -> Tensor:
        return channel_norms([weight.detach()], [self.dim], self.rms)[0]

    def soft(self, weight: Tensor) -> Tensor:
        out_dtype = autocast_dtype(weight)
        whole = shard_by_channels(weight, self.dim)
        w_hat = map_shards(lambda part: self._soft_part(part, out_dtype), whole)
        return w_hat if whole is weight else w_hat.redistribute(placements=weight.placements)

    def _soft_part(self, part: Tensor, out_dtype: torch.dtype | None) -> Tensor:
        norms = torch.ops.pdp.channel_norms(part.detach(), self.dim, self.rms)
        return MaskedChannels.apply(
            part, norms, self.threshold, self.tau, self.dim, self.relative, self.rms, out_dtype
        )[0]

    def values(self, weight: Tensor) -> Tensor:
        norms = self._of_part(weight, self.selected_from(weight))
        return torch.ops.pdp.soft_mask(
            norms, self.threshold, self.tau, self.relative, norms.dtype, True
        )[1]

    def kept(self, weight: Tensor) -> Tensor:
        kept = torch.ops.pdp.hard_mask(self.selected_from(weight), self.prune_count)
        kept = self._of_part(weight, kept)
        return kept.view([-1 if dim == self.dim else 1 for dim in range(weight.dim())])

    def _of_part(self, weight: Tensor, of_channels: Tensor) -> Tensor:
        """Of values for all channels those for this rank's part of the weight."""
        return of_channels[global_indices(weight, self.dim)] if is_sharded(weight) else of_channels


class GroupWeightMask(WeightMask):
    """N:M; `pruned` of each group are pruned by now. Its thresholds are found inside the mask.

    `pruned` is a number, not a tensor: a captured graph keeps the one it was captured with, and a
    compiled step compiles once for each.
    """

    def __init__(self, relative: bool, m: int, dim: int):
        super().__init__(relative)
        self.m = m
        self.dim = dim
        self.pruned = 0

    def soft(self, weight: Tensor) -> Tensor:
        self._check_groups(weight)
        group = (self.m, self.pruned, self.dim)
        out_dtype = autocast_dtype(weight)
        return map_shards(
            lambda part: MaskedWeight.apply(
                part, None, self.tau, group, self.relative, out_dtype, False
            )[0],
            weight,
        )

    def values(self, weight: Tensor) -> Tensor:
        self._check_groups(weight)
        group = (self.m, self.pruned, self.dim)
        return torch.ops.pdp.soft_mask_nm(
            local_shard(weight), self.tau, *group, self.relative, self.tau.dtype, True
        )[1]

    def kept(self, weight: Tensor) -> Tensor:
        self._check_groups(weight)
        return torch.ops.pdp.hard_mask_nm(local_shard(weight), self.m, self.pruned, self.dim)

    def _check_groups(self, weight: Tensor) -> None:
        # A weight that is sharded after the pruner has checked it.
        if is_distributed(weight):
            check_divisible("a masked layer's weight", weight, self.m, self.dim)

    def to(self, weight: Tensor) -> None:
        self.tau = self.tau.to(weight.device, threshold_dtype([weight]))


class MaskedLayer(nn.Module):
    """What the class of a masked layer is mixed with; made by `mask_model`.

    pdp_masks: by name, the masks of the layer's own weights.
    pdp_shown: by name, the masked weight while a forward runs that reads it, else None.
    """

    pdp_masks: dict[str, WeightMask]
    pdp_shown: dict[str, Tensor | None]

    def forward(self, *args, **kwargs):
        shown = []
        try:
            for layer in (self, *layers_read(self, self.training)):
                for name, mask in getattr(layer, "pdp_masks", {}).items():
                    if layer.pdp_shown[name] is None:
                        layer.pdp_shown[name] = _masked(layer, name, mask)
                        shown.append((layer, name))
            return super().forward(*args, **kwargs)
        finally:
            for layer, name in shown:
                layer.pdp_shown[name] = None

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name, mask in self.pdp_masks.items():
            mask.to(self._parameters[name])
        return self

    def __reduce_ex__(self, protocol):
        # The class is made here at run time, so a pickle names the class it was made from.
        make, args, *rest = super().__reduce_ex__(protocol)
        if make is not copyreg.__newobj__:
            return make, args, *rest
        cls, *others = args
        return _new, (original_class(cls), tuple(self.pdp_masks), *others), *rest


def new_mask(plan: LayerPlan, dim: int, rms: bool) -> WeightMask:
    """The mask of one weight; dim and rms are those of channels, or dim that of groups."""
    if plan.pattern.kind == "channel":
        return ChannelWeightMask(plan.relative, dim, rms)
    if plan.pattern.kind == "nm":
        return GroupWeightMask(plan.relative, plan.pattern.m, dim)
    return WeightMask(plan.relative)


def mask_model(model: nn.Module, masks: dict[nn.Module, dict[str, WeightMask]]) -> None:
    """Makes layers compute with masks of their weights, and those that read these for them too."""
    for layer, own in masks.items():
        _mask_layer(layer, own)
    for layer in model.modules():
        parts = layers_read(layer, training=False)
        if layer not in masks and any(isinstance(part, MaskedLayer) for part in parts):
            _mask_layer(layer, {})


def unmask_model(model: nn.Module) -> None:
    """Makes the layers of a model what they were before `mask_model`."""
    for layer in model.modules():
        if isinstance(layer, MaskedLayer):
            layer.__class__ = original_class(type(layer))
            del layer.pdp_masks, layer.pdp_shown


def _mask_layer(layer: nn.Module, masks: dict[str, WeightMask]) -> None:
    layer.pdp_masks = masks
    layer.pdp_shown = dict.fromkeys(masks)
    layer.__class__ = _masked_class(type(layer), tuple(masks))


@functools.cache
def original_class(cls: type) -> type:
    """The class that a masked layer had, or would have: FSDP puts one of its own on top."""
    if cls.__bases__[0] is MaskedLayer:
        return cls.__bases__[1]
    bases = tuple(
        original_class(base) if issubclass(base, MaskedLayer) else base for base in cls.__bases__
    )
    namespace = {
        name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")
    }
    return type(cls.__name__.replace("Masked", "", 1), bases, namespace)


def _masked(layer: MaskedLayer, name: str, mask: WeightMask) -> Tensor:
    """The weight that a forward computes with: softly masked in training, else exactly."""
    weight = layer._parameters[name]
    if layer.training:
        return mask.soft(weight)
    kept = mask.kept(weight)
    return map_shards(lambda part: torch.where(kept, part, 0), weight)


@functools.cache
def _masked_class(cls: type, names: tuple[str, ...]) -> type:
    properties: dict[str, Any] = {name: _shown_or_parameter(name) for name in names}
    # FSDP and Dynamo report the class by its name and module.
    return type(f"Masked{cls.__name__}", (MaskedLayer, cls), {"__module__": __name__} | properties)


def _shown_or_parameter(name: str) -> property:
    def get(self):
        shown = self.pdp_shown[name]
        return self._parameters[name] if shown is None else shown

    return property(get)


def _new(cls: type, names: tuple[str, ...], *args) -> MaskedLayer:
    masked = _masked_class(cls, names)
    return masked.__new__(masked, *args)
