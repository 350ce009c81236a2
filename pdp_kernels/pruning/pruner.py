"""PDPPruner: Algorithm 1 of the paper around the user's training loop."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pdp_kernels.distributed.replicas import compare_replicas
from pdp_kernels.distributed.shards import reshard
from pdp_kernels.functional.validation import check_non_negative, check_positive
from pdp_kernels.pruning.budgets import check_budgets, final_counts, warn_of_emptied
from pdp_kernels.pruning.checks import (
    check_detached,
    check_end,
    check_layers,
    check_length,
    check_optimizer,
    check_state,
    check_state_values,
)
from pdp_kernels.pruning.config import SCHEDULE_FIELDS, PDPConfig
from pdp_kernels.pruning.freeze import FrozenZeros, freeze_zeros
from pdp_kernels.pruning.macs import count_macs
from pdp_kernels.pruning.masked_weights import MaskedWeights
from pdp_kernels.pruning.optimizers import parameter_ids, torch_optimizer
from pdp_kernels.pruning.plain_data import to_leaves, with_empty_mappings
from pdp_kernels.pruning.report import PruningReport, ReportHistory
from pdp_kernels.pruning.step_counter import StepCounter
from pdp_kernels.pruning.targets import find_targets

_NOT_ALLOCATED = -1  # in a state_dict, until the end of the warm-up


class PDPPruner:
    """Prunes a model while it trains (Algorithm 1 of arXiv 2305.11203).

    After each optimizer step, `step` finds the thresholds of all layers in one call. In training
    mode a layer computes with the softly masked weight (Eq. 1). In evaluation mode it computes with
    the exact hard mask of the current sparsity. `finalize` leaves exact zeros in plain weights:

        pruner = PDPPruner(model, PDPConfig.for_epochs(0.9, epochs=20))
        for epoch in range(20):
            for index, (inputs, targets) in enumerate(batches):
                loss(model(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
                pruner.step(epoch + (index + 1) / len(batches))
        pruner.finalize()

    Every Parameter stays where it is, under its own name. Only classes change: that of a pruned
    layer, to one whose forward reads the masked weight, and those of the modules around it, to ones
    of the same name, whose forwards read it too. So optimizers, state_dict, deepcopy, pickle, DDP
    and torch.compile see an ordinary model.
    A weight that several layers share is pruned once. It is left alone if one of these layers is
    not pruned, an embedding for example. Tie weights before you make the pruner.

    Where the model itself is called in training mode, unstructured masks are computed for about
    25 MB of weights at a time, in one call forward and one backward, from the second training step
    on. That keeps up to 25 MB more of gradients. A weight is masked on its own, as its layer runs,
    where it has 8 million elements or more or hooks on its gradient, where a layer is called
    without the model, and under activation checkpointing, transforms of torch.func, torch.compile
    and FSDP. A forward that writes into a masked weight gets a warning, or an error where the
    weight is another layer's. While a forward runs, nothing else may write into a Parameter through
    ``.data``, which nothing can notice.

    In a PEFT model the pruner prunes the base layers and, by default, no adapters. Base weights
    that are frozen keep their magnitudes, are pruned by these, and the adapters learn to make up
    for it. Merge after `finalize`; a merged weight is dense again, and a new pruner may prune it.
    PEFT saves the adapters alone: save the pruned base, which unload() returns, beside them.
    Quantize and export to ONNX after `finalize` too, or from `pruned_copy`.

    Under DDP, FSDP2 (`fully_shard`) and tensor parallelism every rank makes its own pruner, before
    or after the model is sharded. All ranks find the thresholds of the global weights.

    With gradient accumulation or several optimizers, call `step` once, after the last optimizer
    step. With a GradScaler call it after scaler.step, or see `attach`. Outside of the model's
    forwards, as in a loss, layer.weight is the dense Parameter. Only one thread at a time may run a
    pruned layer.

    Args:
        model: any torch.nn.Module. If it has the masks of another pruner (a copy or a loaded model
            may), they are replaced.
        config: what to prune, how far and when: `PDPConfig`.

    Attributes:
        model: as given.
        config: as given.
        progress: the progress of the last step, in epochs.
        prune_counts: for each weight name, the number of weights (channels) to prune in the end.
            None until the pruner allocates global budgets, in the first step after the warm-up.

    Raises:
        TypeError: model or config of another type; a weight of another dtype or layout.
        ValueError: nothing to prune; an entry of the configuration that matches no layer; a weight
            that cannot be pruned as asked. The model stays as it was.

    Examples:
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[0.1, -0.4, 0.3, 0.2]]))
        >>> pruner = PDPPruner(model, PDPConfig(sparsity=0.5, warmup=0, ramp=1))
        >>> pruner.step(1.0)
        >>> pruner.finalize()
        >>> model.weight.detach()
        tensor([[ 0.0000, -0.4000,  0.3000,  0.0000]])
    """

    def __init__(self, model: nn.Module, config: PDPConfig) -> None:
        if not isinstance(config, PDPConfig):
            hint = ": use PDPConfig.from_dict" if isinstance(config, Mapping) else ""
            raise TypeError(f"config must be a PDPConfig, got {type(config).__name__}{hint}")
        targets = find_targets(model, config)
        check_budgets(targets, config)
        self._finalized = False
        self._hook: RemovableHandle | None = None
        self._emptied: set[str] = set()  # layers that a warning has named
        self._history = ReportHistory()
        self._step_counter = StepCounter()
        self.model = model
        self.config = config
        self.progress: float = 0.0
        self.prune_counts: dict[str, int] | None = None
        self._weights = MaskedWeights(model, targets)
        reshard(model)
        with torch.no_grad():
            if config.ramp_at(0.0) > 0:  # else weights may be loaded before anything is pruned
                self._allocate_if_due(0.0)  # which may raise, while the model is as it was
            self._weights.put_on()
            self._advance(0.0)

    def step(self, progress: float) -> None:
        """Advance the schedule, and find the thresholds of all layers in the weights as they are.

        Takes a constant number of kernel launches for the whole model, and one per layer for the
        norms of channels. Waits for the device only when it allocates a global budget with
        `global_prune_counts`: at the end of the warm-up, and whenever the configuration
        reallocates. Every rank of a sharded model calls it: four collectives for the whole model
        (as `pdp_thresholds`), one for all norms of channels, and more to allocate a budget.

        Args:
            progress: where the training is, in epochs, fractions included.

        Warns:
            UserWarning: a global budget prunes more than 99% of a layer; or the progress seems to
                count optimizer steps.

        Raises:
            TypeError: progress is no number.
            ValueError: progress is negative or not finite; or LAMP, which is due, meets a weight
                that is not finite.
            RuntimeError: the pruner is finalized; another pruner has taken over the model; or a
                weight's shape has changed, or which layers share it.
        """
        self._step(progress)

    # In a function that torch.compile compiles, it would compile each progress anew.
    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="a pruner changes the schedule's numbers at each step"
    )
    @torch.no_grad()
    def _step(self, progress: float) -> None:
        check_non_negative("progress", progress)
        self._check_owns_model()
        self._allocate_if_due(progress)
        self._advance(progress)

    def _advance(self, progress: float) -> None:
        """Set the schedule to this progress, with the budgets as they are allocated."""
        weights = (target.weight for target in self._weights.targets)
        self._step_counter.note(self.config, progress, weights)
        self.progress = float(progress)
        self._weights.step(self.config, self.progress, self.prune_counts)

    def attach(
        self, optimizer: Optimizer, steps_per_epoch: float, epochs: float | None = None
    ) -> RemovableHandle:
        """Call `step` after each step of the optimizer, until handle.remove().

        The progress grows by 1 / steps_per_epoch each time, from where it is. Steps that a
        GradScaler skips do not count, unless the optimizer is fused and skips them on the device.
        With several optimizers attach to the one that steps last.
        `finalize` removes the hook. A pickled pruner, or a deepcopy of one, is not attached.

        Args:
            optimizer: any torch.optim.Optimizer that trains a weight to prune, or a wrapper of one
                such as accelerate's.
            steps_per_epoch: the number of optimizer steps in an epoch.
            epochs: the length of the training, if a warning shall tell that the schedule is longer.

        Returns:
            The handle of the hook.

        Warns:
            UserWarning: the training ends before the ramp.

        Raises:
            TypeError: optimizer is no torch.optim.Optimizer; steps_per_epoch or epochs is no
                number.
            ValueError: steps_per_epoch or epochs is not positive and finite; the optimizer has none
                of the weights to prune.
            RuntimeError: the pruner is attached already, or finalized.
        """
        optimizer = torch_optimizer(optimizer)
        check_positive("steps_per_epoch", steps_per_epoch)
        if epochs is not None:
            check_positive("epochs", epochs)
        self._check_owns_model()
        check_detached(self._hook)
        check_optimizer(optimizer, self.model, self._weights.targets)

        def after_step(*_: object) -> None:
            # From a count of steps, so that resuming repeats the same floating point numbers.
            steps = round(self.progress * steps_per_epoch) + 1
            self.step(steps / steps_per_epoch)

        if epochs is not None:
            check_length(self.config, epochs)
        self._hook = optimizer.register_step_post_hook(after_step)
        return self._hook

    def follow(self, copy: nn.Module) -> None:
        """Let a copy of the model, such as an average of its weights, follow the schedule.

        A copy has the masks of the moment when it was made, and they stand still. A copy that
        follows is evaluated at the current sparsity of the training, by its own weights, and is
        finalized with the model:

            average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=...)
            pruner.follow(average.module)

        Args:
            copy: a module with the same weights to prune.

        Raises:
            TypeError: copy is no torch.nn.Module.
            ValueError: its weights have other names, shapes, dtypes or devices.
            RuntimeError: as `step`.
        """
        self._check_owns_model()
        self._weights.follow(copy, find_targets(copy, self.config))

    @torch.no_grad()
    def finalize(self) -> None:
        """Set exactly as many weights to zero as asked for, and take the masks off.

        The model and its followers are plain afterwards, with the classes, Parameters and keys from
        before the pruner. The sparsity is met even if the schedule has not reached its end.

        Warns:
            UserWarning: the schedule has not reached its end; or the weights were loaded after the
                last step without the pruner's state, as a best checkpoint is. Weights from before
                the end of the ramp lose accuracy when they are pruned at once.

        Raises:
            ValueError: as `step`, if nothing was allocated before.
            RuntimeError: as `step`, for the followers too. Nothing is pruned.
        """
        self._check_owns_model(thoroughly=True)
        self._weights.check_followers()
        check_end(self.config, self.progress, self._weights.masks)
        if self.prune_counts is None:
            self.prune_counts = self._allocate()
        self._weights.set_schedule(self.config, self.config.ramp_end, self.prune_counts)
        self._weights.prune()
        if self._hook is not None:
            self._hook.remove()
        self._finalized = True

    @property
    def finalized(self) -> bool:
        """Whether `finalize` has pruned the model and taken the masks off."""
        return self._finalized

    @torch.no_grad()
    def pruned_copy(self) -> nn.Module:
        """Return a plain copy of the model, pruned to the current sparsity of the schedule.

        The copy is what the model computes in evaluation mode now, as exact zeros in ordinary
        layers: for export, evaluation or serving in mid-training. The model trains on as it was.

        Returns:
            A deepcopy without masks, hooks of the model included.

        Raises:
            RuntimeError: as `step`; or `fully_shard` has sharded the model, which then cannot be
                copied.
        """
        self._check_owns_model(thoroughly=True)
        return self._weights.pruned_copy()

    def freeze(self, optimizer: Optimizer) -> FrozenZeros:
        """Keep the zeros while the finalized model is trained further: `freeze_zeros`.

        Freezes the pruned weights that the optimizer has. With several optimizers call it once for
        each that trains pruned weights. Weights that do not train (requires_grad=False) need
        nothing.

        Args:
            optimizer: an optimizer that trains pruned weights of the model.

        Returns:
            The `FrozenZeros`, whose remove() ends it.

        Warns:
            UserWarning: as `freeze_zeros`.

        Raises:
            RuntimeError: the pruner is not finalized.
            TypeError: optimizer is no torch.optim.Optimizer.
            ValueError: the optimizer has none of the pruned weights, though some are trained; or
                none of the model's.
        """
        if not self._finalized:
            raise RuntimeError("freeze keeps the zeros that finalize makes: call finalize first")
        reshard(self.model)
        optimizer = torch_optimizer(optimizer)
        trained = parameter_ids(optimizer)
        targets = self._weights.targets
        weights = [target.weight for target in targets if id(target.weight) in trained]
        if weights:
            return freeze_zeros(weights, optimizer)
        check_optimizer(optimizer, self.model, targets)
        return FrozenZeros([], optimizer)

    def report(self, inputs: Any = None) -> PruningReport:
        """Return what is pruned so far, for each layer and in total: `PruningReport`.

        Reads the device. Keeps one byte per weight, the decisions of the hard mask, so that the
        next report can count those that changed.

        Args:
            inputs: what the model is called with, to count the multiply-accumulates of one
                inference: one argument, a tuple of arguments, or a mapping of keyword arguments.
                None leaves them out.

        Returns:
            The `PruningReport`.

        Raises:
            RuntimeError: as `step`, before `finalize`. After it: a layer was replaced, or a weight
                quantized, so that its zeros cannot be counted.
        """
        targets = self._weights.targets
        if self._finalized:
            check_layers(self.model, targets)
        else:
            self._check_owns_model()
        macs = None if inputs is None else count_macs(self.model, targets, inputs)
        reshard(self.model)
        masks = None if self._finalized else self._weights.masks
        return self._history.report(self.model, targets, masks, self.progress, macs)

    @torch.no_grad()
    def verify_replicas(self, group: "dist.ProcessGroup | None" = None) -> None:
        """Check that the ranks of a data-parallel training still prune the same weights.

        Compares thresholds and prune counts, and checksums of weights (or shards) that several
        ranks hold: one read of the weights, and one exchange of some bytes per weight. A DTensor is
        compared on the ranks of its mesh, a plain tensor on all. All ranks of the group call it.
        Without torch.distributed there is nothing to compare.

        Args:
            group: the ranks to compare; default all.

        Raises:
            RuntimeError: some ranks differ. Every rank raises the same error, which names the
                weights, and the ranks that agree.
        """
        reshard(self.model)
        weights = {target.name: target.weight for target in self._weights.targets}
        compare_replicas(weights, self._weights.thresholds(), self.prune_counts or {}, group)

    def state_dict(self) -> dict[str, Any]:
        """Return the progress, the prune counts, the thresholds and the configuration.

        Returns:
            A dict whose structure stays the same as the schedule advances, and on any number of
            ranks. torch.distributed.checkpoint needs that, and takes a pruner as it takes a model.
            The configuration is `PDPConfig.to_dict`, with each mapping in it as a JSON text.
        """
        names = [target.name for target in self._weights.targets]
        counts = self.prune_counts or dict.fromkeys(names, _NOT_ALLOCATED)
        return {
            "config": to_leaves(self.config.to_dict()),
            "progress": self.progress,
            "weights": names,
            "prune_counts": torch.tensor([counts[name] for name in names], device="cpu"),
            "thresholds": {name: t.clone() for name, t in self._weights.thresholds().items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], *, new_schedule: bool = False) -> None:
        """Go on where a state was taken, bit for bit. The model has its own state_dict.

        Args:
            state_dict: what `state_dict` returned.
            new_schedule: accept a state of another schedule (temperature, warmup, ramp, anneal,
                reallocate), to extend a training for example. This pruner's schedule then goes on
                from the progress of the state.

        Raises:
            TypeError: state_dict is no mapping, or a value in it is of another type.
            ValueError: the state is of another configuration or of another model, or has a value
                that no pruner has. Nothing changes.
            RuntimeError: as `step`.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
        self._check_owns_model()
        own = self.state_dict()
        state_dict = with_empty_mappings(state_dict, own)
        check_state(state_dict, own, SCHEDULE_FIELDS if new_schedule else ())
        check_state_values(state_dict, self._weights.targets, _NOT_ALLOCATED)
        counts = state_dict["prune_counts"].tolist()
        is_allocated = _NOT_ALLOCATED not in counts
        names = state_dict["weights"]
        self.prune_counts = dict(zip(names, counts, strict=True)) if is_allocated else None
        self.progress = state_dict["progress"]
        self._weights.set_schedule(self.config, self.progress, self.prune_counts)
        self._weights.set_thresholds(state_dict["thresholds"])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_hook": None}

    def _check_owns_model(self, thoroughly: bool = False) -> None:
        """Raise a RuntimeError if the model no longer has these masks on these weights.

        Lets FSDP put its sharded parameters back first. Only a thorough check looks for layers that
        came to the model and share a masked weight.
        """
        if self._finalized:
            raise RuntimeError("the pruner is finalized: make a new one to prune on")
        reshard(self.model)
        self._weights.check(thoroughly)

    def _allocate_if_due(self, progress: float) -> None:
        """Allocate the budgets at this progress, if the configuration does."""
        if progress < self.config.warmup:
            return
        is_due = self.prune_counts is None or self.config.reallocates(self.progress, progress)
        if is_due and not any(target.weight.is_meta for target in self._weights.targets):
            self.prune_counts = self._allocate()

    def _allocate(self) -> dict[str, int]:
        targets = self._weights.targets
        counts = final_counts(targets, self._weights.masks, self.config)
        warn_of_emptied(targets, counts, self.config, self._emptied)
        return counts
