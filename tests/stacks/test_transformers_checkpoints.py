"""Checkpoints of PDPCallback in the real Trainer: resuming, the best model, early stopping."""

import warnings

import pytest
import torch

from tests.support.trainer import (
    BATCHES,
    CONFIG,
    EPOCHS,
    Recorder,
    assert_equal_states,
    bert,
    expected_zeros,
    new_trainer,
    targets,
    zeros,
)

pytest.importorskip("transformers")

from transformers import (
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
)

from pdp_kernels import PDPConfig
from pdp_kernels.integrations.transformers import PDPCallback


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A whole training with a checkpoint after each epoch, before the zeros are set."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    callback = PDPCallback(CONFIG, finalize=False)
    trainer = new_trainer(folder, callback, save_strategy="epoch", gradient_accumulation_steps=2)
    trainer.train()
    return folder, callback, trainer


@pytest.mark.parametrize(
    "step", [2, 6, 14, 16], ids=["in the warm-up", "in the ramp", "after the ramp", "at the end"]
)
def test_a_resumed_training_is_bitwise_that_of_one_piece(uninterrupted, step, tmp_path):
    folder, whole, trainer = uninterrupted
    callback = PDPCallback(CONFIG, finalize=False)
    resumed = new_trainer(tmp_path, callback, model=bert(), gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))

    assert_equal_states(resumed.model.state_dict(), trainer.model.state_dict())
    assert callback.pruner.progress == whole.pruner.progress == EPOCHS
    assert callback.pruner.prune_counts == whole.pruner.prune_counts
    thresholds = (each.pruner.state_dict()["thresholds"] for each in (callback, whole))
    assert_equal_states(*thresholds)
    copies = (each.pruner.pruned_copy() for each in (callback, whole))
    assert_equal_states(*(copy.state_dict() for copy in copies))
    callback.pruner.finalize()
    assert zeros(resumed.model, targets(callback)) == expected_zeros(callback)


