"""Checkpoints of trainings with Lightning's PDPCallback: the best ones, averages, evaluation."""

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig
from tests.support.lightning_modules import (
    BATCHES,
    CONFIG,
    EPOCHS,
    IGNORE,
    ZEROS,
    PDPCallback,
    Regression,
    assert_equal_weights,
    batch_at,
    batches_of,
    fit,
    pl,
    trainer_of,
    weights_of,
    zeros_of,
)

ModelCheckpoint = pl.callbacks.ModelCheckpoint
LOSSES = {"validate": "val_loss", "test": "test_loss"}

pytestmark = IGNORE


def test_checkpoints_of_a_training_hold_dense_weights_and_one_after_it_the_zeros(tmp_path):
    module = Regression()
    last = ModelCheckpoint(tmp_path, save_last=True)
    pruning = PDPCallback(CONFIG)
    trainer = trainer_of(tmp_path, pruning, last, max_epochs=EPOCHS)
    trainer.fit(module, batches_of())
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    dense, pruned = Regression(seed=1), Regression(seed=1)
    for model, name in ((dense, "last.ckpt"), (pruned, "pruned.ckpt")):
        state = torch.load(tmp_path / name, weights_only=True)["state_dict"]
        assert state.keys() == Regression().state_dict().keys()
        model.load_state_dict(state)
    assert zeros_of(dense) == 0
    assert_equal_weights(pruned, module)
    assert_equal_weights(
        PDPCallback.load_pruned(Regression(seed=1), tmp_path / "last.ckpt"), module
    )
    assert_equal_weights(
        PDPCallback.load_pruned(Regression(seed=1), tmp_path / "pruned.ckpt"), module
    )
    evaluated = Regression(seed=1)
    trainer_of(tmp_path, PDPCallback(0.1), limit_val_batches=1).validate(
        evaluated, batches_of(1), ckpt_path=tmp_path / "pruned.ckpt", verbose=False
    )
    assert_equal_weights(evaluated, module)


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """A training whose metric is best at first, its saver, and the loss in each validation."""
    folder = tmp_path_factory.mktemp("best")
    module = Regression()
    saver = ModelCheckpoint(folder / "best", "{epoch}", monitor="val_epoch", save_top_k=2)
    early = ModelCheckpoint(folder / "all", "{epoch}", save_top_k=-1)
    fit(folder, module, saver, early, limit_val_batches=1, num_sanity_val_steps=0)
    return folder, saver, module.validated


def test_no_checkpoint_from_before_the_end_of_the_ramp_is_the_best(best):
    folder, saver, _ = best
    # Validations 0 and 1 are at the end of epochs 1 and 2, the ramp ends with the third.
    assert saver.best_model_path.endswith("epoch=2.ckpt")
    assert sorted(path.name for path in (folder / "best").iterdir()) == [
        "epoch=2.ckpt",
        "epoch=3.ckpt",
    ]


def test_a_resumed_training_keeps_the_best_checkpoint_of_after_the_ramp(tmp_path, best):
    folder, saver, _ = best
    again = ModelCheckpoint(folder / "best", "{epoch}", monitor="val_epoch", save_top_k=2)
    fit(
        tmp_path,
        Regression(seed=1),
        again,
        ckpt_path=folder / "all" / "epoch=3.ckpt",
        limit_val_batches=1,
    )
    assert again.best_model_path == saver.best_model_path
    assert again.best_model_score == 2


@pytest.mark.parametrize("function", ["validate", "test", "predict"])
@pytest.mark.parametrize("finalize", [True, False])
def test_the_best_checkpoint_is_evaluated_with_its_masks(tmp_path, best, function, finalize):
    _, saver, validated = best
    module = Regression(seed=1)
    trainer = trainer_of(tmp_path, PDPCallback(CONFIG, finalize=finalize), limit_val_batches=1)
    keywords = {} if function == "predict" else {"verbose": False}
    result = getattr(trainer, function)(
        module, batches_of(1), ckpt_path=saver.best_model_path, **keywords
    )
    loss = result[0] if function == "predict" else result[0][LOSSES[function]]
    assert float(loss) == validated[2]
    assert zeros_of(module) == (ZEROS if finalize else 0)
    pruned = PDPCallback.load_pruned(Regression(seed=1), saver.best_model_path).eval()
    assert pruned.loss(1000).item() == validated[2]
    assert zeros_of(pruned) == ZEROS


