"""The weights that a pruner prunes in a model and in copies of it, and their masks."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from pdp_kernels.distributed.shards import fsdp_modules, reshard
from pdp_kernels.pruning.checks import Snapshot, check_layers, check_masks, check_ties
from pdp_kernels.pruning.config import PDPConfig
from pdp_kernels.pruning.device_table import DeviceTables
from pdp_kernels.pruning.masked_layer import mask_model, unmask_model
from pdp_kernels.pruning.masks import SelectedMask, WeightMask
from pdp_kernels.pruning.targets import Target, layout


class Follower(NamedTuple):
    """A copy of the model, its targets and their masks.

    The masks share their constants with the model's, as long as both are in one place.
    """

    model: nn.Module
    targets: list[Target]
    masks: list[WeightMask]


class MaskedWeights:
    """Masks for the weights of a model, which `put_on` puts there.

    Args:
        model: the model.
        targets: its weights to prune.

    Attributes:
        model: as given.
        targets: as given.
        masks: the mask of each target.
    """

    def __init__(self, model: nn.Module, targets: list[Target]) -> None:
        self.model = model
        self.targets = targets
        self.masks: list[WeightMask] = [target.new_mask() for target in targets]
        self._shapes = [target.weight.shape for target in targets]
        self._tables = DeviceTables(targets, self.masks)
        self._followers: list[Follower] = []
        self._snapshot: Snapshot | None = None  # of the model when a check found all well

    def put_on(self) -> None:
        """Mask the model, in place of any masks that are there."""
        _put_on(self.model, self.targets, self.masks)

    def follow(self, model: nn.Module, targets: list[Target]) -> None:
        """Put the masks on a copy of the model too.

        Raises:
            ValueError: its weights have other names, shapes, dtypes or devices.
        """
        reshard(self.model)
        reshard(model)
        expected, got = layout(self.targets), layout(targets)
        if got != expected:
            raise ValueError(f"copy must have the weights {expected}, got {got}")
        follower = Follower(model, targets, [copy.copy(mask) for mask in self.masks])
        for mask in follower.masks:
            mask.follows = True
        _put_on(model, targets, follower.masks)
        self._followers.append(follower)

    def check(self, thoroughly: bool = False) -> None:
        """Raise a RuntimeError if the model no longer has these masks on these weights.

        Args:
            thoroughly: look at the whole model, even if what a `Snapshot` has of it is unchanged.
        """
        if not thoroughly and self._snapshot is not None and self._snapshot.matches():
            return
        is_wrapped = self._check(self.model, self.targets, self.masks)
        self._snapshot = None if is_wrapped else Snapshot(self.model, self.targets)

    def set_schedule(
        self, config: PDPConfig, progress: float, final_counts: Mapping[str, int] | None
    ) -> None:
        """Set the prune counts and temperatures of this progress. The thresholds stay."""
        self._tables.set_schedule(config, progress, final_counts)
        self._update_followers()

    def step(
        self, config: PDPConfig, progress: float, final_counts: Mapping[str, int] | None
    ) -> None:
        """Set the schedule, and select its thresholds from the weights as they are now."""
        self._tables.step(config, progress, final_counts)
        self._update_followers()
        for mask in self.masks:  # the weights as they are count as trained ones
            mask.weight_loaded = mask.awaits_weight = False

    def set_thresholds(self, thresholds: Mapping[str, Tensor]) -> None:
        """Set the thresholds to those of a state, by the names of their weights.

        Its weights were loaded before it, or will be.
        """
        for name, threshold in self.thresholds().items():
            threshold.copy_(thresholds[name])
        self._update_followers()
        for mask in self.masks:
            mask.awaits_weight = not mask.weight_loaded
            mask.weight_loaded = False

    def thresholds(self) -> dict[str, Tensor]:
        """Return the threshold of each weight that has one."""
        return {
            target.name: mask.threshold
            for target, mask in zip(self.targets, self.masks, strict=True)
            if isinstance(mask, SelectedMask)
        }

    def check_followers(self) -> None:
        """Raise a RuntimeError if a copy that follows no longer has these masks on its weights."""
        for model, targets, masks in self._followers:
            reshard(model)
            self._check(model, targets, masks)

    def prune(self) -> None:
        """Set what the masks prune to zero and take the masks off, the copies' ones too."""
        for model, targets, masks in ((self.model, self.targets, self.masks), *self._followers):
            for target, mask in zip(targets, masks, strict=True):
                mask.prune(target.weight)
            unmask_model(model)
        self._followers.clear()

    def pruned_copy(self) -> nn.Module:
        """Return a plain copy of the model, pruned by the masks as they are.

        Raises:
            RuntimeError: `fully_shard` has sharded the model, which then cannot be copied.
        """
        if fsdp_modules(self.model):
            raise RuntimeError(
                "pruned_copy needs a model that copy.deepcopy can copy, and one under fully_shard "
                "is none: gather its state_dict into an unsharded model, and prune that"
            )
        copies: dict[int, Any] = {}
        model = copy.deepcopy(self.model, copies)
        for target, mask in zip(self.targets, self.masks, strict=True):
            mask.prune(copies[id(target.weight)])
        unmask_model(model)
        return model

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_snapshot": None}

    def _check(self, model: nn.Module, targets: list[Target], masks: list[WeightMask]) -> bool:
        """Check the model or a follower, and return whether one of its layers has a wrapper."""
        is_wrapped = check_layers(model, targets)
        check_masks(targets, masks, self._shapes)
        check_ties(model, targets)
        return is_wrapped

    def _update_followers(self) -> None:
        """Give the followers' masks the constants of the model's, which may be other tensors now.

        Followers may be on other devices than the model, or of other dtypes.
        """
        for follower in self._followers:
            for target, own, mask in zip(follower.targets, follower.masks, self.masks, strict=True):
                if own.tau is not mask.tau:
                    vars(own).update(vars(mask))
                    own.to(target.weight)


def _put_on(model: nn.Module, targets: list[Target], masks: list[WeightMask]) -> None:
    """Mask the targets of a model, in place of any masks that are there."""
    of_layers: dict[nn.Module, dict[str, WeightMask]] = {}
    for target, mask in zip(targets, masks, strict=True):
        for holder in target.holders:
            of_layers.setdefault(holder.layer, {})[holder.slot.name] = mask
    unmask_model(model)
    mask_model(model, of_layers)
