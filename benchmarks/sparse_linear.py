"""Time 2:4 linear layers on sparse tensor cores against dense ones.

`python -m benchmarks.sparse_linear`, on a GPU. Both compute x W^T in bfloat16 with the same W that
hard_mask_nm pruned. The sparse product is checked against the dense one before either is timed. The
speedup is dense over sparse.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.environment import describe_environment
from benchmarks.measure import measure_all
from benchmarks.report import format_environment
from benchmarks.timing import Timing, device_clock_for, time_interleaved
from pdp_kernels import hard_mask_nm, to_semi_structured

# (rows of x, in_features, out_features)
SHAPES = {
    "7B attention, 4096 tokens": (4096, 4096, 4096),
    "7B MLP up, 4096 tokens": (4096, 4096, 11008),
    "7B MLP down, 4096 tokens": (4096, 11008, 4096),
    "7B MLP up, 16 tokens": (16, 4096, 11008),
    "GPT-2 MLP up, 8192 tokens": (8192, 768, 3072),
    "GPT-2 MLP down, 8192 tokens": (8192, 3072, 768),
    "ResNet-50 1x1 512-128, batch 128": (128 * 28 * 28, 512, 128),
    "ResNet-50 1x1 1024-256, batch 128": (128 * 14 * 14, 1024, 256),
    "ResNet-50 1x1 512-2048, batch 128": (128 * 7 * 7, 512, 2048),
}

# The sums have the same bfloat16 products in another order, and are rounded to bfloat16 once.
TOLERANCE = 2**-7


def layers(inputs: int, outputs: int, device: torch.device) -> dict[str, nn.Linear]:
    """Return a dense and a semi-structured layer with the same 2:4 weight."""
    dense = nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.bfloat16)
    dense.requires_grad_(False)
    dense.weight *= hard_mask_nm(dense.weight, 2, 4)
    sparse = copy.deepcopy(dense)
    to_semi_structured(sparse)
    return {"dense": dense, "2:4": sparse}


def difference(answers: dict[str, Tensor]) -> float:
    """Return the largest difference of the products, relative to the largest element."""
    dense = answers["dense"].float()
    return ((answers["2:4"].float() - dense).abs().max() / dense.abs().max()).item()


@torch.no_grad()
def measure(rows: int, inputs: int, outputs: int, budget: float) -> dict[str, object]:
    """Check one shape, then time it for `budget` seconds."""
    device = torch.device("cuda")
    providers = layers(inputs, outputs, device)
    activations = [torch.randn(rows, inputs, device=device, dtype=torch.bfloat16) for _ in range(4)]
    answers = {name: layer(activations[0]) for name, layer in providers.items()}
    wrong = difference(answers)
    if not wrong <= TOLERANCE:
        return {"note": f"wrong: the products differ by {wrong:.3g} of the largest element"}
    runs = {name: lambda x, layer=layer: partial(layer, x) for name, layer in providers.items()}
    clock = device_clock_for(device)
    estimates = {name: clock(run(activations[0]))[0] for name, run in runs.items()}
    timings = time_interleaved(runs, estimates, activations, clock, budget)
    return row(timings, (rows, inputs, outputs)) | {"difference": wrong}


def row(timings: dict[str, Timing], shape: tuple[int, int, int]) -> dict[str, object]:
    """Return the figures of one shape. Both rates count the operations of the dense product."""
    dense, sparse = timings["dense"].median, timings["2:4"].median
    operations = 2 * prod(shape)
    return {
        "sizes": shape,
        "dense_s": dense,
        "sparse_s": sparse,
        "speedup": dense / sparse,
        "dense_tflop_per_s": operations / dense / 1e12,
        "sparse_tflop_per_s": operations / sparse / 1e12,
    }


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sparse_linear", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--budget", type=float, default=1.0, metavar="SECONDS", help="per shape")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser.parse_args(words)


def main() -> int:
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        print("sparse tensor cores need a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    environment = describe_environment(torch.device("cuda"))
    print(format_environment(environment), "\n", sep="")
    shapes = {name: partial(measure, *shape, arguments.budget) for name, shape in SHAPES.items()}
    return measure_all("shape", shapes, describe, environment, arguments.out)


def describe(result: dict) -> str:
    """Return the figures of a shape in one line."""
    return (
        "dense {dense_s:.4g} s, 2:4 {sparse_s:.4g} s, {speedup:.3g}x, "
        "{sparse_tflop_per_s:.4g} TFLOP/s".format(**result)
    )


if __name__ == "__main__":
    sys.exit(main())
