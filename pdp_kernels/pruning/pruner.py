"""PDPPruner: Algorithm 1 of the paper around a training loop of the user's."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pdp_kernels.distributed.replicas import compare_replicas
from pdp_kernels.distributed.shards import local_shard, reshard
from pdp_kernels.functional.allocation import check_budget, global_prune_counts
from pdp_kernels.functional.validation import check_non_negative, check_optimizer, check_positive
from pdp_kernels.ops.reference import threshold_dtype
from pdp_kernels.pruning.config import PDPConfig
from pdp_kernels.pruning.device_table import DeviceTable
from pdp_kernels.pruning.freeze import FrozenZeros, freeze_zeros
from pdp_kernels.pruning.macs import count_macs
from pdp_kernels.pruning.masked_layer import (
    GroupWeightMask,
    WeightMask,
    mask_model,
    new_mask,
    unmask_model,
)
from pdp_kernels.pruning.report import PruningReport, ReportHistory
from pdp_kernels.pruning.targets import Target, find_targets

_NOT_ALLOCATED = -1  # in a state_dict, until the end of the warm-up


class PDPPruner:
    """Prunes a model while it trains (Algorithm 1 of arXiv 2305.11203).

    After each optimizer step, `step` finds the thresholds of all layers in one call. In training
    mode a layer computes with the softly masked weight (Eq. 1), in evaluation mode with the exact
    hard mask of the sparsity reached by now; `finalize` leaves exact zeros in plain weights::

        pruner = PDPPruner(model, PDPConfig.for_epochs(0.9, epochs=20))
        for epoch in range(20):
            for index, (inputs, targets) in enumerate(batches):
                loss(model(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
                pruner.step(epoch + (index + 1) / len(batches))
        pruner.finalize()

    Every Parameter stays where it is, under its own name: only the class of a pruned layer changes,
    to one whose forward reads the masked weight. So optimizers, state_dict, deepcopy, pickle, DDP
    and torch.compile see an ordinary model. Weights that layers share are pruned once; one that is
    shared with a layer that is not pruned (an embedding, say) is left alone.

    Under DDP, FSDP2 (`fully_shard`) and tensor parallelism every rank makes a pruner of its own,
    before or after the model is sharded, and all find the thresholds of the whole weights.

    With gradient accumulation or several optimizers call `step` once, after the last of them; with
    a GradScaler after scaler.step, or see `attach`. Code that reads layer.weight without calling
    the layer computes with the dense weight. One thread at a time may run a pruned layer.

    Arguments:
        model: any torch.nn.Module. If another pruner's masks are on it (of a copy or a loaded
            model, say), they are replaced.
        config: what is pruned, how far and when: `PDPConfig`.

    Attributes:
        model, config: as given.
        progress: that of the last step, in epochs.
        prune_counts: by weight name, how many weights (channels) each layer loses in the end; None
            until the end of the warm-up, when a global budget is shared out.

    Raises:
        TypeError: model or config of another type; a weight of another dtype or layout.
        ValueError: nothing to prune; an entry of the configuration that matches no layer; a weight
            that cannot be pruned as asked. The model is then as it was.

    Example:
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[0.1, -0.4, 0.3, 0.2]]))
        >>> pruner = PDPPruner(model, PDPConfig(sparsity=0.5, warmup=0, ramp=1))
        >>> pruner.step(1.0)
        >>> pruner.finalize()
        >>> model.weight.detach()
        tensor([[ 0.0000, -0.4000,  0.3000,  0.0000]])
    """

    def __init__(self, model: nn.Module, config: PDPConfig):
        if not isinstance(config, PDPConfig):
            raise TypeError(f"config must be a PDPConfig, got {type(config).__name__}")
        self.config = config
        self._weights = find_targets(model, config)
        self._shapes = [entry.weight.shape for entry in self._weights]
        for members in self._budgets().values():
            sizes = [self._weights[index].units(config) for index in members]
            check_budget(sizes, config.sparsity, config.max_layer_sparsity)
        self.model = model
        self.progress = 0.0
        self.prune_counts: dict[str, int] | None = None
        self._masks = [
            new_mask(entry.plan, entry.dim(config), config.channel_norm == "rms")
            for entry in self._weights
        ]
        self._tables: list[DeviceTable] = []
        self._followers: list[tuple[nn.Module, list[Target]]] = []
        self._finalized = False
        self._history = ReportHistory()
        self._put_masks_on(model, self._weights)
        self.step(0.0)

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """Moves the schedule on: the thresholds of all layers, from the weights as they are now.

        A constant number of kernel launches for the whole model (and one per layer for norms of
        channels), without waiting for the device, except where a global budget is shared out with
        `global_prune_counts`: when the warm-up ends, and whenever the configuration reallocates.
        Of a sharded model every rank calls: four collectives for the whole model (as
        `pdp_thresholds`), one for all norms of channels, and more where a budget is shared out.

        Arguments:
            progress: where the training is, in epochs, fractions included.

        Raises:
            TypeError: progress is no number.
            ValueError: it is negative or not finite.
            RuntimeError: the pruner is finalized, or another one has taken its model over, or a
                weight's shape has changed.
        """
        check_non_negative("progress", progress)
        self._check_in_charge()
        reshard(self.model)
        if progress >= self.config.warmup and (
            self.prune_counts is None or self.config.reallocates(self.progress, progress)
        ):
            self.prune_counts = self._allocate()
        self._set_schedule(float(progress))
        for table in self._tables:
            table.find_thresholds()

    def attach(self, optimizer: Optimizer, steps_per_epoch: float) -> RemovableHandle:
        """Calls `step` after each step of the optimizer, until handle.remove().

        The progress grows by 1 / steps_per_epoch each time, from where it is. Steps that a
        GradScaler skips do not count. With several optimizers attach to the one that steps last.

        Raises:
            TypeError: optimizer is no torch.optim.Optimizer; steps_per_epoch is no number.
            ValueError: steps_per_epoch is not positive and finite.
        """
        check_optimizer(optimizer)
        check_positive("steps_per_epoch", steps_per_epoch)

        def after_step(*_):
            # From a count of steps, so that resuming repeats the same floating point numbers.
            steps = round(self.progress * steps_per_epoch) + 1
            self.step(steps / steps_per_epoch)

        return optimizer.register_step_post_hook(after_step)

    def follow(self, copy: nn.Module) -> None:
        """Lets a copy of the model, such as an average of its weights, follow the schedule.

        A copy has a schedule of its own, which stands still. One that follows is evaluated at the
        sparsity the training has reached, by its own weights, and finalized with the model::

            average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=...)
            pruner.follow(average.module)

        Raises:
            ValueError: its weights have other names, shapes, dtypes or devices.
        """
        entries = find_targets(copy, self.config)
        expected, got = (
            {
                entry.name: (tuple(entry.weight.shape), entry.weight.dtype, entry.weight.device)
                for entry in each
            }
            for each in (self._weights, entries)
        )
        if got != expected:
            raise ValueError(f"copy must have the weights {expected}, got {got}")
        self._put_masks_on(copy, entries)
        self._followers.append((copy, entries))

    @torch.no_grad()
    def finalize(self) -> None:
        """Sets the pruned weights to zero, exactly as many as asked for, and takes the masks off.

        Model and followers are then plain: classes, Parameters and keys as before the pruner.
        Where the schedule has not reached its end, a warning says so; the sparsity is met anyway.

        Raises:
            RuntimeError: as `step`.
        """
        self._check_in_charge()
        for model in (self.model, *(copy for copy, _ in self._followers)):
            reshard(model)
        reached = self.config.ramp_at(self.progress)
        if reached < 1:
            warnings.warn(
                f"finalize was called at progress {self.progress:g} with {reached:.0%} of the "
                "sparsity reached: the rest is pruned at once",
                stacklevel=2,
            )
        if self.prune_counts is None:
            self.prune_counts = self._allocate()
        self._set_schedule(self.config.warmup + self.config.ramp_epochs)
        for model, entries in ((self.model, self._weights), *self._followers):
            for entry, mask in zip(entries, self._masks, strict=True):
                local_shard(entry.weight).masked_fill_(~mask.kept(entry.weight), 0)
            unmask_model(model)
        self._followers.clear()
        self._finalized = True

    def freeze(self, optimizer: Optimizer) -> FrozenZeros:
        """Keeps the zeros while the finalized model is trained further: `freeze_zeros`.

        Raises:
            RuntimeError: the pruner is not finalized.
        """
        if not self._finalized:
            raise RuntimeError("freeze keeps the zeros that finalize makes: call finalize first")
        reshard(self.model)
        return freeze_zeros([entry.weight for entry in self._weights], optimizer)

    def report(self, inputs: Any = None) -> PruningReport:
        """What is pruned by now, layer by layer and in total: `PruningReport`.

        Reads the device; keeps the decisions, one byte per weight, to count what the next report
        finds changed.

        Arguments:
            inputs: what the model is called with (a tuple: its arguments) to count the
                multiply-accumulates of one inference; None leaves them out.
        """
        macs = None if inputs is None else count_macs(self.model, self._weights, inputs)
        reshard(self.model)
        masks = None if self._finalized else self._masks
        return self._history.report(self._weights, masks, self.progress, macs)

    @torch.no_grad()
    def verify_replicas(self, group: "dist.ProcessGroup | None" = None) -> None:
        """Checks that the ranks of a data-parallel training still prune the same weights.

        Compares thresholds, and checksums of those weights (or parts of them) that several ranks
        hold: one read of the weights, and one exchange of some bytes per weight. All ranks of the
        group call it; without torch.distributed there is nothing to compare.

        Arguments:
            group: the ranks to compare; all of them by default.

        Raises:
            RuntimeError: some differ, on every rank alike: which weights, and which ranks agree.
        """
        reshard(self.model)
        weights = {entry.name: entry.weight for entry in self._weights}
        thresholds = {
            entry.name: mask.threshold
            for entry, mask in zip(self._weights, self._masks, strict=True)
            if mask.threshold is not None
        }
        compare_replicas(weights, thresholds, group)

    def state_dict(self) -> dict[str, Any]:
        """Progress, what each layer loses, the thresholds by now, and the configuration.

        Its structure stays the same as the schedule advances, and the same on any number of ranks,
        as torch.distributed.checkpoint needs it, which takes a pruner as it takes a model.
        """
        names = [entry.name for entry in self._weights]
        counts = self.prune_counts or dict.fromkeys(names, _NOT_ALLOCATED)
        return {
            "config": self.config.to_dict(),
            "progress": self.progress,
            "weights": names,
            "prune_counts": torch.tensor([counts[name] for name in names]),
            "thresholds": {
                entry.name: mask.threshold.clone()
                for entry, mask in zip(self._weights, self._masks, strict=True)
                if mask.threshold is not None
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where a state was taken, bit for bit; the model has a state_dict of its own.

        Raises:
            TypeError: state_dict is no mapping.
            ValueError: it is of another configuration or of another model. Nothing changes.
            RuntimeError: as `step`.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
        self._check_in_charge()
        own = self.state_dict()
        if state_dict.keys() != own.keys():
            raise ValueError(f"state_dict must have keys {list(own)}, got {list(state_dict)}")
        for name, value in own["config"].items():
            if state_dict["config"].get(name) != value:
                raise ValueError(
                    f"state_dict must be of a configuration with {name} = {value!r}, "
                    f"got {state_dict['config'].get(name)!r}"
                )
        names = state_dict["weights"]
        if names != own["weights"]:
            raise ValueError(f"state_dict must have the weights {own['weights']}, got {names}")
        thresholds = state_dict["thresholds"]
        if thresholds.keys() != own["thresholds"].keys():
            raise ValueError(
                f"state_dict must have thresholds of {list(own['thresholds'])}, "
                f"got {list(thresholds)}"
            )
        counts = state_dict["prune_counts"].tolist()
        is_allocated = _NOT_ALLOCATED not in counts
        self.prune_counts = dict(zip(names, counts, strict=True)) if is_allocated else None
        self._set_schedule(state_dict["progress"])
        for entry, mask in zip(self._weights, self._masks, strict=True):
            if mask.threshold is not None:
                mask.threshold.copy_(thresholds[entry.name])

    def _put_masks_on(self, model: nn.Module, entries: list[Target]) -> None:
        masks: dict[nn.Module, dict[str, WeightMask]] = {}
        for entry, mask in zip(entries, self._masks, strict=True):
            for holder in entry.holders:
                masks.setdefault(holder.layer, {})[holder.slot.name] = mask
        unmask_model(model)
        mask_model(model, masks)

    def _check_in_charge(self) -> None:
        if self._finalized:
            raise RuntimeError("the pruner is finalized: make a new one to prune on")
        for entry, mask, shape in zip(self._weights, self._masks, self._shapes, strict=True):
            if entry.weight.shape != shape:
                raise RuntimeError(
                    f"{entry.name} had shape {tuple(shape)} and now has "
                    f"{tuple(entry.weight.shape)}: FullyShardedDataParallel flattens weights, "
                    "fully_shard does not"
                )
            for holder in entry.holders:
                masks = vars(holder.layer).get("pdp_masks", {})
                if masks.get(holder.slot.name) is not mask:
                    raise RuntimeError(
                        f"{entry.name} no longer has the masks of this pruner: another pruner, or "
                        "finalize, has taken the model over"
                    )

    def _allocate(self) -> dict[str, int]:
        """How many weights (channels) each layer loses in the end."""
        counts = {}
        for entry in self._weights:
            kind, n, m = entry.plan.pattern
            size = entry.units(self.config)
            if kind == "nm":
                counts[entry.name] = size // m * (m - n)
            elif entry.plan.sparsity is not None:
                counts[entry.name] = math.floor(entry.plan.sparsity * size + 0.5)
        for members in self._budgets().values():
            shares = global_prune_counts(
                [
                    self._masks[index].selected_from(self._weights[index].weight)
                    for index in members
                ],
                self.config.sparsity,
                max_layer_sparsity=self.config.max_layer_sparsity,
            )
            for index, count in zip(members, shares, strict=True):
                counts[self._weights[index].name] = count
        return {entry.name: counts[entry.name] for entry in self._weights}

    def _budgets(self) -> dict[str, list[int]]:
        """By pattern, the weights that share a global budget."""
        budgets: dict[str, list[int]] = {}
        for index, entry in enumerate(self._weights):
            kind = entry.plan.pattern.kind
            if kind != "nm" and entry.plan.sparsity is None:
                budgets.setdefault(kind, []).append(index)
        return budgets

    def _set_schedule(self, progress: float) -> None:
        """Counts and temperatures at this progress; thresholds stay."""
        self.progress = progress
        self._follow_devices()
        ramp = self.config.ramp_at(progress)
        for entry, mask in zip(self._weights, self._masks, strict=True):
            if isinstance(mask, GroupWeightMask):
                _, n, m = entry.plan.pattern
                mask.pruned = math.floor(ramp * (m - n) + 0.5)
        for table in self._tables:
            table.set_schedule(self.config, progress, self.prune_counts)

    def _follow_devices(self) -> None:
        """New tables where weights have moved to another device or dtype since the last step."""
        places: dict[tuple, list[int]] = {}
        for index, entry in enumerate(self._weights):
            weight = entry.weight
            places.setdefault((weight.device, threshold_dtype([weight])), []).append(index)
        if places != {table.place: table.members for table in self._tables}:
            self._tables = [
                DeviceTable(place, members, self._weights, self._masks)
                for place, members in places.items()
            ]
