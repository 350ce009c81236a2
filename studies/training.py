"""One training loop for all networks and pruning methods."""

import csv
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from studies.methods.base import Method


class Recipe(NamedTuple):
    """How a network is trained: lengths in epochs, with a learning rate that falls as a cosine."""

    epochs: int
    batch: int
    lr: float
    final_lr: float = 0.0
    lr_warmup: float = 0.0  # epochs in which the learning rate rises linearly
    optimizer: str = "sgd"  # or "adamw"
    momentum: float = 0.9  # beta_1 of AdamW, whose beta_2 is 0.99
    nesterov: bool = False
    weight_decay: float = 0.0  # of weights, not of biases and norms
    clip: float | None = None  # maximum norm of the gradient
    bfloat16: tuple[str, ...] = ()  # types of devices on which autocast computes in it

    def finetuning(self) -> "Recipe":
        """Return the training of a trained network: the last fifth of the schedule, once more."""
        epochs = max(1, self.epochs // 5)
        rate = self.lr_at(self.epochs - epochs)
        return self._replace(epochs=epochs, lr=rate, lr_warmup=0.0)

    def lr_at(self, epoch: float) -> float:
        """Return the learning rate at this progress in epochs."""
        if epoch < self.lr_warmup:
            return self.lr * epoch / self.lr_warmup
        progress = (epoch - self.lr_warmup) / (self.epochs - self.lr_warmup)
        return self.final_lr + (self.lr - self.final_lr) * (1 + math.cos(math.pi * progress)) / 2


class Task(Protocol):
    """A data set as batches of inputs and labels, and a score of a model in eval mode."""

    score_name: str
    steps_per_epoch: int

    def batches(self, epoch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one epoch."""

    def score(self, model: nn.Module) -> float:
        """Return the score on the test set."""


class EpochLog(NamedTuple):
    """A row of log.csv."""

    epoch: int
    lr: float
    train_loss: float
    score: float  # of the network that would be deployed
    soft_score: float | None  # with soft masks, if the method has them
    sparsity: float
    seconds: float  # of training, including the time before a resume


# The number of epochs done, their log, and the seconds that they took.
Progress = tuple[int, list[EpochLog], float]


class Outcome(NamedTuple):
    """The result of a training."""

    score: float
    soft_score: float | None
    sparsity: float  # of the finished network
    own_sparsity: float  # before `finalize`
    seconds: float
    log: list[EpochLog]


def train(
    task: Task,
    model: nn.Module,
    method: Method,
    recipe: Recipe,
    seed: int,
    *,
    folder: Path | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    keep_log: bool = True,
    show_progress: bool = True,
    after_epoch: Callable[[], None] = lambda: None,
) -> Outcome | None:
    """Train the model and finalize it: pruned weights are exact zeros in plain parameters.

    Args:
        task: Data and score.
        model: The network, to which `method` has been applied.
        method: The pruning method.
        recipe: How to train.
        seed: Seed of the order of the data.
        folder: Where checkpoint.pt is written after every epoch, and the log. None writes nothing.
        resume: Whether to continue from the checkpoint, if there is one. The network is the same
            bit for bit as without the interruption.
        stop_after: Number of epochs after which to stop early.
        keep_log: Whether to score the model after every epoch, for log.csv and log.png in the
            folder, and not only at the end.
        show_progress: Whether to show a progress bar.
        after_epoch: Called after every epoch.

    Returns:
        The outcome, or None if stop_after ended the run before its last epoch.
    """
    optimizer = make_optimizer(model, method, recipe)
    device = next(model.parameters()).device
    start, log, seconds = 0, [], 0.0
    if resume and folder is not None and (folder / "checkpoint.pt").exists():
        state = load_checkpoint(folder / "checkpoint.pt", model, method, optimizer, device)
        start, log, seconds = state
    end = recipe.epochs if stop_after is None else min(stop_after, recipe.epochs)
    began = time.perf_counter() - seconds
    with tqdm(
        total=recipe.epochs * task.steps_per_epoch,
        initial=start * task.steps_per_epoch,
        disable=not show_progress,
        unit="step",
    ) as bar:
        for epoch in range(start, end):
            loss = train_epoch(task, model, method, recipe, optimizer, epoch, seed, bar).item()
            after_epoch()
            seconds = time.perf_counter() - began
            if folder is None:
                continue
            if keep_log:
                lr = recipe.lr_at(epoch + 1)
                scores = score(task, model), soft_score(task, model, method)
                log.append(EpochLog(epoch + 1, lr, loss, *scores, method.sparsity(), seconds))
                bar.set_postfix_str(f"{task.score_name} {scores[0]:.4f}")
            state = (epoch + 1, log, seconds)
            save_checkpoint(folder / "checkpoint.pt", model, method, optimizer, state)
            if keep_log:
                write_log(log, task.score_name, folder)
    if end < recipe.epochs:
        return None
    soft = soft_score(task, model, method)
    own_sparsity = method.sparsity()
    method.finalize()
    return Outcome(score(task, model), soft, method.sparsity(), own_sparsity, seconds, log)


def train_epoch(
    task: Task,
    model: nn.Module,
    method: Method,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    seed: int,
    bar: tqdm,
) -> Tensor:
    """Train for one epoch and return the mean loss, without waiting for the device."""
    model.train()
    device = next(model.parameters()).device
    autocasts = device.type in recipe.bfloat16
    total = torch.zeros((), device=device)
    for number, (inputs, labels) in enumerate(task.batches(epoch, seed)):
        progress = epoch + number / task.steps_per_epoch
        for group in optimizer.param_groups:
            factor = method.own_rate(progress) if group["own"] else 1.0
            group["lr"] = recipe.lr_at(progress) * factor
        with torch.autocast(device.type, torch.bfloat16) if autocasts else nullcontext():
            logits = model(inputs)
            loss = cross_entropy(logits.flatten(0, -2), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        method.step(epoch + (number + 1) / task.steps_per_epoch)
        total += loss.detach()
        bar.update()
    return total / task.steps_per_epoch


def make_optimizer(model: nn.Module, method: Method, recipe: Recipe) -> torch.optim.Optimizer:
    """Return an optimizer with three groups: weights, biases and norms, the method's parameters."""
    own = method.own_parameters()
    own_ids = {id(parameter) for parameter in own}
    others = [parameter for parameter in model.parameters() if id(parameter) not in own_ids]
    groups = [
        {"params": [p for p in others if p.dim() > 1], "own": False},
        {"params": [p for p in others if p.dim() <= 1], "own": False, "weight_decay": 0.0},
        {"params": own, "own": True, "weight_decay": method.own_weight_decay()},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            groups,
            recipe.lr,
            betas=(recipe.momentum, 0.99),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
    return torch.optim.SGD(
        groups,
        recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=True,
    )


def score(task: Task, model: nn.Module) -> float:
    """Return the score of the network that would be deployed."""
    model.eval()
    return task.score(model)


def soft_score(task: Task, model: nn.Module, method: Method) -> float | None:
    """Return the score with soft masks, or None if the method has none."""
    if not method.soft:
        return None
    model.eval()
    for layer in method.layers:
        layer.train()  # changes only the masks of linear layers and convolutions
    return task.score(model)


def save_checkpoint(
    path: Path,
    model: nn.Module,
    method: Method,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Write the state of the training, replacing the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    epoch, log, seconds = progress
    device = next(model.parameters()).device
    state = {
        "epoch": epoch,
        "seconds": seconds,
        "model": model.state_dict(),
        "method": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "log": [tuple(entry) for entry in log],
    }
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_checkpoint(
    path: Path,
    model: nn.Module,
    method: Method,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> Progress:
    """Restore the state of the training, and return its progress."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    method.load_state_dict(state["method"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if state["random_cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["random_cuda"], device)
    return state["epoch"], [EpochLog(*entry) for entry in state["log"]], state["seconds"]


def write_log(log: list[EpochLog], score_name: str, folder: Path) -> None:
    """Write log.csv and log.png: score and sparsity by epoch."""
    with open(folder / "log.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(name.replace("score", score_name) for name in EpochLog._fields)
        writer.writerows(log)
    figure = Figure(figsize=(7, 5), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    epochs = [entry.epoch for entry in log]
    panels[0].plot(epochs, [entry.score for entry in log], "o-", markersize=3, label="pruned")
    if log[0].soft_score is not None:
        soft = [entry.soft_score for entry in log]
        panels[0].plot(epochs, soft, "o-", markersize=3, label="with soft masks")
        panels[0].legend()
    panels[1].plot(epochs, [entry.sparsity for entry in log], "o-", markersize=3)
    panels[0].set(ylabel=f"test {score_name}")
    panels[1].set(xlabel="epoch", ylabel="sparsity", ylim=(0, 1))
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.savefig(folder / "log.png", dpi=150)
