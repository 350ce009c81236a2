"""Time constants of the Triton kernels: check every choice, and time it beside a copy.

`python -m benchmarks.sweep`, on a GPU. Rows are those of `python -m benchmarks`, with the choice as
input. The table lists the fastest choices first.
"""

import argparse
import importlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.batches import make_batches
from benchmarks.environment import describe_environment, device_is_lost
from benchmarks.measure import Bench
from benchmarks.report import copy_rates, format_environment, weight_dtype
from benchmarks.rows import ResultFiles, Row


class Sweep(NamedTuple):
    """Steps to time, and the values of constants in triton_kernels/FILE.py."""

    steps: tuple[str, ...]
    constants: dict[str, tuple[int, ...]]


SWEEPS = {
    "soft_mask": Sweep(
        ("forward", "backward"), {"BLOCK": (1024, 2048, 4096, 8192), "NUM_WARPS": (4, 8)}
    ),
    "soft_mask_nm": Sweep(("mask-2:4",), {"BLOCK": (1024, 2048, 4096), "NUM_WARPS": (2, 4, 8)}),
    "soft_mask_channel": Sweep(
        ("mask-channel",),
        {"ELEMENTS_PER_WARP": (256, 512, 1024), "TILES_PER_PIECE": (8, 16, 32)},
    ),
    # Wider tiles than 64 columns would be wrong for a matrix that ends inside a tile.
    "compress": Sweep(("pack-2:4",), {"NUM_WARPS": (2, 4, 8)}),
}

DTYPES = (torch.float32, torch.bfloat16)


def choices(file: str) -> Iterator[dict[str, int]]:
    """Yield all combinations of a file's constants."""
    names, values = zip(*SWEEPS[file].constants.items(), strict=True)
    return (dict(zip(names, each, strict=True)) for each in itertools.product(*values))


@contextmanager
def constants(file: str, choice: dict[str, int]) -> Iterator[None]:
    """Change the constants of a file inside the with block."""
    module = importlib.import_module(f"pdp_kernels.triton_kernels.{file}")
    before = {name: getattr(module, name) for name in choice}
    try:
        vars(module).update(choice)
        yield
    finally:
        vars(module).update(before)


def label(file: str, choice: dict[str, int]) -> str:
    """Return the name of a choice in the table."""
    return " ".join([file, *(f"{name}={value}" for name, value in choice.items())])


def run(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Yield the rows of each choice with w_hat in bfloat16; end early if the device is lost."""
    device = torch.device(arguments.device)
    bench = Bench(device, {"copy", "ours"}, arguments.budget, limit=float("inf"))
    for dtype in DTYPES:
        batches = make_batches(str(arguments.weights), dtype, device, sparsity=0.9)
        batches = [batch.masked_by("relative", torch.bfloat16) for batch in batches]
        for file in arguments.files:
            for choice in choices(file):
                with constants(file, choice):
                    for step in ("copy", *SWEEPS[file].steps):
                        rows = bench.measure(label(file, choice), step, batches)
                        yield rows
                        if any(row.is_error for row in rows) and device_is_lost(device):
                            return


def format_sweep(rows: Sequence[Row]) -> str:
    """Return the choices of each kernel, dtype and step by speed, then the rows in error."""
    copies = copy_rates(rows)
    timed = [row for row in rows if row.step != "copy" and row.median_s]
    width = max((len(row.input) for row in timed), default=0)
    kernels = dict.fromkeys((row.input.split()[0], row.step, row.dtype) for row in timed)
    lines = []
    for kernel, step, dtype in kernels:
        same = [r for r in timed if (r.input.split()[0], r.step, r.dtype) == (kernel, step, dtype)]
        for row in sorted(same, key=lambda row: row.median_s):
            copy = copies.get((row.input, weight_dtype(row)))
            of_copy = f"{row.gb_per_s / copy:.0%}" if copy else ""
            lines.append(
                f"{row.input:{width}} {step:12} {dtype:9}{row.median_s * 1e6:9.1f} us {of_copy:>5}"
            )
    errors = [f"{row.input} {row.step} {row.dtype}: {row.note}" for row in rows if row.is_error]
    return "\n".join(lines + errors)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep", description=__doc__.splitlines()[0]
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"any of: {', '.join(SWEEPS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument(
        "--weights",
        type=int,
        default=2**26,
        help="number, a multiple of 2048 (default: 2^26)",
    )
    parser.add_argument("--budget", type=float, default=0.1, metavar="SECONDS", help="per step")
    parser.add_argument("--out", type=Path, metavar="PATH", help="FILE.csv, FILE.json or a folder")
    arguments = parser.parse_args(words)
    unknown = set(arguments.files) - set(SWEEPS)
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such file of Triton kernels to sweep")
    arguments.files = arguments.files or list(SWEEPS)
    return arguments


def main() -> int:
    arguments = parse_arguments()
    environment = describe_environment(torch.device(arguments.device))
    print(format_environment(environment), "\n", sep="", flush=True)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    files = ResultFiles(arguments.out, environment, settings)
    rows = []
    for measured in run(arguments):
        rows += measured
        files.add(measured)
    print(format_sweep(rows))
    return 1 if any(row.is_error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
