"""Time whole training steps: dense, with PDP, and with PDP in eager PyTorch.

`python -m benchmarks.training_step`. A step is forward, backward, optimizer and, with PDP, the
thresholds, which are also timed alone. Before anything is timed, the gradients with PDP are checked
against those of eager PyTorch in float64.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.eager import kthvalue_threshold, sort_threshold
from benchmarks.environment import describe_environment
from benchmarks.layer_shapes import NETWORKS
from benchmarks.measure import measure_all
from benchmarks.report import format_environment
from benchmarks.timing import clock_for, time_interleaved
from pdp_kernels import PDPConfig, PDPPruner
from studies.networks import character_gpt, gpt2, mlp, resnet50

SPARSITY = 0.9
RELATIVE_TAU = 0.1
CONFIG = PDPConfig(SPARSITY, scope="layer", relative_tau=RELATIVE_TAU, warmup=0, ramp=0)

# Allowed differences: of float64 gradients at the same thresholds, relative to the layer's largest
# gradient; and of thresholds, which eager computes in float32.
TOLERANCE = 1e-8
THRESHOLD_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Task:
    """A network with its batches.

    Attributes:
        network: Makes the network.
        batch: Makes inputs and targets.
        optimizer: Makes the optimizer of parameters.
        autocast: Whether to compute in bfloat16.
        on_gpu_only: Whether a step takes too long on a CPU.
        checked: Examples of a batch on which gradients are checked in float64.
    """

    network: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    optimizer: Callable[..., torch.optim.Optimizer]
    autocast: bool = False
    on_gpu_only: bool = False
    checked: int = 16


def random_digits(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 784), torch.randint(10, (batch,))


def random_photographs(batch: int, size: int) -> tuple[Tensor, Tensor]:
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    return images, torch.randint(1000, (batch,))


def random_text(vocabulary: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(vocabulary, (batch, length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=1e-4)
MNIST_MLP = partial(mlp, 784, 300, 100, 10)

TASKS = {
    "MLP 784-300-100-10, batch 128": Task(MNIST_MLP, partial(random_digits, 128), SGD),
    "MLP 784-300-100-10, batch 512": Task(MNIST_MLP, partial(random_digits, 512), SGD),
    "GPT 10.6M, 12 x 64 tokens": Task(character_gpt, partial(random_text, 65, 12, 64), ADAMW),
    "GPT 10.6M, 64 x 256 tokens": Task(
        character_gpt, partial(random_text, 65, 64, 256), ADAMW, on_gpu_only=True
    ),
    "ResNet-50, 128 images, bfloat16": Task(
        resnet50, partial(random_photographs, 128, 224), SGD, autocast=True, on_gpu_only=True
    ),
    "GPT-2 124M, 8 x 1024 tokens, bfloat16": Task(
        gpt2,
        partial(random_text, 50257, 8, 1024),
        ADAMW,
        autocast=True,
        on_gpu_only=True,
        checked=2,
    ),
}


def eager_threshold(weight: Tensor) -> Tensor:
    """Return the threshold by the faster way of PyTorch: on a GPU kthvalue runs in one block."""
    select = sort_threshold if weight.is_cuda else kthvalue_threshold
    return select(weight, SPARSITY)


def eager_weight(layer: nn.Module) -> Tensor:
    """Return the weight masked in eager PyTorch by Eq. 1; autograd derives the backward."""
    t = layer.threshold
    return torch.sigmoid((layer.weight**2 - t**2) / (RELATIVE_TAU * t**2)) * layer.weight


class EagerLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, eager_weight(self), self.bias)


class EagerConvolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, eager_weight(self), self.bias)


class EagerPruner:
    """Masks all layers in eager PyTorch, with thresholds one by one."""

    def __init__(self, model: nn.Module):
        classes = {nn.Linear: EagerLinear, nn.Conv2d: EagerConvolution}
        self.layers = [layer for layer in model.modules() if type(layer) in classes]
        for layer in self.layers:
            layer.__class__ = classes[type(layer)]
        self.step(0)

    @torch.no_grad()
    def step(self, progress: float) -> None:
        for layer in self.layers:
            layer.threshold = eager_threshold(layer.weight)


PRUNERS = {"dense": None, "pdp": lambda model: PDPPruner(model, CONFIG), "eager": EagerPruner}


class Training:
    """A network in training on one batch, dense or with one of PRUNERS."""

    def __init__(self, model: nn.Module, task: Task, batch: tuple[Tensor, Tensor], name: str):
        self.model = copy.deepcopy(model)
        self.inputs, self.targets = batch
        self.pruner = PRUNERS[name](self.model) if PRUNERS[name] else None
        self.optimizer = task.optimizer(self.model.parameters())
        self.autocast = task.autocast

    def backward(self) -> None:
        with torch.autocast(self.inputs.device.type, torch.bfloat16, enabled=self.autocast):
            outputs = self.model(self.inputs)
            loss = functional.cross_entropy(outputs.flatten(0, -2), self.targets.flatten())
        loss.backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.pruner:
            self.pruner.step(1.0)


def difference(model: nn.Module, task: Task, batch: tuple[Tensor, Tensor]) -> float:
    """Return the largest gradient difference, ours against eager, relative to the layer's maximum.

    In float64 and at our thresholds: where a batch norm sees few values, gradients amplify small
    differences of thresholds. Infinite if thresholds differ by more than rounding to float32.
    """
    inputs, targets = (tensor[: task.checked] for tensor in batch)
    batch = (inputs.double() if inputs.is_floating_point() else inputs, targets)
    ours, eager = (Training(model.double(), task, batch, name) for name in ("pdp", "eager"))
    thresholds = ours.pruner.state_dict()["thresholds"].values()
    for layer, threshold in zip(eager.pruner.layers, thresholds, strict=True):
        if not torch.isclose(layer.threshold.double(), threshold, THRESHOLD_TOLERANCE, 0):
            return float("inf")
        layer.threshold = threshold
    ours.backward()
    eager.backward()
    pairs = zip(ours.model.parameters(), eager.model.parameters(), strict=True)
    gradients = [(own.grad, other.grad) for own, other in pairs]
    return max(((own - other).abs().max() / other.abs().max()).item() for own, other in gradients)


def measure(task: Task, device: torch.device, budget: float) -> dict[str, object]:
    """Check a task, then time its steps for `budget` seconds."""
    torch.manual_seed(0)
    model = task.network().to(device)
    batch = tuple(tensor.to(device) for tensor in task.batch())
    wrong = difference(copy.deepcopy(model), task, batch)
    if not wrong <= TOLERANCE:
        return {"note": f"wrong: gradients differ by {wrong:.3g} of the largest"}
    trainings = {name: Training(model, task, batch, name) for name in PRUNERS}
    for training in trainings.values():
        training.step()
    runs = {name: training.step for name, training in trainings.items()}
    runs |= {"pdp's step": lambda: trainings["pdp"].pruner.step(1.0)}
    return ratios(runs, "dense", device, budget) | {"difference": wrong}


def measure_thresholds(device: torch.device, budget: float) -> dict[str, object]:
    """Time `pruner.step` on the layers of GPT-2 against a loop of eager thresholds."""
    torch.manual_seed(0)
    shapes = [shape for shape, _ in NETWORKS["gpt2"]()]
    layers = [nn.Linear(shape[1], shape[0], bias=False, device=device) for shape in shapes]
    model = nn.Sequential(*layers)
    pruner = PDPPruner(model, CONFIG)

    @torch.no_grad()
    def eager() -> list[Tensor]:
        return [eager_threshold(layer.weight) for layer in model]

    pruner.step(1.0)
    found = torch.stack(list(pruner.state_dict()["thresholds"].values()))
    if not torch.equal(found, torch.stack(eager())):
        return {"note": "wrong: the thresholds differ"}
    return ratios({"pdp": lambda: pruner.step(1.0), "eager": eager}, "pdp", device, budget)


def ratios(
    runs: dict[str, Callable[[], object]], base: str, device: torch.device, budget: float
) -> dict[str, object]:
    """Return median seconds, quartiles, and medians relative to the base."""
    clock = clock_for(device)
    providers = {name: lambda _, run=run: run for name, run in runs.items()}
    estimates = {name: clock(run)[0] for name, run in runs.items()}
    timings = time_interleaved(providers, estimates, [None], clock, budget)
    return {
        "seconds": {name: timing.median for name, timing in timings.items()},
        "quartiles": {name: timing.quartiles for name, timing in timings.items()},
        "ratios": {name: timing.median / timings[base].median for name, timing in timings.items()},
    }


MEASUREMENTS = {name: partial(measure, task) for name, task in TASKS.items()}
MEASUREMENTS["pruner.step, GPT-2"] = measure_thresholds


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_step", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=MEASUREMENTS, metavar="TASK",
        help=f"any of: {'; '.join(MEASUREMENTS)} (default: all that the device can do)",
    )  # fmt: skip
    parser.add_argument("--budget", type=float, default=10.0, metavar="SECONDS", help="per task")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args(words)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.tasks is None:
        too_long = {name for name, task in TASKS.items() if task.on_gpu_only}
        skipped = too_long if arguments.device == "cpu" else set()
        arguments.tasks = [name for name in MEASUREMENTS if name not in skipped]
    return arguments


def main() -> int:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    environment = describe_environment(device)
    print(format_environment(environment), "\n", sep="")
    tasks = {
        name: partial(MEASUREMENTS[name], device, arguments.budget) for name in arguments.tasks
    }
    return measure_all("task", tasks, describe, environment, arguments.out)


def describe(result: dict) -> str:
    """Return the times of a task in one line."""
    times = [
        f"{provider} {seconds * 1e3:.4g} ms ({result['ratios'][provider]:.3g}x)"
        for provider, seconds in result["seconds"].items()
    ]
    return ", ".join(times)


if __name__ == "__main__":
    sys.exit(main())
