"""Train a small GPT on characters with one pruning method, or dense.

    python -m studies.train_text --method pdp --sparsity 0.75 --data-dir DIR     # on a GPU
    python -m studies.train_text --size tiny --method pdp    # on a CPU, on Python's help texts

DIR holds Tiny Shakespeare as tinyshakespeare.txt or input.txt. Size small is nanoGPT's
configuration for characters, tiny the one that its README recommends for a CPU; both with their
training. An epoch is 250 steps on random windows. The embedding stays dense, and so does the head,
which shares its weight. The program writes checkpoint.pt, log.csv, log.png and model.pt, the
weights of the finished network.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from studies import data
from studies.command_line import add_common_arguments, run
from studies.data import Text
from studies.networks import GPT
from studies.training import Recipe

STEPS_PER_EPOCH = 250
EXCLUDED = ("head",)  # globs of layers that stay dense
NARROWED = ("*.expand",)  # globs of layers whose channels can be pruned: hidden units of the MLPs


class Size(NamedTuple):
    """A GPT and its training."""

    context: int
    layers: int
    heads: int
    width: int
    dropout: float
    recipe: Recipe


_RECIPE = Recipe(
    epochs=20,
    batch=64,
    lr=1e-3,
    final_lr=1e-4,
    lr_warmup=0.4,  # 100 steps
    optimizer="adamw",
    weight_decay=0.1,
    clip=1.0,
    bfloat16=("cuda",),
)
SIZES = {
    "small": Size(256, 6, 6, 384, 0.2, _RECIPE),
    "tiny": Size(64, 4, 4, 128, 0.0, _RECIPE._replace(epochs=8, batch=12)),
}


class TextTask:
    """Random windows of the text, and the mean loss per character of the test text in nats.

    Args:
        text: The data set.
        context: Characters that the model sees.
        batch: Windows per batch.
        steps_per_epoch: Batches per epoch.
    """

    score_name = "loss"

    def __init__(self, text: Text, context: int, batch: int, steps_per_epoch: int):
        for name, split in (("train", text.train), ("test", text.test)):
            if len(split) <= context:
                raise ValueError(f"{name} text must be longer than {context}, got {len(split)}")
        self.text = text
        self.window = torch.arange(context + 1, device=text.train.device)
        self.batch = batch
        self.steps_per_epoch = steps_per_epoch

    def batches(self, epoch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield characters and the characters that follow, as epoch and seed determine."""
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        starts = torch.randint(
            len(self.text.train) - len(self.window) + 1,
            (self.steps_per_epoch, self.batch, 1),
            generator=generator,
        )
        for start in starts.to(self.window.device):
            characters = self.text.train[start + self.window]
            yield characters[:, :-1], characters[:, 1:]

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Return the mean loss on the test text, cut into windows that do not overlap."""
        length = len(self.window) - 1
        count = (len(self.text.test) - 1) // length
        inputs = self.text.test[: count * length].view(count, length)
        labels = self.text.test[1 : count * length + 1].view(count, length)
        total = torch.zeros((), dtype=torch.float64, device=inputs.device)
        for windows, expected in zip(inputs.split(64), labels.split(64), strict=True):
            logits = model(windows).flatten(0, 1)
            total += cross_entropy(logits, expected.flatten(), reduction="sum")
        return total.item() / (count * length)


def make_task(folder: Path | None, size: Size, batch: int, steps: int, device: str) -> TextTask:
    """Return the text on a device; without a folder, Python's help texts."""
    text = data.help_text() if folder is None else data.shakespeare(folder)
    text = text._replace(train=text.train.to(device), test=text.test.to(device))
    return TextTask(text, size.context, batch, steps)


def make_network(size: Size, task: TextTask) -> GPT:
    """Return a GPT for the characters of the task, on its device."""
    context, layers, heads, width, dropout, _ = size
    characters = len(task.text.characters)
    model = GPT(characters, context, layers, heads, width, dropout)
    return model.to(task.window.device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps-per-epoch", type=int, default=STEPS_PER_EPOCH)
    add_common_arguments(parser, sparsity=0.75)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    run(
        arguments,
        size.recipe,
        make_task=lambda recipe: make_task(
            arguments.data_dir, size, recipe.batch, arguments.steps_per_epoch, arguments.device
        ),
        make_model=lambda task: make_network(size, task),
        exclude=EXCLUDED,
        narrowed=NARROWED,
    )


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # see studies/grid.py
    main()
