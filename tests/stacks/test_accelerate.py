"""PDPPruner in the training loops of the real accelerate."""

import math
import os

import pytest
import torch
from torch.nn import functional

from pdp_kernels import PDPConfig, PDPPruner
from tests.support.models import small_model, zeros_of
from tests.support.ranks import results_on_ranks

pytest.importorskip("accelerate")

from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

EPOCHS, BATCHES, ACCUMULATION = 4, 7, 2
STEPS = math.ceil(BATCHES / ACCUMULATION)  # in an epoch; the last one takes one batch
CONFIG = PDPConfig(0.8, warmup=1, ramp=2, reallocate=0.5, relative_tau=(1.0, 0.1), anneal=3)


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps its settings for the whole process."""
    reset()
    yield
    reset()


def reset():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Training:
    """A training of a small model, as accelerate's users write it."""

    def __init__(self, accelerator=None, wrapped=False, **settings):
        settings = {"cpu": True, "gradient_accumulation_steps": ACCUMULATION} | settings
        self.accelerator = accelerator or Accelerator(**settings)
        torch.manual_seed(0)
        data = torch.utils.data.TensorDataset(torch.randn(8 * BATCHES, 16))
        loader = torch.utils.data.DataLoader(data, batch_size=8)
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
        prepared = self.accelerator.prepare(model, optimizer, loader, scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = prepared
        self.plain = self.accelerator.unwrap_model(self.model)
        self.pruner = PDPPruner(self.model if wrapped else self.plain, CONFIG)
        self.accelerator.register_for_checkpointing(self.pruner)
        self.progress = []

    def run(self, batches, start=0, attached=True):
        """Train this many batches from the batch with number start."""
        handle = self.pruner.attach(self.optimizer, STEPS) if attached else None
        for number in range(start, start + batches):
            if number == start or number % BATCHES == 0:
                batches_left = iter(skip_first_batches(self.loader, number % BATCHES))
            (inputs,) = next(batches_left)
            with self.accelerator.accumulate(self.model):
                loss = functional.mse_loss(self.model(inputs), inputs[:, :8])
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            if not attached and self.accelerator.sync_gradients:
                epoch, batch = divmod(number, BATCHES)
                self.pruner.step(epoch + (batch // ACCUMULATION + 1) / STEPS)
            self.progress.append(self.pruner.progress)
        if handle is not None:
            handle.remove()

    def values(self):
        """Everything that resuming must bring back."""
        state = self.pruner.state_dict()
        copy = self.pruner.pruned_copy()
        weights = {name: value.clone() for name, value in self.plain.state_dict().items()}
        return {
            **weights,
            **{f"threshold of {name}": value for name, value in state["thresholds"].items()},
            **{f"pruned {name}": value for name, value in copy.state_dict().items()},
            "counts": state["prune_counts"],
            "progress": torch.tensor(state["progress"], dtype=torch.float64),
        }


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("attached", [True, False], ids=["attached", "sync_gradients"])
def test_batches_that_only_accumulate_do_not_count(attached):
    training = Training()
    training.run(EPOCHS * BATCHES, attached=attached)
    steps = [
        epoch * STEPS + (batch + 1) // ACCUMULATION + (batch == BATCHES - 1)
        for epoch in range(EPOCHS)
        for batch in range(BATCHES)
    ]
    assert training.progress == [step / STEPS for step in steps]
    assert training.progress[-1] == EPOCHS


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("batches", [4, 16, 25], ids=["in the warm-up", "in the ramp", "after it"])
def test_load_state_goes_on_bit_for_bit(batches, precision, tmp_path):
    whole = Training(mixed_precision=precision)
    whole.run(batches)
    whole.accelerator.save_state(str(tmp_path))
    saved = whole.values()
    whole.run(EPOCHS * BATCHES - batches, start=batches)

    reset()
    resumed = Training(mixed_precision=precision)
    resumed.accelerator.load_state(str(tmp_path))
    assert_equal(resumed.values(), saved)
    resumed.run(EPOCHS * BATCHES - batches, start=batches)
    assert_equal(resumed.values(), whole.values())
    for training in (whole, resumed):
        training.pruner.finalize()
    assert_equal(resumed.plain.state_dict(), whole.plain.state_dict())


def test_mixed_precision_computes_in_bfloat16_with_weights_in_float32():
    training = Training(mixed_precision="bf16")
    dtypes = []
    training.plain[2].register_forward_hook(lambda *args: dtypes.append(args[-1].dtype))
    training.run(2)
    assert set(dtypes) == {torch.bfloat16}
    assert training.plain[2].weight.dtype == torch.float32


def test_steps_that_the_scaler_skips_do_not_count():
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1e20)
    training = Training(accelerator)
    scale = training.accelerator.backward
    count = iter(range(100))

    def backward(loss):
        scale(loss * (1e30 if next(count) in (0, 3) else 1.0))

    training.accelerator.backward = backward
    training.run(6)
    assert training.progress == [count / STEPS for count in (0, 1, 2, 2, 3, 4)]


def test_save_model_has_exact_zeros_after_finalize_and_dense_weights_before(tmp_path):
    training = Training()
    training.run(EPOCHS * BATCHES)
    training.accelerator.save_model(training.model, str(tmp_path / "dense"))
    training.pruner.finalize()
    training.accelerator.save_model(training.model, str(tmp_path / "pruned"))
    dense, pruned = (
        load_file(tmp_path / name / "model.safetensors") for name in ("dense", "pruned")
    )
    plain = small_model()
    plain.load_state_dict(dense)
    assert zeros_of(plain) == [0, 0]
    plain.load_state_dict(pruned)
    assert sum(zeros_of(plain)) == round(0.8 * (16 * 32 + 32 * 8))


def test_a_compiled_model_is_pruned_before_and_after_it_is_unwrapped():
    results = []
    for wrapped in (True, False):
        torch._dynamo.reset()
        training = Training(dynamo_backend="eager", wrapped=wrapped)
        assert type(training.model).__name__ == "OptimizedModule"
        training.run(EPOCHS * BATCHES)
        training.pruner.finalize()
        results.append(training.plain.state_dict())
        reset()
    assert_equal(*results)
    assert sum(zeros_of(training.plain)) == round(0.8 * (16 * 32 + 32 * 8))


def train_on_rank(rank, folder):
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        training = Training(gradient_accumulation_steps=1)
        assert type(training.model).__name__ == "DistributedDataParallel"
        steps = math.ceil(BATCHES / 2)
        for epoch in range(EPOCHS):
            for index, (inputs,) in enumerate(training.loader):
                loss = functional.mse_loss(training.model(inputs), inputs[:, :8])
                training.accelerator.backward(loss)
                training.optimizer.step()
                training.optimizer.zero_grad()
                training.pruner.step(epoch + (index + 1) / steps)
            if epoch == 1:
                training.accelerator.save_state(folder)
        reset()
        resumed = Training(gradient_accumulation_steps=1)
        resumed.accelerator.load_state(folder)
        progress = resumed.pruner.progress
        training.pruner.verify_replicas()
        training.pruner.finalize()
        return progress, training.plain.state_dict()
    finally:
        for name in environment:
            del os.environ[name]
        reset()


def test_ranks_of_a_data_parallel_training_prune_the_same(tmp_path):
    (progress, one), (_, other) = results_on_ranks(train_on_rank, 2, str(tmp_path))
    assert progress == 2
    assert_equal(one, other)
    model = small_model()
    model.load_state_dict(one)
    assert sum(zeros_of(model)) == round(0.8 * (16 * 32 + 32 * 8))
