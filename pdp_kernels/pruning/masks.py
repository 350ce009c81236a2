"""Masks of weights: soft masks for training, exact hard masks for evaluation.

The constants of a mask are tensors that a `DeviceTable` writes in place, so that a compiled or
captured training step follows the schedule. Autograd refuses a backward whose forward ran before
such a write.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pdp_kernels.distributed import sums
from pdp_kernels.distributed.order_statistics import hard_mask_of_shard
from pdp_kernels.distributed.shards import (
    global_indices,
    is_distributed,
    is_sharded,
    local_shard,
    map_shards,
)
from pdp_kernels.functional.soft_mask import autocast_dtype, masked_weight
from pdp_kernels.functional.soft_mask_channel import find_norms
from pdp_kernels.functional.validation import check_divisible
from pdp_kernels.ops.autograd import mask_channels
from pdp_kernels.ops.reference import threshold_dtype

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers as wide as a weight, in bytes


class WeightMask(ABC):
    """The mask of one weight.

    Attributes:
        relative: whether tau is relative to the squared threshold.
        tau: the temperature, ().
        gradient_tau: that of the gradient, (); None if it is tau.
        weight_loaded: whether the weight has come from a state_dict since the last step.
        awaits_weight: whether the pruner's state has, before its weight. The weight that is loaded
            until the next step is then taken for that one.
        follows: whether it is the mask of a follower, which nothing trains: hard in every mode.
    """

    tau: Tensor
    gradient_tau: Tensor | None
    follows = False
    awaits_weight = False

    def __init__(self, relative: bool) -> None:
        self.relative = relative
        self.weight_loaded = False

    @abstractmethod
    def soft(self, weight: Tensor) -> Tensor:
        """Return the softly masked weight, differentiable."""

    @abstractmethod
    def values(self, weight: Tensor) -> Tensor:
        """Return the soft mask of the local shard; for channels one value per channel."""

    @abstractmethod
    def kept(self, weight: Tensor) -> Tensor:
        """Return the hard mask of the local shard, bool, of a shape that broadcasts with it."""

    def hard(self, weight: Tensor) -> Tensor:
        """Return the weight with exact zeros where the hard mask prunes, differentiable."""
        kept = self.kept(weight)
        if is_distributed(weight):
            return cast("DTensor", map_shards(lambda shard: _where_kept(shard, kept), weight))
        return _where_kept(weight, kept)

    def prune(self, weight: Tensor) -> None:
        """Set the weights that the hard mask prunes to zero, in place."""
        local_shard(weight).masked_fill_(~self.kept(weight), 0)

    def to(self, weight: Tensor) -> None:
        """Move the constants to the weight's device and threshold dtype."""
        place = weight.device, threshold_dtype([weight]), 1.0
        self.tau = _moved(self.tau, *place)
        if self.gradient_tau is not None:
            self.gradient_tau = _moved(self.gradient_tau, *place)


class SelectedMask(WeightMask):
    """A mask with one threshold, selected among the weights or channel norms of a global weight.

    Attributes:
        threshold: t, ().
        prune_count: how many units the hard mask prunes, int64 (1,).
    """

    threshold: Tensor
    prune_count: Tensor

    def hold(self, threshold: Tensor, prune_count: Tensor) -> None:
        """Take these tensors for threshold and prune_count, and write the old values into them."""
        if hasattr(self, "threshold") and not self.threshold.is_meta:
            threshold.copy_(self.threshold)
            prune_count.copy_(self.prune_count)
        self.threshold, self.prune_count = threshold, prune_count

    def to(self, weight: Tensor) -> None:
        super().to(weight)
        self.threshold = _moved(self.threshold, weight.device, self.tau.dtype, -math.inf)
        self.prune_count = _moved(self.prune_count, weight.device, torch.int64, 0)

    def _soft_mask(self, values: Tensor) -> Tensor:
        return torch.ops.pdp.soft_mask(
            values, self.threshold, self.tau, self.relative, self.tau.dtype, True
        )[1]


class UnstructuredMask(SelectedMask):
    """A mask with one value for each weight."""

    def soft(self, weight: Tensor) -> Tensor:
        temperatures = (self.tau, self.gradient_tau)
        rest = (None, self.relative, autocast_dtype(weight), False)
        return masked_weight(weight, (self.threshold, *temperatures, *rest))[0]

    def values(self, weight: Tensor) -> Tensor:
        return self._soft_mask(local_shard(weight))

    def kept(self, weight: Tensor) -> Tensor:
        return hard_mask_of_shard(weight, self.prune_count)


