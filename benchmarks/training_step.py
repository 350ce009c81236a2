"""Time whole training steps: dense, with PDP, and with PDP in eager PyTorch and torch.compile.

`python -m benchmarks.training_step`. A step is forward, backward, optimizer and, with PDP, the
thresholds, which are also timed alone. PDP has its recommended setting, after the ramp. "eager"
computes the same in eager PyTorch, and "compiled" has Eq. 1 through torch.compile. Before anything
is timed, the gradients with PDP are checked against those of eager PyTorch in float64.
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

from benchmarks import eager
from benchmarks.environment import describe_environment
from benchmarks.layer_shapes import NETWORKS
from benchmarks.masks import Mask
from benchmarks.measure import measure_all
from benchmarks.report import format_environment
from benchmarks.steps import SoftMask
from benchmarks.timing import DeviceClock, clock_for, time_interleaved
from pdp_kernels import PDPConfig, PDPPruner
from studies.networks import character_gpt, gpt2, mlp, resnet50

SPARSITY = 0.9
# Of each layer: once a global budget is allocated, a step takes the same time.
CONFIG = PDPConfig.for_epochs(SPARSITY, epochs=1.0, scope="layer")
PROGRESS = 0.9  # all layers are at full sparsity, and the temperature still falls

# The longest step with PDP that we aim at, relative to the dense step.
GOAL = 1.15
# Seconds that a GPU waits at most for the host to get ahead of a whole step.
LONGEST_LEAD = 0.2

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
    select = eager.sort_threshold if weight.is_cuda else eager.kthvalue_threshold
    return select(weight, SPARSITY)


class EagerLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        w_hat = self.soft_mask(self.weight, self.threshold, self.mask)
        return functional.linear(x, w_hat, self.bias)


class EagerConvolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w_hat = self.soft_mask(self.weight, self.threshold, self.mask)
        return self._conv_forward(x, w_hat, self.bias)


class EagerPruner:
    """Masks all layers by a function in PyTorch, with thresholds one by one.

    Args:
        model: Changed in place.
        autocast: Whether the model computes in bfloat16.
        soft_mask: Returns a masked weight.
    """

    def __init__(self, model: nn.Module, autocast: bool, soft_mask: SoftMask):
        classes = {nn.Linear: EagerLinear, nn.Conv2d: EagerConvolution}
        self.layers = [layer for layer in model.modules() if type(layer) in classes]
        weight = self.layers[0].weight
        double = weight.dtype == torch.float64
        self.tau = weight.new_empty((), dtype=torch.float64 if double else torch.float32)
        out_dtype = torch.bfloat16 if autocast and not double else weight.dtype
        mask = Mask("relative", self.tau, relative=True, out_dtype=out_dtype)
        for layer in self.layers:
            layer.__class__ = classes[type(layer)]
            layer.soft_mask, layer.mask = soft_mask, mask
        self.step(PROGRESS)

    @torch.no_grad()
    def step(self, progress: float) -> None:
        self.tau.fill_(CONFIG.temperature_at(CONFIG.plan().temperatures, progress))
        for layer in self.layers:
            layer.threshold = eager_threshold(layer.weight)


def compiled_soft_mask(weight: Tensor, threshold: Tensor, mask: Mask) -> Tensor:
    """Return Eq. 1 through torch.compile, one kernel for all shapes, in the order of memory."""
    if weight.dim() == 4 and not weight.is_contiguous():  # channels_last
        weight = weight.permute(0, 2, 3, 1)
        return eager.compiled_soft_mask(weight, threshold, mask).permute(0, 3, 1, 2)
    return eager.compiled_soft_mask(weight, threshold, mask)


# Each masks a model that may compute under autocast.
PRUNERS = {
    "pdp": lambda model, autocast: PDPPruner(model, CONFIG),
    "eager": partial(EagerPruner, soft_mask=eager.soft_mask),
    "compiled": partial(EagerPruner, soft_mask=compiled_soft_mask),
}


class Training:
    """A network in training on one batch, "dense" or with one of PRUNERS."""

    def __init__(self, model: nn.Module, task: Task, batch: tuple[Tensor, Tensor], name: str):
        self.model = copy.deepcopy(model)
        self.inputs, self.targets = batch
        self.pruner = PRUNERS[name](self.model, task.autocast) if name != "dense" else None
        if self.pruner:
            self.pruner.step(PROGRESS)
        self.optimizer = task.optimizer(self.model.parameters())
        self.autocast = task.autocast

    def forward(self) -> Tensor:
        """Return the loss."""
        with torch.autocast(self.inputs.device.type, torch.bfloat16, enabled=self.autocast):
            outputs = self.model(self.inputs)
            return functional.cross_entropy(outputs.flatten(0, -2), self.targets.flatten())

    def backward(self) -> None:
        """Compute the loss and its gradients."""
        self.forward().backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.pruner:
            self.pruner.step(PROGRESS)


def difference(model: nn.Module, task: Task, batch: tuple[Tensor, Tensor]) -> float:
    """Return the largest gradient difference to eager PyTorch, relative to the layer's maximum.

    In float64 and at our thresholds: where a batch norm sees few values, gradients amplify small
    differences of thresholds. Infinite if thresholds differ by more than rounding to float32.
    """
    inputs, targets = (tensor[: task.checked] for tensor in batch)
    batch = (inputs.double() if inputs.is_floating_point() else inputs, targets)
    trainings = {name: Training(model.double(), task, batch, name) for name in PRUNERS}
    thresholds = trainings["pdp"].pruner.state_dict()["thresholds"].values()
    for name in ("eager", "compiled"):
        for layer, threshold in zip(trainings[name].pruner.layers, thresholds, strict=True):
            if not torch.isclose(layer.threshold.double(), threshold, THRESHOLD_TOLERANCE, 0):
                return float("inf")
            layer.threshold = threshold
    for training in trainings.values():
        training.backward()
    parameters = zip(*(t.model.parameters() for t in trainings.values()), strict=True)
    gradients = [dict(zip(trainings, (p.grad for p in each), strict=True)) for each in parameters]
    return max(
        ((own[name] - own["eager"]).abs().max() / own["eager"].abs().max()).item()
        for own in gradients
        for name in ("pdp", "compiled")
    )


def checked_trainings(
    task: Task, device: torch.device
) -> tuple[dict[str, Training], dict[str, object]]:
    """Return the trainings of a task, warmed up, and what a result says of their gradients.

    If gradients are wrong there are no trainings, and a "note".
    """
    torch.manual_seed(0)
    model = task.network().to(device)
    batch = tuple(tensor.to(device) for tensor in task.batch())
    found = difference(copy.deepcopy(model), task, batch)
    if not found <= TOLERANCE:
        return {}, {"note": f"wrong: gradients differ by {found:.3g} of the largest"}
    trainings = {name: Training(model, task, batch, name) for name in ("dense", *PRUNERS)}
    for training in trainings.values():
        training.step()
    return trainings, {"difference": found}


def measure(task: Task, device: torch.device, budget: float) -> dict[str, object]:
    """Check a task, then time its steps for `budget` seconds."""
    trainings, checked = checked_trainings(task, device)
    if not trainings:
        return checked
    runs = {name: training.step for name, training in trainings.items()}
    runs |= {"pdp's step": lambda: trainings["pdp"].pruner.step(PROGRESS)}
    return ratios(runs, "dense", device, budget) | checked | {"goal": GOAL}


def measure_thresholds(device: torch.device, budget: float) -> dict[str, object]:
    """Time `pruner.step` on the layers of GPT-2 against a loop of eager thresholds."""
    torch.manual_seed(0)
    shapes = [shape for shape, _ in NETWORKS["gpt2"]()]
    layers = [nn.Linear(shape[1], shape[0], bias=False, device=device) for shape in shapes]
    model = nn.Sequential(*layers)
    pruner = PDPPruner(model, CONFIG)

    @torch.no_grad()
    def one_by_one() -> list[Tensor]:
        return [eager_threshold(layer.weight) for layer in model]

    def ours() -> None:
        pruner.step(PROGRESS)

    ours()
    found = torch.stack(list(pruner.state_dict()["thresholds"].values()))
    if not torch.equal(found, torch.stack(one_by_one())):
        return {"note": "wrong: the thresholds differ"}
    return ratios({"pdp": ours, "eager": one_by_one}, "pdp", device, budget)


def ratios(
    runs: dict[str, Callable[[], object]], base: str, device: torch.device, budget: float
) -> dict[str, object]:
    """Return median seconds, quartiles, and medians relative to the base.

    On a GPU the keys that begin with "device_" leave out what the device waits for the host.
    """
    providers = {name: lambda _, run=run: run for name, run in runs.items()}
    clocks = {"": clock_for(device)}
    if device.type == "cuda":
        clocks["device_"] = DeviceClock(longest=LONGEST_LEAD)
    result: dict[str, object] = {}
    for begin, clock in clocks.items():
        estimates = {name: clock(run)[0] for name, run in runs.items()}
        timings = time_interleaved(providers, estimates, [None], clock, budget / len(clocks))
        medians = {name: timing.median for name, timing in timings.items()}
        result[f"{begin}seconds"] = medians
        result[f"{begin}quartiles"] = {name: timing.quartiles for name, timing in timings.items()}
        result[f"{begin}ratios"] = {name: one / medians[base] for name, one in medians.items()}
    return result


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
    if "goal" in result:
        met = "met" if result["ratios"]["pdp"] <= result["goal"] else "missed"
        times.append(f"goal {result['goal']}x {met}")
    for provider, ratio in result.get("device_ratios", {}).items():
        times.append(f"{provider} on the device alone {ratio:.3g}x")
    return ", ".join(times)


if __name__ == "__main__":
    sys.exit(main())
