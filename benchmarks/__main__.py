"""Command line of the benchmark."""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.batches import make_batches
from benchmarks.environment import describe_environment, device_is_lost
from benchmarks.layer_shapes import NETWORKS
from benchmarks.masks import DTYPES, NAMES
from benchmarks.measure import Bench, note_of
from benchmarks.report import (
    HOST_TITLE,
    describe,
    format_environment,
    format_headlines,
    format_host_table,
    format_table,
)
from benchmarks.rows import ResultFiles, Row
from benchmarks.steps import STEPS

PROVIDERS = list(dict.fromkeys(name for step in STEPS.values() for name in step.providers))

STEPS_BY_DEFAULT = ["copy", "threshold", "mask", "step"]
INPUTS_QUICK = ["65536", "2359296", "resnet50"]
INPUTS_ON_CPU = ["4096", "65536", "2359296", "digits", "resnet50", "gpt2"]
INPUTS_ON_GPU = [
    *("4096", "65536", "1048576", "2359296", "16777216", "100000000"),
    *("digits", "resnet50", "mobilenet-v1", "bert-base", "gpt2"),
]
# On a CPU these are no faster than the eager providers, and take most of the time of a run.
PROVIDERS_ON_GPU_ONLY = {"one-topk", "sort", "autotuned", "compiled-sort"}


def parse_input(text: str) -> str:
    """Parse a network, "digits", or a number of weights such as 65536 or 4e6."""
    if text in NETWORKS or text == "digits":
        return text
    try:
        return str(int(float(text)))
    except ValueError:
        choices = ", ".join([*NETWORKS, "digits"])
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number nor one of {choices}"
        ) from None


def parse_sparsity(text: str) -> float:
    """Parse a sparsity between 0 and 1."""
    sparsity = float(text)
    if not 0 < sparsity < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return sparsity


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time PDP's steps against eager PyTorch and torch.compile. Every answer is "
        "checked in float64 before it is timed; a wrong one makes the exit status 1.",
    )
    parser.add_argument(
        "--inputs", nargs="+", type=parse_input, metavar="INPUT",
        help=f"numbers of weights (65536, 4e6) or any of: {', '.join(NETWORKS)}, digits",
    )  # fmt: skip
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS_BY_DEFAULT)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS)
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES,
        help="of the weight, or of weight/w_hat as under autocast (default: float32 and "
        "float32/bfloat16, or float32 if --quick)",
    )  # fmt: skip
    parser.add_argument(
        "--masks", nargs="+", choices=NAMES, default=["relative"],
        help="relative: relative_tau = 0.1 as a tensor on the device, as PDPPruner computes; "
        "paper: tau = 1e-4 as a number (default: relative)",
    )  # fmt: skip
    parser.add_argument("--sparsity", type=parse_sparsity, default=0.9, metavar="R")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="a short run: about a minute")
    parser.add_argument(
        "--budget", type=float, default=2.0, metavar="SECONDS",
        help="time per step and input; each provider runs at least three times (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=float, default=3.0, metavar="SECONDS",
        help="skip a provider whose single run takes longer, unless it is the base (default: 3)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="FILE.csv, FILE.json, or a folder for both"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="speedup over eager, first mask"
    )
    arguments = parser.parse_args(words)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = arguments.device == "cuda"
    has_digits = find_spec("sklearn") is not None
    if arguments.inputs is None:
        defaults = INPUTS_ON_GPU if on_gpu else INPUTS_ON_CPU
        defaults = INPUTS_QUICK if arguments.quick else defaults
        arguments.inputs = [name for name in defaults if name != "digits" or has_digits]
    elif "digits" in arguments.inputs and not has_digits:
        parser.error("the input digits needs scikit-learn: pip install scikit-learn")
    if arguments.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    for package in ("tqdm",) if on_gpu else ("numpy", "tqdm"):
        if find_spec(package) is None:
            parser.error(f"a run needs {package}: pip install {package}")
    if arguments.dtypes is None:
        arguments.dtypes = ["float32"] if arguments.quick else ["float32", "float32/bfloat16"]
    if arguments.providers is None:
        skipped = set() if on_gpu else PROVIDERS_ON_GPU_ONLY
        arguments.providers = [name for name in PROVIDERS if name not in skipped]
    return arguments


def run(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Yield the rows of each step as they are measured.

    They end early if the device is lost, since every later call in this process would fail.
    """
    from tqdm import tqdm

    bench = Bench(
        device=torch.device(arguments.device),
        providers=set(arguments.providers),
        budget=arguments.budget,
        limit=arguments.limit,
    )
    by_weight: dict[torch.dtype, list[str]] = {}
    for dtype in arguments.dtypes:
        by_weight.setdefault(DTYPES[dtype].weight, []).append(dtype)
    cells = {weight: cells_of(arguments, dtypes) for weight, dtypes in by_weight.items()}
    total = len(arguments.inputs) * sum(map(len, cells.values()))
    with tqdm(total=total, file=sys.stderr, unit="row", disable=None) as progress:
        for weight, name in itertools.product(cells, arguments.inputs):
            dtype = by_weight[weight][0]
            progress.set_description(f"{name}, {dtype}: making weights")
            try:
                batches = make_batches(name, weight, bench.device, arguments.sparsity)
            except Exception as error:
                yield [Row(name, 0, 0, dtype, "", "", "", 0, note=note_of(error))]
                if device_is_lost(bench.device):
                    return
                continue
            current, masked = None, batches
            for dtype, mask, step in cells[weight]:
                if current != (dtype, mask):
                    current = dtype, mask
                    masked = [batch.masked_by(mask, DTYPES[dtype].w_hat) for batch in batches]
                progress.set_description(f"{name}, {dtype}: {step}")
                rows = bench.measure(name, step, masked)
                yield rows
                if any(row.is_error for row in rows) and device_is_lost(bench.device):
                    return
                progress.update()


def cells_of(arguments: argparse.Namespace, dtypes: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return dtypes, mask and step of all measurements on weights of one dtype.

    Steps without a mask run only once.
    """
    return [
        (dtype, mask, step)
        for dtype in dtypes
        for mask in arguments.masks
        for step in arguments.steps
        if STEPS[step].masked or (dtype, mask) == (dtypes[0], arguments.masks[0])
    ]


def main() -> int:
    arguments = parse_arguments()
    environment = describe_environment(torch.device(arguments.device))
    print(format_environment(environment))
    print(f"sparsity: {arguments.sparsity}\n", flush=True)
    settings = {k: v for k, v in vars(arguments).items() if k not in ("out", "plot")}
    files = ResultFiles(arguments.out, environment, settings)
    rows = []
    for measured in run(arguments):
        rows += measured
        files.add(measured)
    print(format_table(rows))
    print(f"\n{HOST_TITLE}\n{format_host_table(rows)}")
    if arguments.device == "cpu":
        print("\nRead the ratios: on a shared CPU the times themselves vary from run to run.")
    print(f"\n{format_headlines(rows)}")
    for path in files.paths:
        print(f"wrote {path}")
    if arguments.plot:
        from benchmarks.plot import plot_speedups

        title = f"{environment['device']}, {environment['cpu']}, torch {environment['torch']}"
        first = [row for row in rows if row.mask in ("", arguments.masks[0])]
        plot_speedups(arguments.plot, first, title)
        print(f"wrote {arguments.plot}")
    errors = [row for row in rows if row.is_error]
    for row in errors:
        print(f"{describe(row)}: {row.note}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
