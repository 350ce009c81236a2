"""Draws the figures of docs/concepts: python docs/plots/concepts.py docs/assets/concepts."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from pdp_kernels import PDPConfig, pdp_mask

TEMPERATURES = (1.0, 0.3, 0.1, 0.02)


def draw_soft_mask(path: Path) -> None:
    """Plot the mask and the factor of Eq. 2 over w / t, for several relative temperatures."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for c in TEMPERATURES:
        weight = torch.linspace(0, 2, 2001, dtype=torch.float64, requires_grad=True)
        threshold = torch.ones((), dtype=torch.float64)
        w_hat, mask = pdp_mask(weight, threshold=threshold, relative_tau=c, return_mask=True)
        w_hat.sum().backward()
        left.plot(weight.detach(), mask.detach(), label=f"{c:g}")
        right.plot(weight.detach(), weight.grad)
    left.set(xlabel="|w| / t", ylabel="mask m", xlim=(0, 2), ylim=(0, 1.02))
    left.legend(title=r"$\tau / t^2$")
    right.set(xlabel="|w| / t", ylabel="gradient of w / gradient of ŵ", xlim=(0, 2))
    right.set(yscale="log", ylim=(0.01, 50))
    save(figure, path)


def draw_schedule(path: Path) -> None:
    """Plot what PDPConfig.for_epochs and PDPConfig.paper ask for at each epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    recommended, paper = PDPConfig.for_epochs(0.9, epochs=100), PDPConfig.paper(0.9)
    epochs = torch.linspace(0, 100, 1001).tolist()
    for label, config in (("for_epochs(0.9, epochs=100)", recommended), ("paper(0.9)", paper)):
        left.plot(epochs, [0.9 * config.ramp_at(epoch) for epoch in epochs], label=label)
    left.set(xlabel="epoch", ylabel="sparsity", xlim=(0, 100), ylim=(0, 1))
    left.legend()
    temperatures = recommended.plan().temperatures
    right.plot(epochs, [recommended.temperature_at(temperatures, epoch) for epoch in epochs])
    right.set(xlabel="epoch", ylabel=r"$\tau / t^2$ of for_epochs", xlim=(0, 100), yscale="log")
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(folder: Path) -> None:
    plt.switch_backend("svg")
    plt.rcParams["svg.hashsalt"] = "pdp_kernels"  # equal figures have equal files
    draw_soft_mask(folder / "soft_mask.svg")
    draw_schedule(folder / "schedule.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
