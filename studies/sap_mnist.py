"""Compare SAP, one-shot magnitude pruning and lottery tickets on MNIST.

An MLP is trained, pruned and rewound in rounds. All networks start from the same values and train
equally long; the methods differ in what they prune and how much. The program writes rounds.csv,
accuracy.png (against remaining weights) and pq_index.png (by round).

    python -m studies.sap_mnist --data-dir DIR    # with MNIST's four *-ubyte.gz files
    python -m studies.sap_mnist                   # on scikit-learn's 8 x 8 digits
"""

import argparse
import csv
import math
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from pdp_kernels import SAPPruner, hard_mask, pq_index
from studies.data import Images, digits, mnist
from studies.networks import mlp

LOTTERY_TICKET_RATE = 0.2  # of the remaining weights per round, as in arXiv 1803.03635
BATCH = 512
# With eta = 0 SAP slows down at 17% (global) to 32% (neuron) remaining weights: after few epochs of
# training their magnitudes are too even to prune many. 0.1 prunes 17% of equal weights.
ETA = 0.1


class Row(NamedTuple):
    """One network: a line of rounds.csv."""

    method: str
    seed: int
    round: int
    remaining: float  # fraction of the weights without biases
    pq_index: float  # of all remaining weights after training
    accuracy: float


class Pruner(Protocol):
    """What the methods have in common: the interface of SAPPruner."""

    masks: dict[str, Tensor]

    def step(self) -> object:
        """Prune the trained model for the next round, and rewind it."""

    def attach(self, optimizer: torch.optim.Optimizer) -> object:
        """Keep pruned weights at 0 during training."""


