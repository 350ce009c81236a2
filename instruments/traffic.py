"""Count the memory traffic of the CUDA operators, on a CPU: `python -m instruments.traffic`.

The sources of the kernels run on the CUDA model of instruments/host_cuda, compiled so that every
access is counted: bytes read and written in device memory by buffer and launch, and with
`--requests` how many 32-byte sectors a warp's request touches and how many passes over the banks of
shared memory it needs. There is no clock, so the figures are the same on every machine.

Bytes are those that kernels request. Caches serve most of those of the table and of histograms, and
hardly any of those of the weights.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.layer_shapes import NETWORKS
from instruments.host_build import CountingBuild, Counts
from pdp_kernels.ops import reference

SPARSITY = 0.9
MULTIPROCESSORS = 132  # H100, H200

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

INPUTS = {
    "1e6": lambda: [1_000_000],
    "2^22": lambda: [1 << 22],
    "resnet50": lambda: [shape.numel() for shape in map(torch.Size, _shapes("resnet50"))],
    "300 x 50,000": lambda: [50_000] * 300,
}


def _shapes(network: str) -> list[Sequence[int]]:
    return [shape for shape, _ in NETWORKS[network]()]


class Row(NamedTuple):
    """The traffic of one operator for one input. `floor` is the least of any implementation."""

    operator: str
    input: str
    dtype: str
    launches: int
    floor: float
    total: float
    by_buffer: dict[str, float]
    """Bytes of device memory per weight, in total and by buffer."""
    atomics: float
    """Atomics in device memory per weight."""
    workspace: int
    """Bytes."""
    stale_loads: int
    """Loads through the read-only path of memory that a kernel had written: each is a defect."""
    counts: Counts


def operators(
    build: CountingBuild, weights: list[Tensor]
) -> Iterator[tuple[str, float, Callable[[], object]]]:
    """Yield the name of each operator, its floor in bytes per weight, and a call."""
    size = weights[0].element_size()
    prune_counts = [round(SPARSITY * weight.numel()) for weight in weights]
    yield "thresholds", size, lambda: build.thresholds(weights, prune_counts)
    if len(weights) == 1:
        yield "hard_mask", 2 * size + 1, lambda: build.hard_mask(weights[0], prune_counts[0])
    bits = reference.DIGIT_BITS[size]
    for digit in range(len(bits)):
        keys = torch.stack([weight[0].abs() for weight in weights])
        prefixes = reference.magnitude_keys(keys).long() >> sum(bits[digit:])
        yield (
            f"digit_counts, digit {digit}",
            size,
            lambda prefixes=prefixes, digit=digit: build.digit_counts(weights, prefixes, digit),
        )
    masks = [None] * len(weights)
    yield "power_sums", size, lambda: build.power_sums(weights, masks, 0.5, 1.0, False)
    mask = (torch.full((len(weights),), 0.03), torch.full((len(weights),), 0.3), True)
    yield "soft_mask_list", 2 * size, lambda: build.soft_mask_list(weights, *mask, None)
    grads = [weight.clone() for weight in weights]
    yield (
        "soft_mask_list_backward",
        3 * size,
        lambda: build.soft_mask_list_backward(grads, weights, *mask),
    )


def measure(
    build: CountingBuild,
    input_name: str,
    sizes: Sequence[int],
    dtype: str,
    names: Sequence[str] = (),
    trace: bool = False,
) -> Iterator[Row]:
    """Yield a row for each operator (all, or those with a name that begins with one of `names`)."""
    generator = torch.Generator().manual_seed(0)
    weights = [(0.02 * torch.randn(size, generator=generator)).to(DTYPES[dtype]) for size in sizes]
    numel = sum(sizes)
    for operator, floor, call in operators(build, weights):
        if names and not operator.startswith(tuple(names)):
            continue
        counts = build.count(call, trace)
        buffers = dict.fromkeys(row.buffer for row in counts.bytes if row.buffer != "shared memory")
        in_memory = [row for row in counts.bytes if row.buffer != "shared memory"]
        yield Row(
            operator,
            input_name,
            dtype,
            counts.launches,
            floor,
            counts.moved() / numel,
            {buffer: counts.moved(buffer) / numel for buffer in buffers},
            sum(row.atomics for row in in_memory) / numel,
            counts.workspace_bytes,
            counts.stale_loads,
            counts,
        )


HEAD = (
    f"{'operator':23}{'input':14}{'dtype':10}{'launches':>8}{'B/weight':>10}{'floor':>7}"
    f"{'workspace':>12}  of which"
)


def format_row(row: Row) -> str:
    each = ", ".join(f"{buffer} {value:.3g}" for buffer, value in row.by_buffer.items())
    stale = f"; {row.stale_loads} STALE READ-ONLY LOADS" if row.stale_loads else ""
    return (
        f"{row.operator:23}{row.input:14}{row.dtype:10}{row.launches:8}{row.total:10.2f}"
        f"{row.floor:7.3g}{row.workspace / 1e6:9.2f} MB  {each}; {row.atomics:.2g} atomics{stale}"
    )


def format_requests(row: Row) -> Iterator[str]:
    """Yield a line for each kernel, memory and kind of access."""
    for request in row.counts.requests:
        lane_bytes = request.bytes / request.count
        cost, unit = request.cost / request.count, "passes" if request.shared else "sectors"
        memory = "shared" if request.shared else "device"
        yield (
            f"  {request.launch} {request.kernel:24}{memory:7}{request.kind:7}"
            f"{request.count:10,} requests of {lane_bytes:5.0f} B: {cost:5.2f} {unit}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m instruments.traffic", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--operators", nargs="+", default=[], help="begins of their names")
    parser.add_argument("--requests", action="store_true", help="sectors and passes; slow")
    parser.add_argument("--multiprocessors", type=int, default=MULTIPROCESSORS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    chosen = parser.parse_args(arguments)
    build = CountingBuild()
    build.device(multiprocessors=chosen.multiprocessors)
    rows = []
    print(HEAD)
    for name in chosen.inputs:
        for dtype in chosen.dtypes:
            sizes = INPUTS[name]()
            for row in measure(build, name, sizes, dtype, chosen.operators, chosen.requests):
                print(format_row(row), *format_requests(row), sep="\n", flush=True)
                rows.append(row)
    if chosen.json:
        kept = [{k: v for k, v in row._asdict().items() if k != "counts"} for row in rows]
        chosen.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 1 if any(row.stale_loads for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
