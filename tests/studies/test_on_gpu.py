"""Every method trains, resumes and is scored on a GPU, and its steps do not wait for it."""

import pytest
import torch
from torch import nn

from studies import train_image
from studies.command_line import budget_of
from studies.data import Images, split_text
from studies.methods import CHANNEL_METHODS, METHODS, NM_METHODS, UNSTRUCTURED_METHODS, make_method
from studies.networks import mlp
from studies.train_image import ImageTask
from studies.train_text import TextTask
from studies.training import Recipe, train
from tests.support.studies import small_residual_network

pytestmark = pytest.mark.gpu

RECIPE = Recipe(epochs=4, batch=16, lr=0.05, weight_decay=5e-4, bfloat16=("cuda",))


class WithoutWaits:
    """A task whose epochs fail if the host waits for the device after the first batch."""

    def __init__(self, task):
        self.task = task
        self.steps_per_epoch, self.score = task.steps_per_epoch, task.score

    def batches(self, epoch, seed):
        batches = self.task.batches(epoch, seed)
        yield next(batches)
        torch.cuda.set_sync_debug_mode("error")
        yield from batches
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def waits_are_allowed_afterwards():
    yield
    torch.cuda.set_sync_debug_mode("default")


def images(device, channels=1):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(90, channels, 16, 16, generator=generator)
    labels = torch.randint(10, (90,), generator=generator)
    parts = inputs[:80], labels[:80], inputs[80:], labels[80:]
    return Images(*(part.to(device) for part in parts))


def small_text_model():
    """Without attention, whose causal mask a fake device would not see."""
    body = [nn.Embedding(26, 32), nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1)]
    return nn.Sequential(*body, nn.Linear(64, 26))


def text():
    pieces = split_text("abcdefghijklmnopqrstuvwxyz" * 20)
    pieces = pieces._replace(train=pieces.train.cuda(), test=pieces.test.cuda())
    return TextTask(pieces, 16, RECIPE.batch, steps_per_epoch=5)


def image_task():
    return ImageTask(images("cuda"), RECIPE.batch, augment=True)


# The network, its task, the pattern and the layers that stay dense.
CASES = {
    "mlp": (lambda: mlp(256, 32, 10), image_task, "unstructured", ()),
    "text": (small_text_model, text, "unstructured", ("5",)),
    "nm": (lambda: mlp(256, 32, 10), image_task, "2:4", ()),
    "channels": (small_residual_network, image_task, "channel", ()),
}
METHODS_OF = {
    "mlp": UNSTRUCTURED_METHODS,
    "text": ("dense", "pdp", "gmp-global", "movement"),
    "nm": NM_METHODS,
    "channels": CHANNEL_METHODS,
}
# PDP with one threshold for all layers reads their allocations, a few times in a training.
WAITING = ("pdp", "pdp-paper", "pdp-hard")


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case, names in METHODS_OF.items() for name in sorted(names)],
)
def test_a_method_trains_and_resumes(case, name, tmp_path):
    make_network, make_task, pattern, exclude = CASES[case]
    task = make_task()
    budget = budget_of(0.5, pattern, RECIPE.epochs, exclude=exclude, narrowed=("*.conv1",))
    recipe = RECIPE if case != "text" else RECIPE._replace(optimizer="adamw", lr=1e-3)

    def run(**arguments):
        torch.manual_seed(0)
        model = make_network().cuda()
        method = make_method(name, model, budget)
        waits = pattern != "2:4" and name in WAITING
        running = task if waits else WithoutWaits(task)
        return train(
            running,
            model,
            method,
            recipe,
            0,
            folder=tmp_path,
            keep_log=False,
            show_progress=False,
            **arguments,
        )

    assert run(stop_after=2) is None
    outcome = run(resume=True)
    assert outcome.sparsity == pytest.approx(0.0 if name == "dense" else 0.5, abs=1e-3)
    assert (outcome.soft_score is not None) == name.startswith("pdp") - (name == "pdp-hard")


def test_methods_are_all_tested():
    assert {name for names in METHODS_OF.values() for name in names} == set(METHODS)


def test_batches_are_those_of_the_cpu():
    """Random crops, flips and orders do not depend on the device."""
    tasks = [ImageTask(images(device, 3), 16, augment=True) for device in ("cpu", "cuda")]
    for on_cpu, on_gpu in zip(*(task.batches(3, 1) for task in tasks), strict=True):
        assert all(part.device.type == "cuda" for part in on_gpu)
        assert torch.equal(on_cpu[0], on_gpu[0].cpu())
        assert torch.equal(on_cpu[1], on_gpu[1].cpu())
        assert on_gpu[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("network", ["mlp", "lenet", "resnet20"])
def test_networks_are_made_on_the_device_of_their_images(network):
    task = ImageTask(images("cuda"), 16, augment=False)
    model = train_image.make_network(network, task)
    assert all(weight.device.type == "cuda" for weight in model.parameters())
    assert task.score(model.eval()) <= 1
