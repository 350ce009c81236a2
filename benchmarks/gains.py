"""Measure what pruning gains: the sizes of checkpoints, and the latency of inference on a CPU.

`python -m benchmarks.gains --out benchmarks/results/cpu`. Sizes are exact bytes of whole files, for
a dense network, zeros, 2:4 and half of the hidden units removed, as they are, compressed and in
sparse formats. Each file is read back and compared first. Latencies are those of the same networks
in PyTorch, torch.compile and ONNX Runtime, and with weights in CSR. Outputs are checked against
those of the network with zeros, in float64, before anything is timed. A runtime that is not
installed has a row that says so.
"""

import argparse
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from benchmarks import latency
from benchmarks.environment import describe_environment, installed_version
from benchmarks.pruned_networks import (
    DENSE,
    PRUNINGS,
    SMALL,
    STORED,
    TIMED,
    Network,
    random_network,
    trained_network,
)
from benchmarks.report import format_environment, table
from benchmarks.rows import write_json
from benchmarks.storage import STORAGES, storages_for, stored_size

PARTS = ("sizes", "latencies")
DTYPES = (torch.float32, torch.bfloat16)
EPOCHS = 20

# 2:4 Linear layers on a GPU: rows of the input, in_features, out_features.
SPARSE_LINEAR = {"GPT-2 MLP up": (8192, 768, 3072), "GPT-2 MLP down": (8192, 3072, 768)}


def measure_sizes(name: str, network: Network, epochs: int) -> list[dict[str, object]]:
    """Return a row for each pruning, dtype and storage.

    Args:
        name: The network's name.
        network: The network. Its weights are trained, or else normal.
        epochs: Epochs of training.
    """
    dense = None if network.trained else random_network(network)
    tasks = []
    for pruning, prune in PRUNINGS.items():
        if network.trained:
            model, accuracy = trained_network(network, pruning, epochs)
        else:
            model, accuracy = prune(dense), None
        for dtype in DTYPES:
            state = {
                key: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for key, tensor in model.state_dict().items()
            }
            row = {
                "network": name,
                "weights": network.weights,
                "elements": sum(tensor.numel() for tensor in model.parameters()),
                "dtype": str(dtype).removeprefix("torch."),
                "pruning": pruning,
            } | ({} if accuracy is None else {"accuracy": accuracy})
            tasks += [
                (row | {"storage": storage}, storage, state)
                for storage in storages_for(pruning, network.compressed)
            ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # compressors release Python's lock
        found = pool.map(lambda task: task[0] | stored_size(*task[1:]), tasks)
        rows = list(found)
    full = {
        row["dtype"]: row.get("bytes")
        for row in rows
        if (row["pruning"], row["storage"]) == (DENSE, "torch.save")
    }
    rows.sort(key=lambda row: row["dtype"] != "float32")
    for row in rows:
        if "bytes" in row and full[row["dtype"]]:
            row["of dense"] = row["bytes"] / full[row["dtype"]]
    return rows


def is_error(row: dict[str, object]) -> bool:
    """Whether an answer was wrong or something failed."""
    return str(row.get("note", "")).startswith(("wrong", "failed"))


def format_sizes(rows: Sequence[dict]) -> str:
    """Return a table with a line for each network, dtype and pruning, and a column per storage."""
    columns = [name for name in STORAGES if any(row["storage"] == name for row in rows)]
    keys = ("network", "weights", "dtype", "pruning")
    return pivot(rows, keys, "storage", columns, size_cell)


def size_cell(row: dict) -> str:
    if row.get("note"):
        return "-"
    return f"{row['bytes'] / 1e6:.3g} MB ({row['of dense']:.1%})"


def format_accuracies(rows: Sequence[dict]) -> str:
    """Return a line for each trained network: its accuracy on test images, by pruning."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if "accuracy" in row:
            found.setdefault(row["network"], {})[row["pruning"]] = f"{row['accuracy']:.1%}"
    return "\n".join(
        f"accuracy of {name}: {', '.join(f'{key} {text}' for key, text in texts.items())}"
        for name, texts in found.items()
    )


def format_latencies(rows: Sequence[dict]) -> str:
    """Return a table with a line for each network, batch and pruning, and a column per runtime."""
    columns = [name for name in latency.RUNTIMES if any(row["runtime"] == name for row in rows)]
    return pivot(rows, ("network", "examples", "pruning"), "runtime", columns, latency_cell)


def format_memory(rows: Sequence[dict]) -> str:
    """Return a table of the weights that PyTorch holds, dense and in CSR."""
    columns = (latency.EAGER, latency.CSR)
    held = [row for row in rows if row["runtime"] in columns and row.get("held_bytes")]
    keys = ("network", "pruning")
    return pivot(held, keys, "runtime", columns, lambda row: f"{row['held_bytes'] / 1e6:.3g} MB")


def latency_cell(row: dict) -> str:
    if row.get("note"):
        return "-"
    median = row["median_s"]
    low, high = row.get("quartiles_s") or (median, median)
    ratio = f"{row['of dense']:.2f}, " if row["of dense"] else ""
    digits = ".3g" if median < 1 else ".0f"
    return f"{median * 1e3:{digits}} ms ({ratio}IQR {(high - low) / median:.0%})"


def pivot(
    rows: Iterable[dict],
    keys: Sequence[str],
    column: str,
    columns: Sequence[str],
    cell: Callable[[dict], str],
) -> str:
    """Return a table of cells, with a line for each value of the keys."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(tuple(str(row[key]) for key in keys), {})
        line[row[column]] = cell(row)
    headings = [(key, str.ljust) for key in keys] + [(name, str.rjust) for name in columns]
    return table(
        headings, [(*key, *(line.get(name, "") for name in columns)) for key, line in lines.items()]
    )


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gains", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: both")
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=[*(STORED | TIMED)],
        metavar="NETWORK",
        help=f"any of: {'; '.join(STORED | TIMED)} (default: all)",
    )
    parser.add_argument(
        "--budget", type=float, default=8.0, metavar="SECONDS", help="of timing, per network, batch"
    )
    parser.add_argument("--quick", action="store_true", help="small networks, hardly timed")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for gains.json")
    return parser.parse_args(words)