class ChannelMask(SelectedMask):
    """A mask with one value for each channel along dim."""

    def __init__(self, relative: bool, dim: int, rms: bool) -> None:
        super().__init__(relative)
        self.dim = dim
        self.rms = rms

    def soft(self, weight: Tensor) -> Tensor:
        out_dtype = autocast_dtype(weight)

        def masked(shard: Tensor) -> Tensor:
            norms = torch.ops.pdp.channel_norms(shard.detach(), self.dim, self.rms)
            constants = (self.threshold, self.tau, self.gradient_tau)
            rest = (self.dim, self.relative, self.rms, out_dtype)
            return mask_channels(shard, norms, *constants, *rest)[0]

        if not is_distributed(weight):
            return masked(weight)
        by_channels = cast("DTensor", sums.shard_by_channels(weight, self.dim))
        w_hat: DTensor = map_shards(masked, by_channels)
        return w_hat if by_channels is weight else w_hat.redistribute(placements=weight.placements)

    def values(self, weight: Tensor) -> Tensor:
        return self._soft_mask(self._of_shard(weight, self._norms(weight)))

    def kept(self, weight: Tensor) -> Tensor:
        kept = torch.ops.pdp.hard_mask(self._norms(weight), self.prune_count)
        kept = self._of_shard(weight, kept)
        return kept.view([-1 if dim == self.dim else 1 for dim in range(weight.dim())])

    def _norms(self, weight: Tensor) -> Tensor:
        if not is_distributed(weight):
            weight = weight.detach()
        return find_norms([weight], [self.dim], self.rms)[0]

    def _of_shard(self, weight: Tensor, of_channels: Tensor) -> Tensor:
        """Return the values of the local shard's channels, given those of all channels."""
        return of_channels[global_indices(weight, self.dim)] if is_sharded(weight) else of_channels


class GroupMask(WeightMask):
    """A mask that prunes the same number in each N:M group. The kernel finds the thresholds.

    Attributes:
        pruned: how many weights of each group are pruned so far, int64 ().
    """

    pruned: Tensor

    def __init__(self, relative: bool, n: int, m: int, dim: int) -> None:
        super().__init__(relative)
        self.n = n
        self.m = m
        self.dim = dim

    @property
    def prunable(self) -> int:
        """M - N, how many weights of each group are pruned in the end."""
        return self.m - self.n

    def hold(self, pruned: Tensor) -> None:
        """Take this tensor for pruned, and write the old value into it."""
        if hasattr(self, "pruned") and not self.pruned.is_meta:
            pruned.copy_(self.pruned)
        self.pruned = pruned

    def to(self, weight: Tensor) -> None:
        super().to(weight)
        self.pruned = _moved(self.pruned, weight.device, torch.int64, 0)

    def soft(self, weight: Tensor) -> Tensor:
        self._check_groups(weight)
        temperatures = (self.tau, self.gradient_tau)
        rest = ((self.m, self.dim), self.relative, autocast_dtype(weight), False)
        return masked_weight(weight, (self.pruned, *temperatures, *rest))[0]

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
        # The weight may have been sharded after the pruner checked it.
        if is_distributed(weight):
            check_divisible("a masked layer's weight", weight, self.m, self.dim)


def _where_kept(weight: Tensor, kept: Tensor) -> Tensor:
    """Return the weight where it is kept, else zero, differentiable.

    On a CPU torch.where takes one element at a time. Products of the bits with 0 and 1 use vector
    instructions, and are exact for NaN too.
    """
    if not _is_plain_on_cpu(weight):
        return torch.where(kept, weight, 0)
    bits = _BITS[weight.element_size()]
    products = torch.empty_like(weight, dtype=bits).copy_(kept).mul_(weight.view(bits))
    return products.view(weight.dtype)


def _is_plain_on_cpu(weight: Tensor) -> bool:
    """Return whether no compiler, derivative or transform sees what is done with the weight."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        and weight.device.type == "cpu"
        and type(weight) in (Tensor, nn.Parameter)
        and not (torch.is_grad_enabled() and weight.requires_grad)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad.unpack_dual(weight).tangent is None
    )


def _moved(values: Tensor, device: torch.device, dtype: torch.dtype, keep_all: float) -> Tensor:
    """Move the constants of a mask. From the meta device come none: all weights are kept."""
    if values.is_meta and device.type != "meta":
        return torch.full_like(values, keep_all, device=device, dtype=dtype)
    return values.to(device, dtype)


def selection_values(masks: Sequence[SelectedMask], weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the values among which each mask's threshold is selected, in one collective at most.

    Call it under torch.no_grad: weights are not detached, which takes as long as all else in it.

    Args:
        masks: the masks.
        weights: the weight of each mask.

    Returns:
        For each mask the weight itself, or the norms of all its channels.
    """
    values = list(weights)
    channels = {index: mask for index, mask in enumerate(masks) if isinstance(mask, ChannelMask)}
    if channels:
        norms = find_norms(
            [values[index] for index in channels],
            [mask.dim for mask in channels.values()],
            next(iter(channels.values())).rms,  # one setting for the whole configuration
        )
        for index, of_weight in zip(channels, norms, strict=True):
            values[index] = of_weight
    return values
