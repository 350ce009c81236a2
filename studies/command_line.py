"""The command line that train_image and train_text share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pdp_kernels.pruning.patterns import parse_pattern
from studies.methods import METHODS, make_method
from studies.methods.base import Budget
from studies.training import Recipe, Task, train


def add_common_arguments(parser: argparse.ArgumentParser, sparsity: float) -> None:
    """Add the arguments of every training, with the default of --sparsity."""
    add = parser.add_argument
    add(
        "--data-dir",
        type=Path,
        help="folder of the data set (default: data that needs no download)",
    )
    add("--method", choices=METHODS, default="pdp")
    add("--sparsity", type=float, default=sparsity, help="fraction of the weights to prune")
    add(
        "--pattern",
        default="unstructured",
        help="or channel, or N:M such as 2:4, which implies the sparsity",
    )
    add("--epochs", type=int)
    add("--batch", type=int)
    add("--lr", type=float)
    add("--weight-decay", type=float)
    add("--warmup", type=float, help="epochs before pruning (default: as recommended)")
    add("--ramp", type=float, help="epochs in which the sparsity grows (default: as recommended)")
    pdp = parser.add_argument_group("PDP", "the default is the recommended temperature")
    pdp.add_argument(
        "--tau", type=temperature, metavar="T", help="absolute temperature; START,END anneals"
    )
    pdp.add_argument(
        "--relative-tau",
        type=temperature,
        metavar="T",
        help="temperature in units of the squared threshold",
    )
    pdp.add_argument("--ramp-shape", choices=("linear", "cubic"))
    pdp.add_argument(
        "--update-interval", type=float, help="epochs between updates of thresholds; 0: every step"
    )
    add("--str-decay", type=float, help="weight decay of STR's thresholds")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("run"))
    add(
        "--resume", action="store_true", help="continue from the checkpoint in OUT, if there is one"
    )
    add("--stop-after", type=int, metavar="EPOCH", help="stop after this epoch, to be resumed")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def temperature(text: str) -> float | tuple[float, float]:
    """Parse a number, or two that a comma separates."""
    values = tuple(float(number) for number in text.split(","))
    if len(values) > 2:
        raise ValueError
    return values if len(values) == 2 else values[0]


def budget_of(
    sparsity: float,
    pattern: str,
    epochs: int,
    warmup: float | None = None,
    ramp: float | None = None,
    exclude: tuple[str, ...] = (),
    narrowed: tuple[str, ...] = (),
    finetuning: bool = False,
) -> Budget:
    """Return the budget of a run.

    Args:
        sparsity: Fraction of the weights to prune; N:M patterns imply their own.
        pattern: "unstructured", "channel" or N:M.
        epochs: Length of the training.
        warmup: Epochs before pruning; by default that of the recommended setting.
        ramp: Epochs in which the sparsity grows; by default that of the recommended setting.
        exclude: Globs of names of layers that stay dense.
        narrowed: Globs of names of the layers whose channels can be pruned.
        finetuning: Whether the training starts from a trained network.

    Raises:
        ValueError: An argument is out of range.
    """
    parsed = parse_pattern("pattern", pattern, "output", "rms")
    if parsed.fixed_sparsity is not None:
        sparsity = parsed.fixed_sparsity
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and less than 1, got {sparsity}")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    usual = parsed.recommended(finetuning)
    warmup = usual.warmup * epochs if warmup is None else warmup
    ramp = usual.ramp * epochs if ramp is None else ramp
    if warmup < 0 or ramp < 0 or warmup + ramp > epochs:
        raise ValueError(
            f"warmup and ramp must be at least 0 and fit into {epochs} epochs, "
            f"got {warmup:g} and {ramp:g}"
        )
    if pattern == "channel" and not narrowed:
        raise ValueError("pattern must not be channel: the network has no layers to narrow")
    include = narrowed if pattern == "channel" else ("*",)
    return Budget(sparsity, epochs, warmup, ramp, pattern, include, exclude)


def method_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the chosen method.

    Raises:
        ValueError: A setting belongs to another method.
    """
    pdp = ("tau", "relative_tau", "ramp_shape", "update_interval")
    own = {"pdp": pdp, "pdp-paper": pdp, "str": ("str_decay",)}.get(arguments.method, ())
    options = {}
    for name in (*pdp, "str_decay"):
        value = getattr(arguments, name)
        if value is not None and name not in own:
            raise ValueError(f"{name} must be left out with method {arguments.method}, got {value}")
        if value is not None:
            options[name.removeprefix("str_")] = value
    return options


def run(
    arguments: argparse.Namespace,
    recipe: Recipe,
    make_task: Callable[[Recipe], Task],
    make_model: Callable[[Task], nn.Module],
    exclude: tuple[str, ...] = (),
    narrowed: tuple[str, ...] = (),
) -> None:
    """Train as the arguments say, and print the outcome.

    Args:
        arguments: The command line, with the arguments of `add_common_arguments`.
        recipe: The recipe that arguments may change.
        make_task: Returns the data for a recipe.
        make_model: Returns the network for the data.
        exclude: Globs of names of layers that stay dense.
        narrowed: Globs of names of the layers whose channels can be pruned.
    """
    changes = {name: getattr(arguments, name) for name in ("epochs", "batch", "lr", "weight_decay")}
    recipe = recipe._replace(**{name: v for name, v in changes.items() if v is not None})
    budget = budget_of(
        arguments.sparsity,
        arguments.pattern,
        recipe.epochs,
        arguments.warmup,
        arguments.ramp,
        exclude,
        narrowed,
    )
    options = method_options(arguments)
    task = make_task(recipe)
    torch.manual_seed(arguments.seed)
    model = make_model(task)
    method = make_method(arguments.method, model, budget, **options)
    outcome = train(
        task,
        model,
        method,
        recipe,
        arguments.seed,
        folder=arguments.out,
        resume=arguments.resume,
        stop_after=arguments.stop_after,
    )
    if outcome is None:
        print(f"stopped after epoch {arguments.stop_after} of {recipe.epochs}; --resume continues")
        return
    torch.save(model.state_dict(), arguments.out / "model.pt")
    soft = "" if outcome.soft_score is None else f" (with soft masks {outcome.soft_score:.4f})"
    print(
        f"{arguments.method}: test {task.score_name} {outcome.score:.4f}{soft}, "
        f"sparsity {outcome.sparsity:.4%}, by itself {outcome.own_sparsity:.4%}, "
        f"{outcome.seconds:.0f} s"
    )
