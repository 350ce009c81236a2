"""One training loop for every network and every way to prune it."""

import csv
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from matplotlib.figure import Figure
from method import Method
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm


class Recipe(NamedTuple):
    """How a network is trained. Lengths in epochs; the learning rate falls as a cosine."""

    epochs: int
    batch: int
    lr: float
    final_lr: float = 0.0
    lr_warmup: float = 0.0  # the learning rate rises linearly so long
    optimizer: str = "sgd"  # or "adamw"
    momentum: float = 0.9  # AdamW: beta_1; beta_2 is 0.99
    nesterov: bool = False
    weight_decay: float = 0.0  # of weights; biases and norms have none
    clip: float | None = None  # the largest norm of the gradient
    bfloat16: bool = False  # autocast

    def lr_at(self, epoch: float) -> float:
        if epoch < self.lr_warmup:
            return self.lr * epoch / self.lr_warmup
        share = (epoch - self.lr_warmup) / (self.epochs - self.lr_warmup)
        return self.final_lr + (self.lr - self.final_lr) * (1 + math.cos(math.pi * share)) / 2


class Task(Protocol):
    """What is learned: batches of inputs and labels, and a score of the model in eval mode."""

    score_name: str
    steps_per_epoch: int

    def batches(self, epoch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]: ...

    def score(self, model: nn.Module) -> float: ...


class EpochLog(NamedTuple):
    epoch: int
    lr: float
    train_loss: float
    score: float  # of the network that would be deployed
    soft_score: float | None  # with soft masks, where the method has them
    sparsity: float
    seconds: float  # since the run started, those before it was resumed included


class Outcome(NamedTuple):
    score: float
    soft_score: float | None
    sparsity: float  # of the finished network: as asked for
    own_sparsity: float  # before `finalize` pruned the last weights
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
    show_progress: bool = True,
) -> Outcome | None:
    """Trains and finishes the model: its pruned weights are exact zeros in plain parameters.

    With a folder the state of training is kept there after every epoch, and log.csv and log.png
    are written; resume goes on from there, to the same network bit by bit. Without a folder the
    model is scored at the end alone.

    Returns:
        The outcome, or None if stop_after ended the run before its last epoch.
    """
    optimizer = make_optimizer(model, method, recipe)
    device = next(model.parameters()).device
    start, log, seconds = 0, [], 0.0
    if resume and folder is not None and (folder / "checkpoint.pt").exists():
        start, log = load_checkpoint(folder / "checkpoint.pt", model, method, optimizer, device)
        seconds = log[-1].seconds
    end = recipe.epochs if stop_after is None else min(stop_after, recipe.epochs)
    began = time.perf_counter() - seconds
    with tqdm(
        total=recipe.epochs * task.steps_per_epoch,
        initial=start * task.steps_per_epoch,
        disable=not show_progress,
        unit="step",
    ) as bar:
        for epoch in range(start, end):
            loss = train_epoch(task, model, method, recipe, optimizer, epoch, seed, bar)
            seconds = time.perf_counter() - began
            if folder is not None:
                lr = recipe.lr_at(epoch + 1)
                scores = score(task, model), soft_score(task, model, method)
                log.append(EpochLog(epoch + 1, lr, loss, *scores, method.sparsity(), seconds))
                save_checkpoint(folder / "checkpoint.pt", model, method, optimizer, epoch + 1, log)
                write_log(log, task.score_name, folder)
                bar.set_postfix_str(f"{task.score_name} {scores[0]:.4f}")
    if end < recipe.epochs:
        return None
    soft = soft_score(task, model, method)
    own_sparsity = method.sparsity()
    method.finalize()
    return Outcome(score(task, model), soft, method.sparsity(), own_sparsity, seconds, log)


def train_epoch(task, model, method, recipe, optimizer, epoch, seed, bar) -> float:
    """One pass over the data. Returns the mean loss."""
    model.train()
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for number, (inputs, labels) in enumerate(task.batches(epoch, seed)):
        progress = epoch + number / task.steps_per_epoch
        for group in optimizer.param_groups:
            factor = method.own_rate(progress) if group["own"] else 1.0
            group["lr"] = recipe.lr_at(progress) * factor
        with torch.autocast(device.type, torch.bfloat16) if recipe.bfloat16 else nullcontext():
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
    return total.item() / task.steps_per_epoch


def make_optimizer(model: nn.Module, method: Method, recipe: Recipe) -> torch.optim.Optimizer:
    """Weights with weight decay, biases and norms without, and the method's own parameters."""
    own = method.own_parameters()
    taken = {id(parameter) for parameter in own}
    others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
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
    model.eval()
    return task.score(model)


def soft_score(task: Task, model: nn.Module, method: Method) -> float | None:
    """The score of the network that trains, where it is another than the pruned one."""
    if not method.soft:
        return None
    model.eval()
    for layer in method.layers:
        layer.train()  # linear layers and convolutions differ by their masks alone
    return task.score(model)


def save_checkpoint(path, model, method, optimizer, epoch, log) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "epoch": epoch,
        "model": model.state_dict(),
        "method": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "log": [tuple(entry) for entry in log],
    }
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_checkpoint(path, model, method, optimizer, device) -> tuple[int, list[EpochLog]]:
    """Returns the epochs done, and their log."""
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    method.load_state_dict(state["method"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"].cpu())
    if state["random_cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random_cuda"].cpu())
    return state["epoch"], [EpochLog(*entry) for entry in state["log"]]


def write_log(log: list[EpochLog], score_name: str, folder: Path) -> None:
    """log.csv and log.png: the score and the sparsity by epoch."""
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
