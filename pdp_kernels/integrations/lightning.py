"""Pruning in Lightning's Trainer: one callback, from dense weights to exact zeros.

A complete program::

    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.nn.functional import cross_entropy

    from pdp_kernels.integrations.lightning import PDPCallback

    class Classifier(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)
            )

        def training_step(self, batch, index):
            return cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, index):
            self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    examples = torch.utils.data.TensorDataset(torch.randn(256, 64), torch.randint(10, (256,)))
    loader = torch.utils.data.DataLoader(examples, batch_size=32)
    best = ModelCheckpoint(monitor="val_loss")
    trainer = pl.Trainer(max_epochs=20, callbacks=[PDPCallback(0.9), best])
    model = Classifier()
    trainer.fit(model, loader, loader)  # ckpt_path=... resumes bit for bit
    trainer.save_checkpoint("pruned.ckpt")  # exactly 90% zeros in ordinary weights
    trainer.validate(model, loader, ckpt_path="best")  # with the zeros of the best weights

Checkpoints that are saved during the training hold the dense weights under their ordinary names,
and the pruner's state. `load_from_checkpoint` alone gives a dense model of them; the best model
with its zeros is `PDPCallback.load_pruned(Classifier(), best.best_model_path)`.

Where lightning is not installed, the same works with pytorch_lightning.
"""

import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING or find_spec("lightning"):
    import lightning.pytorch as pl
    from lightning.pytorch.utilities import rank_zero_info
else:
    import pytorch_lightning as pl
    from pytorch_lightning.utilities import rank_zero_info

from pdp_kernels.integrations.schedule import check_flags, fit_config, parse_config, resume
from pdp_kernels.pruning.config import PDPConfig
from pdp_kernels.pruning.masked_layer import unmask_model
from pdp_kernels.pruning.plain_data import from_leaves
from pdp_kernels.pruning.pruner import PDPPruner
from pdp_kernels.pruning.user_warnings import warn_user