def test_a_resumed_log_goes_on_as_that_of_one_piece(uninterrupted, tmp_path):
    folder, _, trainer = uninterrupted
    resumed = new_trainer(tmp_path, PDPCallback(CONFIG), gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    for one, other in zip(resumed.state.log_history, trainer.state.log_history, strict=True):
        common = {name for name in one if name.startswith("pdp/")} - {"pdp/flipped"}
        assert {name: one[name] for name in common} == {name: other[name] for name in common}


class FailsOnce(Trainer):
    """Raises an error in the batch after the seventh optimizer step, the first time."""

    error = None

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 7 and self.error is not None:
            error, self.error = self.error, None
            raise error
        return super().training_step(*args, **kwargs)


def test_an_interrupted_training_resumes_in_the_same_process(uninterrupted, tmp_path):
    _, _, whole = uninterrupted
    callback = PDPCallback(CONFIG, finalize=False)
    arguments = {"save_strategy": "epoch", "gradient_accumulation_steps": 2}
    trainer = new_trainer(tmp_path, callback, trainer_class=FailsOnce, **arguments)
    trainer.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert_equal_states(trainer.model.state_dict(), whole.model.state_dict())


def test_a_training_that_starts_again_with_smaller_batches_is_pruned_from_the_start(tmp_path):
    callback = PDPCallback(CONFIG)
    progress = []
    recorder = Recorder("on_step_end", lambda state, **_: progress.append(callback.pruner.progress))
    trainer = new_trainer(
        tmp_path, callback, recorder, trainer_class=FailsOnce, auto_find_batch_size=True
    )
    trainer.error = RuntimeError("CUDA out of memory.")
    trainer.train()
    batches = (len(progress) - 7) // EPOCHS
    assert batches > BATCHES
    assert progress[7:] == [(step + 1) / batches for step in range(EPOCHS * batches)]
    assert zeros(trainer.model, targets(callback)) == expected_zeros(callback)


class BestEarly:
    """A metric that gets worse with each evaluation."""

    def __init__(self):
        self.evaluations = 0

    def __call__(self, _):
        self.evaluations += 1
        return {"score": -self.evaluations}


BEST = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize(("ramp", "best_epoch"), [(0, 1), (4, 5)])
def test_the_best_model_is_one_from_after_the_ramp(tmp_path, ramp, best_epoch, limit):
    callback = PDPCallback(PDPConfig(0.8, warmup=min(ramp, 1), ramp=max(0, ramp - 0.5)))
    trainer = new_trainer(
        tmp_path, callback, compute_metrics=BestEarly(), **BEST, save_total_limit=limit
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
    best = tmp_path / f"checkpoint-{best_epoch * BATCHES}"
    assert trainer.state.best_model_checkpoint == str(best)
    if limit is not None:
        assert list(tmp_path.glob("checkpoint-*")) == [best]
    dense = BertForSequenceClassification.from_pretrained(best)
    kept = {name: weight != 0 for name, weight in targets(callback).items()}
    assert zeros(trainer.model, kept) == expected_zeros(callback)
    for name, weight in dense.named_parameters():
        pruned = weight * kept[name] if name in kept else weight
        assert torch.equal(trainer.model.get_parameter(name), pruned)


def test_without_an_evaluation_after_the_ramp_the_last_model_stays(tmp_path):
    callback = PDPCallback(PDPConfig(0.8, warmup=1, ramp=40))
    trainer = new_trainer(
        tmp_path, callback, compute_metrics=BestEarly(), **BEST, num_train_epochs=2
    )
    with (
        pytest.warns(UserWarning, match="a training of 2 epochs ends before the ramp does, at 41"),
        pytest.warns(UserWarning, match="finalize was called at progress 2 with 7%"),
    ):
        trainer.train()
    assert trainer.state.best_model_checkpoint is None
    last = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6")
    assert torch.equal(trainer.model.classifier.bias, last.classifier.bias)
    assert zeros(trainer.model, targets(callback)) == expected_zeros(callback)


def test_an_early_best_is_forgotten_when_a_training_resumes(tmp_path):
    arguments = BEST | {"num_train_epochs": 6}
    new_trainer(tmp_path, PDPCallback(CONFIG), compute_metrics=BestEarly(), **arguments).train()
    resumed = new_trainer(tmp_path, PDPCallback(CONFIG), compute_metrics=BestEarly(), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.state.best_global_step == 5 * BATCHES


def test_early_stopping_waits_for_the_end_of_the_ramp(tmp_path):
    callback = PDPCallback(CONFIG)
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = new_trainer(tmp_path, callback, stopping, compute_metrics=BestEarly(), **BEST)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
    assert trainer.state.global_step == 7 * BATCHES  # best at 5, no better at 6 and 7
    assert trainer.state.best_global_step == 5 * BATCHES
    assert zeros(trainer.model, targets(callback)) == expected_zeros(callback)


def test_a_training_is_extended_with_a_new_schedule(tmp_path):
    callback = PDPCallback(0.8)
    trainer = new_trainer(tmp_path, callback, save_strategy="epoch", num_train_epochs=4)
    trainer.train()
    trainer.args.num_train_epochs = 8
    with pytest.warns(
        UserWarning, match=r"from progress 4 with another schedule.*ramp 1\.6 -> 3\.2"
    ):
        trainer.train(resume_from_checkpoint=True)
    assert [log for log in trainer.state.log_history if "loss" in log][-1]["pdp/progress"] == 8
    assert zeros(trainer.model, targets(callback)) == expected_zeros(callback)


def test_a_checkpoint_of_a_training_without_the_callback_raises(tmp_path):
    new_trainer(tmp_path, TrainerCallback(), save_strategy="epoch", num_train_epochs=1).train()
    trainer = new_trainer(tmp_path, PDPCallback(0.8))
    with pytest.raises(ValueError, match=r"step 3 must have the state of one PDPCallback.*and has"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_sparsity_raises(tmp_path):
    new_trainer(tmp_path, PDPCallback(0.8), save_strategy="epoch", num_train_epochs=2).train()
    trainer = new_trainer(tmp_path, PDPCallback(0.7), num_train_epochs=2)
    with pytest.raises(ValueError, match=r"configuration with sparsity = 0\.7, got 0\.8"):
        trainer.train(resume_from_checkpoint=True)


def test_the_trainer_may_restore_the_callback_itself(uninterrupted, tmp_path):
    folder, whole, trainer = uninterrupted
    resumed = new_trainer(
        tmp_path,
        PDPCallback(0.5),
        gradient_accumulation_steps=2,
        restore_callback_states_from_checkpoint=True,
    )
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    (callback,) = [
        each for each in resumed.callback_handler.callbacks if isinstance(each, PDPCallback)
    ]
    assert (callback.config.to_dict(), callback.finalize) == (CONFIG.to_dict(), False)
    assert_equal_states(resumed.model.state_dict(), trainer.model.state_dict())
    assert callback.pruner.prune_counts == whole.pruner.prune_counts
