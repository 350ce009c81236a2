"""Pruning in Hugging Face's Trainer: one callback, from dense weights to exact zeros.

A complete program::

    import torch
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    from pdp_kernels.integrations.transformers import PDPCallback

    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )
    model = BertForSequenceClassification(config)
    examples = [
        {"input_ids": torch.randint(100, (16,)), "labels": index % 2} for index in range(64)
    ]
    trainer = Trainer(
        model,
        TrainingArguments("output", num_train_epochs=10, report_to="none"),
        train_dataset=examples,
        callbacks=[PDPCallback(0.9)],
    )
    trainer.train()  # resume_from_checkpoint=True goes on bit for bit
    trainer.save_model("pruned")  # exactly 90% zeros in ordinary weights

The Trainer's checkpoints hold the dense weights under their ordinary names, and the pruner's state
in trainer_state.json. With load_best_model_at_end the best model is chosen among those from after
the ramp.
"""

import json
import math
from collections.abc import Mapping
from inspect import currentframe
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import (
    CallbackHandler,
    ExportableState,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import has_length
from transformers.training_args import TrainingArguments

from pdp_kernels.integrations.schedule import check_flags, fit_config, parse_config, resume
from pdp_kernels.pruning.config import PDPConfig
from pdp_kernels.pruning.masked_layer import DATA_PARALLEL
from pdp_kernels.pruning.pruner import PDPPruner
from pdp_kernels.pruning.user_warnings import warn_user

_PREFIX = "pdp/"
_STATE_FILE = "trainer_state.json"  # in each checkpoint; also where accelerate has sharded weights


class PDPCallback(TrainerCallback, ExportableState):
    """Prunes the model of a `transformers.Trainer` while it trains, with `PDPPruner`.

    Pass it in `Trainer(callbacks=[PDPCallback(0.9)])`. What happens when:

    - Training begins: the model gets the masks, compiled, wrapped by DDP or not.
    - Each optimizer step: the schedule advances by one step. Progress is in epochs, fractions
      included: optimizer steps / optimizer steps in an epoch, as the Trainer counts them.
      Gradient accumulation is one step. Steps that a GradScaler skips do not count, unless a fused
      optimizer skips them on the device. With a data set without a length the whole training is
      one epoch.
    - Evaluation: the model computes with the exact hard mask of the sparsity reached so far.
    - Logs of the training loss get `PruningReport.scalars`, in TensorBoard, W&B and
      trainer.state.log_history. The console prints those of the whole model.
    - Checkpoints: dense weights and the pruner's state. `train(resume_from_checkpoint=...)` goes on
      bit for bit, and from the last one of a whole training it finalizes at once. If the schedule
      has changed, to extend a training for example, the new one goes on from where the old one was.
    - load_best_model_at_end, and early stopping: metrics from before the end of the ramp do not
      count, as an early model is the better the less it is pruned. If no evaluation follows the
      ramp, the last model stays. save_strategy "best" saves after each evaluation until then.
    - Training ends, after the best model is loaded: the weights get their exact zeros, and the
      masks are removed. `trainer.save_model` saves them.

    A callback prunes one model, once. With a model_init each training has a new model, which is
    pruned anew; so hyperparameter_search works. If you resume with
    restore_callback_states_from_checkpoint=True, the Trainer replaces the callback by that of the
    checkpoint: find it in trainer.callback_handler.callbacks.

    Args:
        config: a `PDPConfig`, a mapping for `PDPConfig.from_dict`, or the sparsity as a number in
            [0, 1], which means `PDPConfig.for_epochs(sparsity, epochs)` with the length of the
            training.
        log: whether the Trainer's logs get the scalars of the pruner's report. A report reads the
            device, and keeps one byte per weight.
        finalize: whether the weights get their zeros when the training ends. If not, the model
            keeps its masks: call `callback.pruner.finalize()` before you save it.

    Attributes:
        pruner: the `PDPPruner`; None until the training begins.

    Raises:
        TypeError: config is none of these; log or finalize is no bool.
        ValueError: the sparsity is not in [0, 1]; or as `PDPConfig.from_dict`. When the training
            begins: the checkpoint has no state of this callback, or one of another configuration;
            or as `PDPPruner`, for weights that FSDP1 has flattened for example.
        RuntimeError: when the training begins: the callback has pruned this model already, or
            several GPUs in one process (torch.nn.DataParallel).

    Warns:
        UserWarning: when the training begins, if it ends before the ramp, or if it resumes with
            another schedule; and as `PDPPruner.step` and `PDPPruner.finalize`.

    Examples:
        >>> from pdp_kernels import PDPConfig
        >>> callback = PDPCallback(PDPConfig.for_epochs(0.9, epochs=3, exclude=["classifier"]))
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
        self.log = log
        self.finalize = finalize
        self.pruner: PDPPruner | None = None
        self._steps_per_epoch = 0
        self._skipped_steps = 0
        self._has_ended = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mask the model, and load the pruner's state if the training resumes."""
        model = kwargs["model"]
        resumes = state.global_step > 0
        self._check_trainable(args, model, resumes)
        saved = _saved_state(state, type(self).__name__) if resumes else None
        _reorder_callbacks(self)
        self._steps_per_epoch = _steps_per_epoch(args, state, kwargs["train_dataloader"])
        config = fit_config(self.config, state.max_steps / self._steps_per_epoch)
        self.pruner = PDPPruner(model, config)
        self._skipped_steps = 0
        self._has_ended = False
        if saved is not None:
            self._skipped_steps = saved["skipped_steps"]
            resume(self.pruner, _to_tensors(saved["pruner"]))
        self._forget_early_best(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget a best metric from before the end of the ramp, before progress changes."""
        self._forget_early_best(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the schedule after an optimizer step that was taken."""
        if getattr(kwargs["optimizer"], "step_was_skipped", False):
            self._skipped_steps += 1
            return
        assert self.pruner is not None
        self.pruner.step((state.global_step - self._skipped_steps) / self._steps_per_epoch)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the pruner's figures to logs of the training loss."""
        if self.pruner is None or self._has_ended:
            return
        self._forget_early_best(state)  # the log of the whole training comes before the best model
        logs = kwargs["logs"]
        if self.log and "loss" in logs:
            scalars = self.pruner.report().scalars(_PREFIX)
            # Thresholds are -inf in the warm-up, for which JSON has no number.
            finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
            logs.update(finite)
            state.log_history[-1].update(finite)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the pruned weights to zero, and remove the masks."""
        assert self.pruner is not None
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = TrainerState.load_from_json(str(Path(state.best_model_checkpoint) / _STATE_FILE))
            saved = _saved_state(best, type(self).__name__)
            self.pruner.load_state_dict(_to_tensors(saved["pruner"]), new_schedule=True)
        if self.finalize:
            self.pruner.finalize()
        self._has_ended = True

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps in trainer_state.json: the arguments, the pruner's state.

        Thresholds are strings, as JSON has no -inf. They come back bit for bit.
        """
        config = self.config.to_dict() if isinstance(self.config, PDPConfig) else self.config
        state = {
            "args": {"config": config, "log": self.log, "finalize": self.finalize},
            "attributes": {},
            "skipped_steps": self._skipped_steps,
            "pruner": None,
        }
        if self.pruner is not None and not self._has_ended:
            own = self.pruner.state_dict()
            thresholds = {name: str(value.item()) for name, value in own["thresholds"].items()}
            counts = own["prune_counts"].tolist()
            state["pruner"] = own | {"prune_counts": counts, "thresholds": thresholds}
        plain: dict[str, Any] = json.loads(json.dumps(state, default=float))  # numpy's numbers too
        return plain

    def _check_trainable(self, args: TrainingArguments, model: nn.Module, resumes: bool) -> None:
        if args.n_gpu > 1:
            raise RuntimeError(DATA_PARALLEL)
        pruned = self.pruner is not None and self._has_ended and self.pruner.model is model
        if pruned and not resumes:
            raise RuntimeError(
                "this PDPCallback has pruned this model already, and a second training would start "
                "with a dense warm-up. To train on with the zeros kept, remove the callback and "
                "call pdp_kernels.freeze_zeros with the optimizer; to go on from a checkpoint, "
                "pass resume_from_checkpoint; to prune anew, give the Trainer a new PDPCallback"
            )

    def _forget_early_best(self, state: TrainerState) -> None:
        assert self.pruner is not None
        if self.pruner.config.ramp_at(self.pruner.progress) < 1:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _steps_per_epoch(args: TrainingArguments, state: TrainerState, dataloader: Any) -> int:
    """Return the number of optimizer steps in what the Trainer counts as an epoch."""
    if not has_length(dataloader):
        return state.max_steps
    return max(1, -(-len(dataloader) // args.gradient_accumulation_steps))


def _saved_state(state: TrainerState, name: str) -> dict[str, Any]:
    """Return what this callback has left in a checkpoint's state, or raise a ValueError."""
    states: Any = state.stateful_callbacks  # a dict, in spite of its annotation
    saved = states.get(name)
    if not isinstance(saved, dict) or saved.get("pruner") is None:
        raise ValueError(
            f"the checkpoint of step {state.global_step} must have the state of one {name}, and "
            "has none: to prune a model that was trained without it, load its weights "
            "(from_pretrained) and start a new training"
        )
    return saved


def _to_tensors(saved: Mapping[str, Any]) -> dict[str, Any]:
    thresholds = {
        name: torch.tensor(float(value), dtype=torch.float64, device="cpu")
        for name, value in saved["thresholds"].items()
    }
    counts = torch.tensor(saved["prune_counts"], device="cpu")
    return {**saved, "prune_counts": counts, "thresholds": thresholds}


class _QuietConsole(TrainerCallback):
    """Takes the figures of single layers out of a log, after the reporters and before the console.

    A model has hundreds of them, and the console prints each log as one line.
    """

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs["logs"]
        for name in [name for name in logs if name.startswith(_PREFIX) and name.count("/") > 1]:
            del logs[name]


def _reorder_callbacks(callback: TrainerCallback) -> None:
    """Let a callback be called first in the events that follow, and the console last.

    Reporters such as TensorBoard's then see what it adds to the logs, and a checkpoint that another
    callback saves after a step has the pruner's state of that step. The Trainer puts its own
    callbacks first, and gives no callback a way to the list of them.
    """
    handler = _callback_handler(currentframe())
    if handler is None:
        warn_user(
            "the Trainer's list of callbacks was not found: reporters that come before "
            f"{type(callback).__name__} do not get its figures"
        )
        return
    others = [
        each
        for each in handler.callbacks
        if each is not callback and not isinstance(each, _QuietConsole)
    ]
    console = [each for each in others if isinstance(each, (PrinterCallback, ProgressCallback))]
    others = [each for each in others if each not in console]
    # A new list: the event that is under way goes on through the old one.
    handler.callbacks = [callback, *others, _QuietConsole(), *console]


def _callback_handler(frame: FrameType | None) -> CallbackHandler | None:
    """Return the list of callbacks from which one of them has been called."""
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None
