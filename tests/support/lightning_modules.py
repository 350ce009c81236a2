"""A small LightningModule, and the Trainer that the tests of PDPCallback fit it with."""

import importlib
import logging

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from pdp_kernels import PDPConfig

pl = pytest.importorskip("lightning.pytorch")
fabric = importlib.import_module("lightning.fabric")
integration = importlib.import_module("pdp_kernels.integrations.lightning")
PDPCallback = integration.PDPCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # what devices there are, tips

EPOCHS = 5
BATCHES = 4  # in an epoch
CONFIG = PDPConfig(0.75, warmup=1, ramp=2, anneal=4, reallocate=0.5)
ZEROS = 192  # of 16 * 12 + 4 * 16 weights

# Lightning warns of loggers, workers and checkpoints of other callbacks.
IGNORE = [
    pytest.mark.filterwarnings(f"ignore::{kind}:{name}")
    for kind in ("UserWarning", "FutureWarning")
    for name in ("lightning", "pytorch_lightning")
]


def batches_of(count=BATCHES):
    """Return a loader of this many batches. Their content does not matter: see `batch_at`."""
    return torch.utils.data.DataLoader(torch.zeros(count, 1), batch_size=1)


def batch_at(step):
    """Return the inputs and targets of a training step, which resuming repeats."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 12, generator=generator), torch.randn(8, 4, generator=generator)


class Regression(pl.LightningModule):
    """Two Linear layers, trained by SGD with momentum."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
        self.validated = []  # the loss of each validation

    def loss(self, step):
        inputs, targets = batch_at(step)
        outputs = self.net(inputs.to(self.net[0].weight))
        return mse_loss(outputs, targets.to(outputs))

    def training_step(self, batch, index):
        loss = self.loss(self.trainer.global_step)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, index):
        loss = self.loss(1000)
        self.validated.append(loss.item())
        # The earliest model is the best by val_epoch.
        self.log_dict({"val_loss": loss, "val_epoch": float(self.trainer.current_epoch)})

    def test_step(self, batch, index):
        self.log("test_loss", self.loss(1000))

    def predict_step(self, batch, index):
        return self.loss(1000)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def settings_of(tmp_path):
    """Return settings of a quiet Trainer on one CPU."""
    return {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
        "default_root_dir": tmp_path,
    }


def trainer_of(tmp_path, *callbacks, **settings):
    saves = any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks)
    settings = settings_of(tmp_path) | {"enable_checkpointing": saves} | settings
    return pl.Trainer(callbacks=list(callbacks), **settings)


class Ranks(fabric.plugins.environments.LightningEnvironment):
    """The processes of `tests.support.ranks`, which have started and form a group."""

    def __init__(self, rank):
        super().__init__()
        self.set_global_rank(rank)

    creates_processes_externally = True

    def local_rank(self):
        return self.global_rank()

    def world_size(self):
        return torch.distributed.get_world_size()


class Recorder(pl.Callback):
    """Records the progress of a PDPCallback after each batch."""

    def __init__(self, pruning):
        self.pruning = pruning
        self.progress = []

    def on_train_batch_end(self, *_):
        self.progress.append(self.pruning.pruner.progress)


def fit(tmp_path, module, *callbacks, config=CONFIG, ckpt_path=None, loader=None, **settings):
    """Fit a module, and return its PDPCallback and the progress after each batch."""
    pruning = PDPCallback(config)
    recorder = Recorder(pruning)
    trainer = trainer_of(tmp_path, pruning, recorder, *callbacks, **settings)
    loader = batches_of() if loader is None else loader
    validation = batches_of(1) if settings.get("limit_val_batches") else None
    trainer.fit(module, loader, validation, ckpt_path=ckpt_path)
    return pruning, recorder.progress


def assert_equal_weights(module, other):
    for (name, weight), expected in zip(
        weights_of(module).items(), weights_of(other).values(), strict=True
    ):
        assert torch.equal(weight, expected), name


def weights_of(module):
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def zeros_of(module):
    return sum(int((layer.weight == 0).sum()) for layer in (module.net[0], module.net[2]))
