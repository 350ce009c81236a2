"""A whole training step with PDP against the dense one, and the pruner's own part of it.

`python -m benchmarks.training_step`. A step is forward, backward, optimizer and, with PDP, the
thresholds; the same is written in eager PyTorch beside it. Before anything is timed, the gradients
of the two are checked against each other in float64.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.eager import kthvalue_threshold
from benchmarks.environment import describe_environment
from benchmarks.networks import NETWORKS
from benchmarks.report import format_environment, write_json
from benchmarks.timing import clock_for, time_interleaved
from pdp_kernels import PDPConfig, PDPPruner

SPARSITY = 0.9
RELATIVE_TAU = 0.1
CONFIG = PDPConfig(SPARSITY, scope="layer", relative_tau=RELATIVE_TAU, warmup=0, ramp=0)

# Of float64 gradients; the eager thresholds are float32.
TOLERANCE = 1e-5


class Block(nn.Module):
    """A transformer block as in GPT-2."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        joint = self.attention(self.norms[0](x)).view(batch, tokens, 3, self.heads, -1)
        query, key, value = joint.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """nanoGPT's character model: 6 blocks of width 384, 10.6 million weights in Linear layers."""

    def __init__(self, characters: int = 65, length: int = 256):
        super().__init__()
        self.tokens = nn.Embedding(characters, 384)
        self.positions = nn.Embedding(length, 384)
        self.blocks = nn.Sequential(*[Block(384, 6) for _ in range(6)])
        self.norm = nn.LayerNorm(384)
        self.head = nn.Linear(384, characters, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))


def mlp() -> nn.Module:
    """The 784-300-100-10 network of the MNIST examples."""
    layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
    return nn.Sequential(*layers)


def images(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 784), torch.randint(10, (batch,))


def text(batch: int, length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(65, (batch, length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@dataclass(frozen=True)
class Task:
    network: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    optimizer: Callable[..., torch.optim.Optimizer]


SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=1e-4)

TASKS = {
    "MLP 784-300-100-10, batch 128": Task(mlp, partial(images, 128), SGD),
    "MLP 784-300-100-10, batch 512": Task(mlp, partial(images, 512), SGD),
    "GPT 10.6M, 12 x 64 tokens": Task(GPT, partial(text, 12, 64), ADAMW),
    "GPT 10.6M, 64 x 256 tokens": Task(GPT, partial(text, 64, 256), ADAMW),
}
ON_GPU_ONLY = {"GPT 10.6M, 64 x 256 tokens"}


class EagerLayer(nn.Linear):
    """PDP in eager PyTorch: Eq. 1 at the layer's threshold; autograd derives its backward."""

    def forward(self, x: Tensor) -> Tensor:
        t = self.threshold
        mask = torch.sigmoid((self.weight**2 - t**2) / (RELATIVE_TAU * t**2))
        return functional.linear(x, mask * self.weight, self.bias)


class EagerPruner:
    """The thresholds of all layers, two kthvalue calls each."""

    def __init__(self, model: nn.Module):
        self.layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        for layer in self.layers:
            layer.__class__ = EagerLayer
        self.step(0)

    @torch.no_grad()
    def step(self, progress: float) -> None:
        for layer in self.layers:
            layer.threshold = kthvalue_threshold(layer.weight, SPARSITY)


PRUNERS = {"dense": None, "pdp": lambda model: PDPPruner(model, CONFIG), "eager": EagerPruner}


class Training:
    """One network in training on one batch."""

    def __init__(self, model: nn.Module, task: Task, batch: tuple[Tensor, Tensor], name: str):
        self.model = copy.deepcopy(model)
        self.inputs, self.targets = batch
        self.pruner = PRUNERS[name](self.model) if PRUNERS[name] else None
        self.optimizer = task.optimizer(self.model.parameters())

    def backward(self) -> None:
        outputs = self.model(self.inputs)
        functional.cross_entropy(outputs.flatten(0, -2), self.targets.flatten()).backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.pruner:
            self.pruner.step(1.0)


def difference(model: nn.Module, task: Task, batch: tuple[Tensor, Tensor]) -> float:
    """Of the gradients by the two ways of pruning, in float64, to the layer's largest."""
    inputs, targets = batch
    batch = (inputs.double() if inputs.is_floating_point() else inputs, targets)
    trainings = [Training(model.double(), task, batch, name) for name in ("pdp", "eager")]
    for training in trainings:
        training.backward()
    pairs = zip(*(training.model.parameters() for training in trainings), strict=True)
    gradients = [(own.grad, other.grad) for own, other in pairs]
    return max(((own - other).abs().max() / other.abs().max()).item() for own, other in gradients)


def measure(task: Task, device: torch.device, budget: float) -> dict[str, object]:
    torch.manual_seed(0)
    model = task.network().to(device)
    batch = tuple(part.to(device) for part in task.batch())
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
    """pruner.step on the layers of GPT-2 against a loop of eager thresholds."""
    torch.manual_seed(0)
    shapes = [shape for shape, _ in NETWORKS["gpt2"]()]
    layers = [nn.Linear(shape[1], shape[0], bias=False, device=device) for shape in shapes]
    model = nn.Sequential(*layers)
    pruner = PDPPruner(model, CONFIG)

    @torch.no_grad()
    def eager() -> list[Tensor]:
        return [kthvalue_threshold(layer.weight, SPARSITY) for layer in model]

    pruner.step(1.0)
    found = torch.stack(list(pruner.state_dict()["thresholds"].values()))
    if not torch.equal(found, torch.stack(eager())):
        return {"note": "wrong: the thresholds differ"}
    return ratios({"pdp": lambda: pruner.step(1.0), "eager": eager}, "pdp", device, budget)


def ratios(
    runs: dict[str, Callable[[], object]], base: str, device: torch.device, budget: float
) -> dict[str, object]:
    """Median seconds of each, and how many times the base's they are."""
    clock = clock_for(device)
    providers = {name: lambda _, run=run: run for name, run in runs.items()}
    estimates = {name: clock(run)[0] for name, run in runs.items()}
    timings = time_interleaved(providers, estimates, [None], clock, budget)
    return {
        "seconds": {name: timing.median for name, timing in timings.items()},
        "quartiles": {name: timing.quartiles for name, timing in timings.items()},
        "ratios": {name: timing.median / timings[base].median for name, timing in timings.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_step", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--budget", type=float, default=10.0, metavar="SECONDS", help="per task")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(arguments.device)
    environment = describe_environment(device)
    print(format_environment(environment), "\n", sep="")
    measurements = {
        name: partial(measure, task)
        for name, task in TASKS.items()
        if device.type == "cuda" or name not in ON_GPU_ONLY
    }
    measurements["pruner.step, GPT-2"] = measure_thresholds
    rows = []
    for name, run in measurements.items():
        result = {"task": name} | run(device, arguments.budget)
        rows.append(result)
        if "note" in result:
            print(f"{name}: {result['note']}")
            continue
        parts = [
            f"{provider} {seconds * 1e3:.4g} ms ({result['ratios'][provider]:.3g}x)"
            for provider, seconds in result["seconds"].items()
        ]
        print(f"{name}: {', '.join(parts)}")
    if arguments.out:
        write_json(arguments.out, {"environment": environment, "rows": rows})
    return 1 if any("note" in result for result in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