class PDPCallback(pl.Callback):
    """Prunes the LightningModule of a `Trainer` while it trains, with `PDPPruner`.

    Pass it in `Trainer(callbacks=[PDPCallback(0.9)])`. What happens when:

    - Training begins: the module gets the masks, compiled, wrapped by DDP, sharded by
      ModelParallelStrategy (FSDP2) or not. Which weights is up to `PDPConfig.include` and exclude.
    - Each batch that ends with an optimizer step: the schedule advances. Progress is in epochs,
      fractions included: the epoch, plus the fraction of its batches. Gradient accumulation and
      several optimizers are one step. With manual optimization every batch counts as one. Data
      without a length make the whole training one epoch if max_steps is set; otherwise the
      schedule advances at the end of each epoch.
    - Validation: the module computes with the exact hard mask of the sparsity reached so far.
    - A training epoch ends: `PruningReport.scalars` go to `LightningModule.log_dict`, and so to the
      loggers and to trainer.callback_metrics.
    - Checkpoints: dense weights and the pruner's state. `fit(ckpt_path=...)` goes on bit for bit.
      If the schedule has changed, to extend a training for example, the new one goes on from where
      the old one was.
    - ModelCheckpoint(monitor=...) and EarlyStopping: scores from before the end of the ramp do not
      count, as an early model is the better the less it is pruned. Checkpoints from before it stay
      until later ones replace them, and patience starts at its end.
    - Averages of weights (EMAWeightAveraging, StochasticWeightAveraging) are validated and pruned
      by their own weights, at the sparsity of the training.
    - `fit` ends, after the last checkpoint: the weights get their exact zeros, and the masks are
      removed. `trainer.save_checkpoint` then saves the zeros. Not with fast_dev_run, which shall
      leave a model that can still be trained.
    - `validate`, `test` and `predict` with a ckpt_path: the loaded weights are pruned to the
      sparsity that they had in training, from the ramp's end on for good.

    Every `fit` makes a new pruner. It goes on from the last one where the Trainer does.

    Args:
        config: a `PDPConfig`, a mapping for `PDPConfig.from_dict`, or the sparsity as a number in
            [0, 1], which means `PDPConfig.for_epochs(sparsity, epochs)` with the length of the
            training, by max_epochs or max_steps.
        log: whether to log the scalars of the pruner's report. A report reads the device, and keeps
            one byte per weight.
        finalize: whether the weights get their zeros when `fit` ends. If not, the module keeps its
            masks: call `callback.pruner.finalize()` before you export it.

    Attributes:
        pruner: the `PDPPruner`; None until the training begins.

    Raises:
        TypeError: config is none of these; log or finalize is no bool.
        ValueError: the sparsity is not in [0, 1]; or as `PDPConfig.from_dict`. When the training
            begins: config is a number, and the length is not known (no limit, or max_steps alone
            with manual optimization, which may take several steps for a batch); or as `PDPPruner`,
            for weights that FSDPStrategy has flattened for example.

    Warns:
        UserWarning: the training ends before the ramp; it resumes with another schedule, or from a
            checkpoint without the pruner's state; a checkpoint to be evaluated has no such state
            (save_weights_only) or is from before the end of the ramp; and as `PDPPruner.step` and
            `PDPPruner.finalize`.

    Examples:
        >>> from pdp_kernels import PDPConfig
        >>> callback = PDPCallback(PDPConfig.for_epochs(0.9, epochs=3, exclude=["head"]))
        >>> callback.pruner is None
        True
    """

    def __init__(
        self,
        config: PDPConfig | Mapping[str, Any] | float,
        *,
        log: bool = True,
        finalize: bool = True,
    ) -> None:
        check_flags(log=log, finalize=finalize)
        self.config: PDPConfig | float = parse_config(config)
        self.logs_report = log  # Lightning sets Callback.log itself
        self.finalize = finalize
        self.pruner: PDPPruner | None = None
        self._loaded: dict[str, Any] | None = None  # of the checkpoint that was just loaded
        self._max_epochs = -1
        self._global_step = 0
        self._scores_count = False

    @classmethod
    def load_pruned(
        cls,
        module: pl.LightningModule,
        checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    ) -> pl.LightningModule:
        """Load a checkpoint of a training with this callback into a module, with exact zeros.

        Args:
            module: a module of the checkpoint's class and sizes, with or without masks.
            checkpoint: the path of a checkpoint in one file, read with weights_only=True, or what
                torch.load returns for it.

        Returns:
            The module, plain, with the weights of the checkpoint, pruned to the sparsity asked for.

        Raises:
            ValueError: the checkpoint has no state of this callback, as with save_weights_only.
                The module stays as it was.
            RuntimeError: its weights do not fit the module, as `torch.nn.Module.load_state_dict`.

        Warns:
            UserWarning: the checkpoint is from before the end of the ramp, so that the rest of the
                weights are pruned at once.
        """
        values = (
            dict(checkpoint)
            if isinstance(checkpoint, Mapping)
            else torch.load(checkpoint, map_location="cpu", weights_only=True)
        )
        states = values.get("callbacks", {})
        state = states.get(cls.__qualname__)
        if not state:
            raise ValueError(
                f"checkpoint must have the state of {cls.__qualname__} among its callbacks, which "
                f"save_weights_only leaves out, got {list(states)}"
            )
        module.on_load_checkpoint(values)
        module.load_state_dict(values["state_dict"])
        unmask_model(module)
        if not state["finalized"]:
            _pruner_of(module, state).finalize()
        return module

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note the length of the training, before StochasticWeightAveraging adds an epoch to it."""
        self._loaded = None
        self._max_epochs = -1 if trainer.max_epochs is None else trainer.max_epochs

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the state, until the module has its layers on its devices, and all its weights."""
        self._loaded = checkpoint["callbacks"].get(self.state_key)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the pruner, for a checkpoint."""
        if self._loaded is not None:
            return self._loaded
        if self.pruner is None:
            return {}
        return {
            "pruner": self.pruner.state_dict(),
            "finalized": self.pruner.finalized,
            "scores_count": self._scores_count,
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mask the module, and load the pruner's state if the training resumes."""
        state = self._loaded
        if state is None and trainer.global_step and self.pruner and self.pruner.model is pl_module:
            state = self.state_dict()  # another fit of the same Trainer
        epochs = _length(trainer, self._max_epochs)
        if _is_dev_run(trainer) and isinstance(self.config, PDPConfig):
            epochs = None  # no warning of a training that is meant to be too short
        self.pruner = PDPPruner(pl_module, fit_config(self.config, epochs))
        self._loaded = None
        self._scores_count = False
        self._global_step = trainer.global_step
        if state:
            resume(self.pruner, state["pruner"])
            self._scores_count = state["scores_count"]
            return
        reached = self.pruner.config.ramp_at(trainer.current_epoch)
        if trainer.current_epoch > 0 and reached > 0:
            warn_user(
                f"pruning starts at epoch {trainer.current_epoch} with {reached:.0%} of the "
                f"sparsity at once: there is no state of {type(self).__name__} to go on from"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Find the thresholds again where callbacks may have replaced the weights."""
        if batch_idx == 0 and self.pruner is not None:
            self.pruner.step(self.pruner.progress)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Advance the schedule, if an optimizer has stepped."""
        # Manual optimization may use optimizers whose steps Lightning does not count.
        if trainer.global_step == self._global_step and pl_module.automatic_optimization:
            return
        self._global_step = trainer.global_step
        if self.pruner is not None:
            self.pruner.step(_progress(trainer, batch_idx))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the report. Checkpoints and early stopping follow."""
        if self.pruner is None:
            return
        if trainer.num_training_batches == math.inf and trainer.max_steps == -1:
            self.pruner.step(trainer.current_epoch + 1)
        self._forget_early_scores(trainer, are_fresh=not trainer.enable_validation)
        if self.logs_report and not trainer.barebones:
            pl_module.log_dict(self.pruner.report().scalars(), sync_dist=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune weights that a checkpoint has brought, outside of `fit`."""
        if trainer.state.fn != "fit":
            self._prune_loaded(trainer, pl_module)
        elif not trainer.sanity_checking:
            self._forget_early_scores(trainer, are_fresh=True)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune weights that a checkpoint has brought."""
        self._prune_loaded(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune weights that a checkpoint has brought."""
        self._prune_loaded(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finalize, after all checkpoints, and after averages have replaced the weights."""
        state, self._loaded = self._loaded, None
        if state and not state["finalized"]:  # of a training that had ended: on_train_start has not
            self.pruner = _pruner_of(pl_module, state)  # taken it
        if self.pruner is None or self.pruner.finalized or not self.finalize:
            return
        if _is_dev_run(trainer):
            return
        self.pruner.finalize()
        if any(getattr(saver, "best_model_path", "") for saver in trainer.checkpoint_callbacks):
            rank_zero_info(
                "The model now has the zeros of its pruning. Checkpoints hold dense weights: "
                f"{type(self).__name__}.load_pruned returns one of them with its zeros."
            )

    def _prune_loaded(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the module the masks that it had in training when a checkpoint was saved."""
        state, self._loaded = self._loaded, None
        if trainer.ckpt_path is None:
            return
        if not state:
            warn_user(
                f"the weights of {trainer.ckpt_path} are evaluated as they are, without the masks "
                f"of their training: the checkpoint has no state of {type(self).__name__}, which "
                "save_weights_only leaves out"
            )
            return
        if state["finalized"]:
            return
        with torch.inference_mode(False):  # the masks outlast it
            self.pruner = _pruner_of(pl_module, state)
            reached = self.pruner.config.ramp_at(self.pruner.progress)
            if reached < 1:
                warn_user(
                    f"{trainer.ckpt_path} is from before the end of the ramp: it is evaluated with "
                    f"{reached:.0%} of the sparsity, as in its training"
                )
            elif self.finalize:
                self.pruner.finalize()

    def _forget_early_scores(self, trainer: pl.Trainer, are_fresh: bool) -> None:
        """Let scores of checkpoints and of early stopping count from the end of the ramp.

        Args:
            trainer: the Trainer.
            are_fresh: whether the scores that come next are of weights as they are now.
        """
        if self._scores_count or self.pruner is None:
            return
        for stopping in trainer.early_stopping_callbacks:
            stopping.wait_count = 0
            stopping.best_score = _worst(stopping.mode)
        if are_fresh and self.pruner.config.ramp_at(self.pruner.progress) >= 1:
            for saver in trainer.checkpoint_callbacks:
                if getattr(saver, "best_k_models", None):
                    _give_worst_scores(saver)
            self._scores_count = True


def _give_worst_scores(saver: Any) -> None:
    """Let every new score of a ModelCheckpoint be better than those of the files it has now."""
    saver.best_model_score = saver.kth_value = _worst(saver.mode)
    saver.best_k_models = dict.fromkeys(saver.best_k_models, _worst(saver.mode))


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(math.inf if mode == "min" else -math.inf, device="cpu")


def _pruner_of(module: pl.LightningModule, state: Mapping[str, Any]) -> PDPPruner:
    """Return a pruner for the module as it was when the state was saved."""
    pruner = PDPPruner(module, PDPConfig.from_dict(from_leaves(state["pruner"]["config"])))
    pruner.load_state_dict(state["pruner"])
    return pruner


def _is_dev_run(trainer: pl.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set at run time


def _length(trainer: pl.Trainer, max_epochs: int) -> float | None:
    """Return the length of the training in epochs, as far as it is known."""
    batches, max_steps = trainer.num_training_batches, trainer.max_steps
    if max_steps != -1 and batches == math.inf:
        return 1.0
    lengths: list[float] = [] if max_epochs == -1 else [max_epochs]
    if max_steps != -1 and trainer.lightning_module.automatic_optimization:
        accumulated = trainer.accumulate_grad_batches
        epochs, steps = divmod(max_steps, math.ceil(batches / accumulated))
        lengths.append(epochs + min(steps * accumulated, batches) / batches)
    return min(lengths, default=None)


def _progress(trainer: pl.Trainer, batch_idx: int) -> float:
    """Return the progress in epochs after a batch."""
    batches = trainer.num_training_batches
    if batches == math.inf and trainer.max_steps != -1:
        return trainer.global_step / trainer.max_steps
    return trainer.current_epoch + (batch_idx + 1) / batches
