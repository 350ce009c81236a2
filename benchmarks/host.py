"""Time the host: what masks and `pruner.step` cost for each layer of a whole model.

`python -m benchmarks.host`. The models have as many layers as the networks, of the same kinds and
kernel sizes, but so small that kernels take next to no time. The cost of a mask is the difference
to the dense model's forward, or forward and backward, divided by the number of layers. On a GPU the
clock does not wait for the device. Gradients are checked first, as in `benchmarks.training_step`,
whose pruners these are.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.environment import describe_environment
from benchmarks.layer_shapes import NETWORKS
from benchmarks.measure import measure_all
from benchmarks.report import format_environment
from benchmarks.timing import host_clock_for, time_interleaved
from benchmarks.training_step import PROGRESS, PRUNERS, SGD, Task, Training, checked_trainings

WIDTH = 8  # channels of every layer


def tiny_network(name: str) -> nn.Sequential:
    """Return a chain of tiny layers, one for each weight of a network of convolutions or not."""
    layers: list[nn.Module] = []
    for shape, _ in NETWORKS[name]():
        if len(shape) == 4:
            size = shape[-1]
            layers.append(nn.Conv2d(WIDTH, WIDTH, size, padding=size // 2, bias=False))
        else:
            if layers and isinstance(layers[-1], nn.Conv2d):
                layers.append(nn.Flatten())
            layers.append(nn.Linear(WIDTH, WIDTH, bias=False))
    return nn.Sequential(*layers)


def tiny_batch(*shape: int) -> tuple[Tensor, Tensor]:
    """Return random inputs, and a class for each."""
    return torch.randn(shape), torch.randint(WIDTH, shape[:1])


TASKS = {
    f"{title}, {dtype}": Task(
        partial(tiny_network, name), partial(tiny_batch, *shape), SGD, autocast=dtype != "float32"
    )
    for title, name, shape in (
        ("ResNet-50's layers", "resnet50", (1, WIDTH, 1, 1)),
        ("GPT-2's layers", "gpt2", (1, WIDTH)),
    )
    for dtype in ("float32", "float32/bfloat16")
}


def runs_of(training: Training) -> dict[str, Callable[[], Callable[[], object]]]:
    """Return the preparations, which are not timed, of a training's forward, backward and step.

    Each returns the function to time.
    """

    def backward() -> Callable[[], object]:
        training.optimizer.zero_grad()
        return training.backward

    runs = {"forward": lambda: training.forward, "forward and backward": backward}
    if training.pruner:
        runs["step"] = lambda: partial(training.pruner.step, PROGRESS)
    return runs


def measure(task: Task, device: torch.device, budget: float) -> dict[str, object]:
    """Check a task, then time it on the host for `budget` seconds.

    Returns:
        The number of layers; seconds and quartiles by provider and what it does; and for each
        pruner the microseconds for each layer: those of forward and backward beyond the dense
        model's, and those of `step`.
    """
    trainings, result = checked_trainings(task, device)
    if not trainings:
        return result
    clock = host_clock_for(device)
    runs = {
        f"{name}: {what}": prepare
        for name, training in trainings.items()
        for what, prepare in runs_of(training).items()
    }
    estimates = {name: clock(prepare())[0] for name, prepare in runs.items()}
    providers = {name: lambda _, prepare=prepare: prepare() for name, prepare in runs.items()}
    timings = time_interleaved(providers, estimates, [None], clock, budget)
    seconds = {name: timing.median for name, timing in timings.items()}
    layers = len(trainings["eager"].pruner.layers)
    return result | {
        "layers": layers,
        "seconds": seconds,
        "quartiles": {name: timing.quartiles for name, timing in timings.items()},
        "host_us": {
            name: {
                what: (seconds[f"{name}: {what}"] - seconds.get(f"dense: {what}", 0)) / layers * 1e6
                for what in runs_of(trainings[name])
            }
            for name in PRUNERS
        },
    }


def describe(result: dict) -> str:
    """Return the microseconds for each layer in one line."""
    costs = [
        f"{name} {', '.join(f'{what} {us:.3g}' for what, us in costs.items())}"
        for name, costs in result["host_us"].items()
    ]
    step = result["seconds"]["pdp: step"] * 1e6
    return f"us for each of {result['layers']}: {'; '.join(costs)}. pruner.step {step:.4g} us"


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK",
        help=f"any of: {'; '.join(TASKS)}",
    )  # fmt: skip
    parser.add_argument("--budget", type=float, default=10.0, metavar="SECONDS", help="per task")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args(words)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


def main() -> int:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    environment = describe_environment(device)
    print(format_environment(environment), "\n", sep="")
    tasks = {
        name: partial(measure, TASKS[name], device, arguments.budget) for name in arguments.tasks
    }
    return measure_all("task", tasks, describe, environment, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
