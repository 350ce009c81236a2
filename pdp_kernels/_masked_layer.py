"""Layers that compute with a masked weight: a class of their own, the Parameter where it was.

The masked weight is visible as the layer's weight inside its forward alone. Everybody else, be it
optimizer, state_dict, DDP's buckets or FSDP's shards, sees the Parameter under its own name.
"""

import copyreg
import functools
from typing import Any

import torch
from torch import Tensor, nn

from pdp_kernels._autograd import MaskedChannels, MaskedWeight
from pdp_kernels._layers import parts_read
from pdp_kernels.config import LayerPlan
from pdp_kernels.reference import threshold_dtype
from pdp_kernels.soft_mask import autocast_dtype


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
        return MaskedWeight.apply(
            weight, self.threshold, self.tau, None, self.relative, autocast_dtype(weight), False
        )[0]

    def values(self, weight: Tensor) -> Tensor:
        """The values of the soft mask, one for each that is selected from."""
        return torch.ops.pdp.soft_mask(
            weight.detach(), self.threshold, self.tau, self.relative, self.tau.dtype, True
        )[1]

    def kept(self, weight: Tensor) -> Tensor:
        """The exact hard mask, which broadcasts with the weight."""
        return torch.ops.pdp.hard_mask(weight.detach(), self.prune_count)

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
        return torch.ops.pdp.channel_norms(weight.detach(), self.dim, self.rms)

    def soft(self, weight: Tensor) -> Tensor:
        return MaskedChannels.apply(
            weight,
            self.selected_from(weight),
            self.threshold,
            self.tau,
            self.dim,
            self.relative,
            self.rms,
            autocast_dtype(weight),
        )[0]

    def values(self, weight: Tensor) -> Tensor:
        norms = self.selected_from(weight)
        return torch.ops.pdp.soft_mask_channel(
            weight.detach(), norms, self.threshold, self.tau, self.dim, self.relative, norms.dtype
        )[1]

    def kept(self, weight: Tensor) -> Tensor:
        kept = torch.ops.pdp.hard_mask(self.selected_from(weight), self.prune_count)
        return kept.view([-1 if dim == self.dim else 1 for dim in range(weight.dim())])


class GroupWeightMask(WeightMask):
    """N:M; `pruned` of each group are pruned by now. Its thresholds are found inside the mask."""

    def __init__(self, relative: bool, m: int, dim: int):
        super().__init__(relative)
        self.m = m
        self.dim = dim
        self.pruned = 0

    def soft(self, weight: Tensor) -> Tensor:
        group = (self.m, self.pruned, self.dim)
        return MaskedWeight.apply(
            weight, None, self.tau, group, self.relative, autocast_dtype(weight), False
        )[0]

    def values(self, weight: Tensor) -> Tensor:
        group = (self.m, self.pruned, self.dim)
        return torch.ops.pdp.soft_mask_nm(
            weight.detach(), self.tau, *group, self.relative, self.tau.dtype, True
        )[1]

    def kept(self, weight: Tensor) -> Tensor:
        return torch.ops.pdp.hard_mask_nm(weight.detach(), self.m, self.pruned, self.dim)

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
            for layer in (self, *parts_read(self, self.training)):
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
        parts = parts_read(layer, training=False)
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


def original_class(cls: type) -> type:
    """The class that a masked layer had."""
    return cls.__bases__[1]


def _masked(layer: MaskedLayer, name: str, mask: WeightMask) -> Tensor:
    """The weight that a forward computes with: softly masked in training, else exactly."""
    weight = layer._parameters[name]
    if layer.training:
        return mask.soft(weight)
    return torch.where(mask.kept(weight), weight, 0)


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
