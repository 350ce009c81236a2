"""Count how many weights of N:M groups change sides while a network trains.

    python -m studies.flips --network gpt-tiny --data-dir DIR --out OUT

A weight is on the kept side if it is among the N largest magnitudes of its group, whatever the mask
of the method is at that time. After each optimizer step the program compares the sides with those
of the step before. OUT/flips.md has the fraction that changed, per step and in each epoch.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from studies.command_line import budget_of
from studies.methods import make_method
from studies.methods.base import Method, flat, largest_masks
from studies.provenance import checkout_commit, shown_command
from studies.training import Task, train
from studies.workloads import WORKLOADS, Workload

METHODS = ("pdp", "sr-ste", "one-shot")


class FlipCounter:
    """Counts changes of sides after each step of a method.

    Args:
        method: A method that prunes N:M groups. Its steps are counted from now on.

    Attributes:
        flips: The fraction of weights that changed, for each step.
    """

    def __init__(self, method: Method):
        self.budget = method.budget
        self.weights = method.plain_weights()
        self.sides = self.kept()
        self.flips: list[float] = []
        self.method_step = method.step
        method.step = self.step

    def kept(self) -> torch.Tensor:
        """Return which weights are on the kept side, those of all layers in one vector."""
        return flat(largest_masks(self.weights, self.budget))

    def step(self, progress: float) -> None:
        self.method_step(progress)
        sides = self.kept()
        self.flips.append((sides != self.sides).double().mean().item())
        self.sides = sides


def count(
    task: Task, workload: Workload, name: str, pattern: str, epochs: int, seed: int
) -> list[float]:
    """Train with a method, and return the fraction of changes per step in each epoch."""
    torch.manual_seed(seed)
    model: nn.Module = workload.make_network(task)
    method = make_method(name, model, budget_of(0.0, pattern, epochs, exclude=workload.exclude))
    counter = FlipCounter(method)
    train(task, model, method, workload.recipe._replace(epochs=epochs), seed)
    steps = task.steps_per_epoch
    return [sum(counter.flips[e * steps : (e + 1) * steps]) / steps for e in range(epochs)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--network", choices=WORKLOADS, default="mlp")
    add("--data-dir", type=Path, help="as for studies.train_image")
    add("--pattern", default="2:4")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--epochs", type=int)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("study"))
    arguments = parser.parse_args()
    workload = WORKLOADS[arguments.network]
    epochs = arguments.epochs or workload.recipe.epochs
    with TemporaryDirectory() as temporary:
        folder = workload.prepare(arguments.data_dir, Path(temporary))
        task = workload.make_task(folder, workload.recipe, "cpu")
        run = (arguments.pattern, epochs, arguments.seed)
        rates = [count(task, workload, name, *run) for name in arguments.methods]
    lines = [
        f"Weights that change sides per step, in parts per million of all in {arguments.pattern} "
        "groups, mean of each epoch.",
        "",
        f"    {shown_command('studies.flips')}",
        "",
        f"Commit of the code: {checkout_commit()}.",
        "",
        "| epoch | " + " | ".join(arguments.methods) + " |",
        "|---" * (1 + len(rates)) + "|",
        *(
            f"| {epoch + 1} | " + " | ".join(f"{1e6 * rate[epoch]:.0f}" for rate in rates) + " |"
            for epoch in range(epochs)
        ),
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "flips.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # see studies/grid.py
    main()