def main() -> int:
    arguments = parse_arguments()
    environment = describe_environment(torch.device("cpu")) | {
        package: installed_version(package) for package in ("onnxruntime", "safetensors")
    }
    print(format_environment(environment), "\n", sep="")
    stored, timed = (SMALL, SMALL) if arguments.quick else (STORED, TIMED)
    budget, epochs = (0.01, 1) if arguments.quick else (arguments.budget, EPOCHS)
    content = {
        "environment": environment,
        "settings": {"budget": budget, "epochs": epochs, "zlib": zlib.ZLIB_RUNTIME_VERSION},
        "sizes": [],
        "latencies": [],
    }

    def add(part: str, name: str, measure: Callable[[], list[dict]]) -> None:
        if part in arguments.parts:
            print(f"{part} of {name}", file=sys.stderr, flush=True)
            content[part] += measure()
            if arguments.out:
                write_json(arguments.out / "gains.json", content)

    def chosen(networks: dict[str, Network]) -> dict[str, Network]:
        every = arguments.quick or not arguments.networks
        return {n: network for n, network in networks.items() if every or n in arguments.networks}

    for name, network in chosen(stored).items():
        add("sizes", name, partial(measure_sizes, name, network, epochs))
    for name, network in chosen(timed).items():
        for examples in network.examples:
            add("latencies", name, partial(latency.measure, name, network, examples, budget))
    for name, shape in SPARSE_LINEAR.items():
        add("latencies", name, partial(latency.measure_tensor_cores, name, shape, budget))
    print(format_tables(content["sizes"], content["latencies"]))
    return 1 if any(map(is_error, content["sizes"] + content["latencies"])) else 0


def format_tables(sizes: Sequence[dict], latencies: Sequence[dict]) -> str:
    """Return all tables, and the reasons for cells without a figure."""
    parts = []
    if sizes:
        title = "Files, and their fraction of torch.save's file of the dense network:"
        parts += [title, format_sizes(sizes), format_accuracies(sizes)]
    if latencies:
        title = (
            "Medians, and their ratio to the dense network in the same runtime (below 1: faster):"
        )
        parts += [title, format_latencies(latencies)]
        parts += ["Bytes of weights and buffers in memory:", format_memory(latencies)]
    return "\n\n".join(filter(None, [*parts, *notes([*sizes, *latencies])]))


def notes(rows: Iterable[dict]) -> list[str]:
    """Return a line for each reason why cells have no figure, with the networks."""
    networks: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.get("note"):
            column = row.get("storage") or row["runtime"]
            names = networks.setdefault((column, row["note"]), [])
            dtype = f", {row['dtype']}" if "dtype" in row else ""
            names.append(f"{row['network']}{dtype}")
    return [
        f"{column}: {note} ({'; '.join(dict.fromkeys(names))})"
        for (column, note), names in networks.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