class MagnitudePruner:
    """Prunes the smallest magnitudes of the model: 20% of the remaining weights in each round.

    Lottery tickets rank weights by their values after the last round, one-shot pruning by their
    values in the trained dense network.

    Args:
        model: The network.
        one_shot: Whether to prune one-shot.
    """

    def __init__(self, model: nn.Module, one_shot: bool) -> None:
        self.model = model
        self.one_shot = one_shot
        self.round = 0
        self.scores: Tensor | None = None
        self.initial = {name: value.clone() for name, value in model.state_dict().items()}
        self.weights = {
            name: weight for name, weight in model.named_parameters() if weight.dim() > 1
        }
        self.masks = {
            name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()
        }

    def step(self) -> None:
        """Prune the trained model for the next round, and rewind it."""
        self.round += 1
        if self.scores is None or not self.one_shot:
            self.scores = torch.cat([weight.detach().flatten() for weight in self.weights.values()])
        kept = hard_mask(self.scores, 1 - (1 - LOTTERY_TICKET_RATE) ** self.round)
        masks = kept.split([weight.numel() for weight in self.weights.values()])
        for (name, weight), mask in zip(self.weights.items(), masks, strict=True):
            self.masks[name] = mask.view(weight.shape)
        self.model.load_state_dict(self.initial)
        self.mask_weights()

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Set pruned weights to 0."""
        for name, weight in self.weights.items():
            weight.mul_(self.masks[name])

    def attach(self, optimizer: torch.optim.Optimizer) -> object:
        """Keep pruned weights at 0 during training."""
        return optimizer.register_step_post_hook(lambda *_: self.mask_weights())


METHODS = {
    "SAP, neuron": lambda model: SAPPruner(model, scope="neuron", eta=ETA),
    "SAP, global": lambda model: SAPPruner(model, scope="global", eta=ETA),
    "one-shot": lambda model: MagnitudePruner(model, one_shot=True),
    "lottery ticket": lambda model: MagnitudePruner(model, one_shot=False),
}


def load_data(folder: Path | None) -> Images:
    """Return MNIST, or the digits without a folder."""
    return digits() if folder is None else mnist(folder)


def train(model: nn.Module, data: Images, epochs: int, pruner: Pruner) -> None:
    """Train the remaining weights of the model."""
    # Optimizer and schedule of arXiv 2302.05601 with fewer epochs.
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    pruner.attach(optimizer)
    steps = epochs * math.ceil(len(data.train_inputs) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_inputs)).split(BATCH):
            batch = batch.to(data.train_inputs.device)
            optimizer.zero_grad()
            cross_entropy(model(data.train_inputs[batch]), data.train_labels[batch]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy_of(model: nn.Module, data: Images) -> float:
    """Return the accuracy on the test images."""
    return float((model(data.test_inputs).argmax(1) == data.test_labels).double().mean())


def run_method(
    method: str, seed: int, data: Images, rounds: int, epochs: int, progress: tqdm
) -> list[Row]:
    """Train the dense network (round 0) and the network after each round of pruning."""
    torch.manual_seed(seed)
    inputs = data.train_inputs[0].numel()
    model = mlp(inputs, 128, 256, 10).to(data.train_inputs.device)
    pruner = METHODS[method](model)
    rows = []
    for number in range(rounds + 1):
        if number:
            pruner.step()
        train(model, data, epochs, pruner)
        masks = list(pruner.masks.values())
        weights = [model.get_parameter(name).detach() for name in pruner.masks]
        remaining = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        index = float(pq_index(weights, mask=masks, scope="global"))
        rows.append(Row(method, seed, number, remaining, index, accuracy_of(model, data)))
        progress.update()
        progress.set_postfix_str(f"{method}: {remaining:.1%} left, {rows[-1].accuracy:.2%}")
    return rows


def mean_curve(rows: list[Row], method: str, field: str) -> list[float]:
    """Return the mean of a field over the seeds, for each round."""
    rows = [row for row in rows if row.method == method]
    rounds = range(1 + max(row.round for row in rows))
    return [
        float(np.mean([getattr(row, field) for row in rows if row.round == number]))
        for number in rounds
    ]


def at_equal_remaining(rows: list[Row], fraction: float) -> dict[str, float]:
    """Return each method's mean accuracy at a fraction of remaining weights.

    It is interpolated between rounds, over the logarithm of the fraction.
    """
    result = {}
    for method in METHODS:
        remaining = np.log(mean_curve(rows, method, "remaining"))[::-1]
        if remaining[0] <= np.log(fraction):
            accuracy = mean_curve(rows, method, "accuracy")[::-1]
            result[method] = float(np.interp(np.log(fraction), remaining, accuracy))
    return result


def plot_accuracy(rows: list[Row], path: Path) -> None:
    """Plot accuracy against remaining weights, with a line for each method."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in METHODS:
        remaining, accuracy = (mean_curve(rows, method, f) for f in ("remaining", "accuracy"))
        axes.plot(remaining, accuracy, "o-", markersize=3, label=method)
    axes.set(xscale="log", xlabel="remaining weights", ylabel="test accuracy")
    axes.invert_xaxis()
    axes.xaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:g}%")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_pq_index(rows: list[Row], path: Path) -> None:
    """Plot the PQ Index above the accuracy, by round, to compare where each of them turns."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, (field, label) in zip(
        panels, {"pq_index": "PQ Index", "accuracy": "test accuracy"}.items(), strict=True
    ):
        for method in METHODS:
            axes.plot(mean_curve(rows, method, field), "o-", markersize=3, label=method)
        axes.set(ylabel=label)
        axes.grid(alpha=0.3)
    panels[1].set(xlabel="round")
    panels[0].legend()
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST's gzipped IDX files")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=3, help="per round")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("sap_mnist"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    data = Images(*(tensor.to(arguments.device) for tensor in load_data(arguments.data_dir)))
    rows = []
    total = len(METHODS) * arguments.seeds * (arguments.rounds + 1)
    with tqdm(total=total, unit="network") as progress:
        for seed in range(arguments.seeds):
            for method in METHODS:
                rows += run_method(method, seed, data, arguments.rounds, arguments.epochs, progress)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / "rounds.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)
    plot_accuracy(rows, arguments.out / "accuracy.png")
    plot_pq_index(rows, arguments.out / "pq_index.png")
    print("accuracy at equal remaining weights")
    for fraction in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002):
        accuracies = at_equal_remaining(rows, fraction)
        print(f"{fraction:6.1%}", *(f"{name} {a:.2%}" for name, a in accuracies.items()), sep="  ")


if __name__ == "__main__":
    main()
