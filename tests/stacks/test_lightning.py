"""PDPCallback in Lightning's Trainer prunes as a loop by hand does, and resumes bit for bit."""

import logging
import math
import runpy
import sys
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from pdp_kernels import PDPConfig, PDPPruner
from tests.support.lightning_modules import (
    BATCHES,
    CONFIG,
    EPOCHS,
    IGNORE,
    ZEROS,
    PDPCallback,
    Recorder,
    Regression,
    assert_equal_weights,
    batch_at,
    batches_of,
    fit,
    integration,
    pl,
    settings_of,
    trainer_of,
    weights_of,
    zeros_of,
)

pytestmark = IGNORE


def test_the_program_of_the_docstring_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = integration.__doc__.partition("::\n")[2].partition("\nCheckpoints that")[0]
    names = {}
    exec("\n".join(line.removeprefix("    ") for line in program.splitlines()), names)
    pruned = names["Classifier"]()
    pruned.load_state_dict(torch.load("pruned.ckpt", weights_only=True)["state_dict"])
    total = 64 * 256 + 256 * 10
    for module in (pruned, names["model"]):
        zeros = sum(int((layer.weight == 0).sum()) for layer in (module.net[0], module.net[2]))
        assert zeros == round(0.9 * total)


def test_a_module_is_pruned_as_in_a_loop_by_hand(tmp_path):
    module, by_hand = Regression(), Regression()
    fit(tmp_path, module)
    optimizer = by_hand.configure_optimizers()
    pruner = PDPPruner(by_hand, CONFIG)
    for step in range(EPOCHS * BATCHES):
        by_hand.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(step // BATCHES + (step % BATCHES + 1) / BATCHES)
    pruner.finalize()
    assert_equal_weights(module, by_hand)
    assert zeros_of(module) == ZEROS
    assert {type(layer) for layer in module.net} == {nn.Linear, nn.Tanh}


class Unsized(torch.utils.data.IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(torch.zeros(self.batches, 1))


class Manual(Regression):
    """Two optimizers, one for each layer, which step after every second batch."""

    automatic_optimization = False

    def __init__(self, wrapped):
        super().__init__()
        self.automatic_optimization = False
        self.wrapped = wrapped

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]

    def training_step(self, batch, index):
        self.manual_backward(self.loss(index))
        if index % 2:
            for optimizer in self.optimizers(use_pl_optimizer=self.wrapped):
                optimizer.step()
                optimizer.zero_grad()


QUARTERS = [step / 4 for step in range(1, 9)]


@pytest.mark.parametrize(
    ("settings", "config", "progress", "length"),
    [
        ({"max_epochs": 2}, 0.75, QUARTERS, 2),
        ({"max_steps": 8}, 0.75, QUARTERS, 2),
        ({"max_steps": 6, "max_epochs": 4}, 0.75, QUARTERS[:6], 1.5),
        ({"max_steps": 3, "accumulate_grad_batches": 2}, 0.75, [0, 0.5, 0.5, 1, 1, 1.5], 1.5),
        # Five batches in an epoch: the last step of an epoch accumulates one.
        (
            {"max_steps": 4, "accumulate_grad_batches": 2, "batches": 5},
            0.75,
            [0, 0.4, 0.4, 0.8, 1.0, 1.0, 1.4],
            1.4,
        ),
        ({"limit_train_batches": 2, "max_epochs": 2}, 0.75, [0.5, 1, 1.5, 2], 2),
        ({"unsized": 4, "max_steps": 8}, 0.75, [step / 8 for step in range(1, 9)], 1),
        ({"unsized": 2, "max_epochs": 3}, 0.75, [0, 0, 1, 1, 2, 2], 3),
    ],
    ids=str,
)
def test_progress_is_in_epochs_and_a_sparsity_fits_the_length(
    tmp_path, settings, config, progress, length
):
    settings = dict(settings)
    loader = batches_of(settings.pop("batches", BATCHES))
    if "unsized" in settings:
        loader = torch.utils.data.DataLoader(Unsized(settings.pop("unsized")))
    settings.setdefault("max_epochs", -1)
    module = Regression()
    pruning, found = fit(tmp_path, module, config=config, loader=loader, **settings)
    assert found == progress
    assert pruning.pruner.config == PDPConfig.for_epochs(config, length)
    assert zeros_of(module) == ZEROS


@pytest.mark.parametrize("wrapped", [True, False])
def test_manual_optimization_with_several_optimizers(tmp_path, wrapped):
    module = Manual(wrapped)
    _, progress = fit(tmp_path, module, config=0.75, max_epochs=2)
    assert progress == QUARTERS
    assert zeros_of(module) == ZEROS


@pytest.mark.parametrize(
    ("module", "settings"),
    [(Regression(), {"max_epochs": -1}), (Manual(True), {"max_epochs": -1, "max_steps": 8})],
)
def test_a_sparsity_needs_a_known_length(tmp_path, module, settings):
    with pytest.raises(ValueError, match=r"whose length is not known, got 0\.75"):
        fit(tmp_path, module, config=0.75, **settings)


def test_a_training_shorter_than_the_ramp_warns(tmp_path):
    with pytest.warns(UserWarning, match="a training of 2 epochs ends before the ramp does, at 3"):
        fit(tmp_path, Regression(), max_epochs=2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("0.9",), TypeError, "config must be a PDPConfig"),
        ((1.5,), ValueError, "1.5"),
        (({"sparsities": 0.9},), ValueError, "sparsities"),
        ((0.9, {"log": 1}), TypeError, "log must be a bool, got int"),
        ((0.9, {"finalize": None}), TypeError, "finalize must be a bool, got NoneType"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    config, *keywords = arguments
    with pytest.raises(error, match=message):
        PDPCallback(config, **(keywords[0] if keywords else {}))


class Every(pl.callbacks.ModelCheckpoint):
    """Saves after each training step."""

    def __init__(self, folder):
        super().__init__(folder, "{step}", every_n_train_steps=1, save_top_k=-1)


class EveryEpoch(pl.callbacks.ModelCheckpoint):
    def __init__(self, folder, after_training):
        super().__init__(folder, "{step}", save_top_k=-1, save_on_train_epoch_end=after_training)
        self.after_training = after_training

    @property
    def state_key(self):
        return f"EveryEpoch: {self.after_training}"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A training with a checkpoint after each step, each training epoch and each validation."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    module = Regression()
    savers = [Every(folder / "steps"), EveryEpoch(folder / "epochs", True)]
    savers.append(EveryEpoch(folder / "validations", False))
    pruning, progress = fit(folder, module, *savers, limit_val_batches=1)
    return folder, module, pruning, progress


# Of 20 steps; the warm-up ends after 4, the ramp after 12.
@pytest.mark.parametrize(
    "name",
    [f"steps/step={step}" for step in (1, 4, 6, 12, 17, 20)]
    + [f"{kind}/step={step}" for kind in ("epochs", "validations") for step in (4, 8, 16, 20)],
)
def test_a_resumed_training_ends_bit_for_bit(tmp_path, uninterrupted, name):
    folder, module, pruning, progress = uninterrupted
    step = int(name.partition("=")[2])
    resumed = Regression(seed=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(pruning|sparsity|ramp)")
        again, rest = fit(tmp_path, resumed, ckpt_path=folder / f"{name}.ckpt", limit_val_batches=1)
    assert rest == progress[step:]
    assert_equal_weights(resumed, module)
    assert zeros_of(resumed) == ZEROS
    assert again.pruner.prune_counts == pruning.pruner.prune_counts
    assert again.pruner.state_dict()["thresholds"] == pruning.pruner.state_dict()["thresholds"]


def test_a_training_may_be_extended(tmp_path, uninterrupted):
    folder = uninterrupted[0]
    module = Regression(seed=1)
    with pytest.warns(UserWarning, match=r"goes on from progress 5 .* ramp 2 -> 4"):
        _, progress = fit(
            tmp_path,
            module,
            config=PDPConfig(0.75, warmup=1, ramp=4, anneal=4, reallocate=0.5),
            ckpt_path=folder / "epochs" / "step=20.ckpt",
            max_epochs=6,
        )
    assert progress == [5.25, 5.5, 5.75, 6]
    assert zeros_of(module) == ZEROS


def test_a_checkpoint_of_another_sparsity_is_refused(tmp_path, uninterrupted):
    with pytest.raises(ValueError, match=r"sparsity = 0\.5, got 0\.75"):
        fit(
            tmp_path,
            Regression(),
            config=PDPConfig(0.5, warmup=1, ramp=2),
            ckpt_path=uninterrupted[0] / "steps" / "step=6.ckpt",
        )


def test_pruning_from_a_dense_checkpoint_on_warns(tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, "dense")
    trainer_of(tmp_path, saver, max_epochs=2).fit(Regression(), batches_of())
    with pytest.warns(UserWarning, match="starts at epoch 2 with 88% of the sparsity at once"):
        _, progress = fit(tmp_path, Regression(), ckpt_path=tmp_path / "dense.ckpt")
    assert progress[0] == 2.25


@pytest.mark.parametrize("log", [True, False])
def test_loggers_get_the_scalars_of_the_report(tmp_path, log):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [
        pl.loggers.CSVLogger(tmp_path, "csv"),
        pl.loggers.TensorBoardLogger(tmp_path, "board"),
    ]
    pruning = PDPCallback(CONFIG, log=log)
    trainer = trainer_of(tmp_path, pruning, max_epochs=3, logger=loggers, log_every_n_steps=1)
    trainer.fit(Regression(), batches_of())
    events = EventAccumulator(loggers[1].log_dir).Reload()
    table = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert ("pdp/sparsity/net.0.weight" in table) == log
    assert ("pdp/sparsity" in events.Tags()["scalars"]) == log
    if log:
        sparsities = [event.value for event in events.Scalars("pdp/sparsity")]
        assert sparsities == pytest.approx([0, 0.875 * 0.75, 0.75], abs=1 / 256)
        assert [event.value for event in events.Scalars("pdp/progress")] == [1, 2, 3]


def test_a_dev_run_leaves_a_model_that_can_be_trained(tmp_path):
    module = Regression()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(pruning|sparsity|ramp)")
        fit(tmp_path, module, fast_dev_run=True)
    assert zeros_of(module) == 0
    other = Regression()
    other.load_state_dict(module.state_dict())
    for each in (module, other):
        fit(tmp_path, each)
    assert zeros_of(module) == ZEROS
    assert_equal_weights(module, other)


def test_fit_again_goes_on_where_the_trainer_does(tmp_path, uninterrupted):
    module = Regression()
    pruning = PDPCallback(CONFIG, finalize=False)
    recorder = Recorder(pruning)
    trainer = trainer_of(tmp_path, pruning, recorder, max_epochs=2)
    with pytest.warns(UserWarning, match="ends before the ramp"):
        trainer.fit(module, batches_of())
    first = pruning.pruner
    trainer.fit(module, batches_of())  # nothing is left to train
    assert pruning.pruner is first
    trainer.fit_loop.max_epochs = EPOCHS
    trainer.fit(module, batches_of())
    assert recorder.progress == uninterrupted[3]
    pruning.pruner.finalize()
    assert zeros_of(module) == ZEROS


def test_the_state_outside_of_fit_is_plain(tmp_path):
    module = Regression()
    pruning = PDPCallback(CONFIG)
    trainer = trainer_of(tmp_path, pruning, limit_val_batches=1)
    trainer.validate(module, batches_of(1), verbose=False)
    assert pruning.pruner is None
    assert pruning.state_dict() == {}
    assert {type(layer) for layer in module.net} == {nn.Linear, nn.Tanh}


class Late(Regression):
    """A module that makes its layers in configure_model."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Regression().net


def test_layers_of_configure_model_are_pruned(tmp_path, uninterrupted):
    module = Late()
    fit(tmp_path, module)
    assert_equal_weights(module, uninterrupted[1])


class OnBatches(Regression):
    """A module that trains on its batches, and so is one graph."""

    def training_step(self, batch, index):
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.net(batch[0])


def test_a_compiled_module_is_pruned(tmp_path):
    steps = (batch_at(step) for step in range(BATCHES))
    tensors = (torch.cat(each) for each in zip(*steps, strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tensors), batch_size=8)
    module, eager = OnBatches(), OnBatches()
    graphs = CompileCounter()
    for each in (torch.compile(module, backend=graphs), eager):
        trainer = trainer_of(tmp_path, PDPCallback(CONFIG), limit_val_batches=1)
        trainer.fit(each, loader, loader)
    # The training, the validation, and before it that of the module without masks.
    assert graphs.frame_count == 3
    assert_equal_weights(module, eager)
    assert zeros_of(module) == ZEROS


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions_and_clipped_gradients(tmp_path, precision):
    module = Regression()
    fit(tmp_path, module, precision=precision, gradient_clip_val=0.5)
    assert zeros_of(module) == ZEROS


def test_steps_that_a_scaler_skips_leave_the_weights_and_the_schedule_goes_on(tmp_path):
    class Overflow(pl.Callback):
        skipped = 0

        def on_train_batch_start(self, trainer, module, *_):
            self.before = module.net[0].weight.detach().clone()

        def on_train_batch_end(self, trainer, module, *_):
            self.skipped += torch.equal(self.before, module.net[0].weight)

    module = Regression()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    overflow = Overflow()
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    _, progress = fit(tmp_path, module, overflow, plugins=plugin)
    assert 0 < overflow.skipped < 5
    assert progress == [step / 4 for step in range(1, 21)]
    assert zeros_of(module) == ZEROS
    assert all(math.isfinite(w.sum()) for w in weights_of(module).values())


def test_where_lightning_is_not_installed_pytorch_lightning_does(tmp_path, monkeypatch):
    import pytorch_lightning

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    names = runpy.run_path(integration.__file__)
    callback = names["PDPCallback"](CONFIG)
    assert isinstance(callback, pytorch_lightning.Callback)
    assert not isinstance(callback, pl.Callback)

    class Module(pytorch_lightning.LightningModule):
        loss, training_step = Regression.loss, Regression.training_step
        configure_optimizers = Regression.configure_optimizers

        def __init__(self):
            super().__init__()
            self.net = Regression().net

    module = Module()
    trainer = pytorch_lightning.Trainer(callbacks=callback, **settings_of(tmp_path))
    trainer.fit(module, batches_of())
    assert zeros_of(module) == ZEROS