def test_a_checkpoint_from_before_the_end_of_the_ramp_is_evaluated_as_it_was(tmp_path, best):
    folder, _, validated = best
    path = folder / "all" / "epoch=1.ckpt"
    module = Regression(seed=1)
    pruning = PDPCallback(CONFIG)
    trainer = trainer_of(tmp_path, pruning, limit_val_batches=1)
    with pytest.warns(UserWarning, match="before the end of the ramp: it is evaluated with 88%"):
        result = trainer.validate(module, batches_of(1), ckpt_path=path, verbose=False)
    assert result[0]["val_loss"] == validated[1]
    with pytest.warns(UserWarning, match="progress 2 with 88% of the sparsity reached"):
        pruned = PDPCallback.load_pruned(Regression(seed=1), path)
    assert zeros_of(pruned) == ZEROS


def test_weights_alone_are_evaluated_with_a_warning_and_not_pruned(tmp_path):
    saver = ModelCheckpoint(tmp_path, "weights", save_weights_only=True)
    fit(tmp_path, Regression(), saver)
    module = Regression(seed=1)
    trainer = trainer_of(tmp_path, PDPCallback(CONFIG), limit_val_batches=1)
    with pytest.warns(UserWarning, match="weights.ckpt are evaluated as they are"):
        trainer.validate(module, batches_of(1), ckpt_path=tmp_path / "weights.ckpt", verbose=False)
    before = weights_of(module)
    with pytest.raises(ValueError, match="checkpoint must have the state of PDPCallback"):
        PDPCallback.load_pruned(module, tmp_path / "weights.ckpt")
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(module).items())


def test_without_finalize_the_masks_stay(tmp_path):
    module = Regression()
    pruning = PDPCallback(CONFIG, finalize=False)
    trainer = trainer_of(tmp_path, pruning, max_epochs=EPOCHS, limit_val_batches=1)
    trainer.fit(module, batches_of(), batches_of(1))
    assert zeros_of(module) == 0
    trainer.validate(module, batches_of(1), verbose=False)
    assert module.validated[-1] == module.validated[-2]
    pruning.pruner.finalize()
    assert zeros_of(module) == ZEROS


def test_early_stopping_counts_from_the_end_of_the_ramp(tmp_path):
    module = Regression()
    stopping = pl.callbacks.EarlyStopping("val_epoch", patience=1)
    fit(tmp_path, module, stopping, max_epochs=20, limit_val_batches=1)
    # The third epoch ends with the ramp; the fourth is worse.
    assert stopping.stopped_epoch == 3
    assert stopping.best_score == 2
    assert zeros_of(module) == ZEROS


def test_a_training_that_stops_before_the_end_of_the_ramp_warns(tmp_path):
    module = Regression()
    stopping = pl.callbacks.EarlyStopping("val_epoch", stopping_threshold=2)
    with pytest.warns(UserWarning, match="progress 1 with 0% of the sparsity reached"):
        fit(tmp_path, module, stopping, limit_val_batches=1)
    assert zeros_of(module) == ZEROS


def test_an_average_of_weights_is_validated_and_pruned_by_its_own_weights(tmp_path):
    module = Regression()
    average = pl.callbacks.EMAWeightAveraging(decay=0.8)
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(tmp_path, module, average, saver, limit_val_batches=1)
    assert zeros_of(module) == ZEROS
    module.eval()
    assert module.loss(1000).item() == module.validated[-1]
    last = PDPCallback.load_pruned(Regression(seed=1), tmp_path / "epoch=4.ckpt")
    assert_equal_weights(last, module)
    resumed = Regression(seed=1)
    again = pl.callbacks.EMAWeightAveraging(decay=0.8)
    path = tmp_path / "epoch=1.ckpt"
    fit(tmp_path / "resumed", resumed, again, limit_val_batches=1, ckpt_path=path)
    assert_equal_weights(resumed, module)


class Normalized(Regression):
    def __init__(self):
        super().__init__()
        self.net[1] = nn.BatchNorm1d(16)


class Norms(pl.Callback):
    """Compares a norm's mean, after the first batch of its own epoch, with the pruned weights."""

    difference = None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == EPOCHS and batch_idx == 0:
            layer, norm = module.net[:2]
            layer.eval()
            pruned = layer(batch_at(EPOCHS * BATCHES)[0]).mean(0)
            layer.train()
            self.difference = float((norm.running_mean - pruned).abs().max().detach())


def test_stochastic_weight_averaging_gets_its_zeros_and_norms_of_the_pruned_average(tmp_path):
    module, norms = Normalized(), Norms()
    averaging = pl.callbacks.StochasticWeightAveraging(0.1, swa_epoch_start=3, annealing_epochs=1)
    pruning, progress = fit(tmp_path, module, averaging, norms, config=0.75)
    assert pruning.pruner.config == PDPConfig.for_epochs(0.75, EPOCHS)
    assert progress[EPOCHS * BATCHES - 1] == EPOCHS
    assert zeros_of(module) == ZEROS
    assert norms.difference < 0.01
