"""Compare thresholds of sharded weights with gathering the weights.

`python -m benchmarks.distributed`. The first lines count what a step sends, from shapes alone. Then
ranks, which are processes of this machine (gloo, or NCCL with one GPU each), check that the
thresholds equal those of the global weights, and measure bytes and time. The ranks share the cores
and the memory of the machine, where gathering makes each of them select from its own copy of all
weights: with more ranks than cores the ratio tells more of the machine than of the network.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.environment import describe_environment
from benchmarks.layer_shapes import NETWORKS, make_weights
from benchmarks.report import format_environment
from benchmarks.rows import write_json
from pdp_kernels import pdp_thresholds
from pdp_kernels.ops.reference import DIGIT_BITS

SPARSITY = 0.9
COUNTED = ("resnet50", "gpt2", "llama-7b")
MEASURED = ("resnet50", "gpt2")
ROUNDS = 7


def counted(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> dict[str, float]:
    """Return the bytes that collectives get in a step, and the bytes that gathering would take.

    For every byte, a ring of R ranks sends 2 (R - 1) / R to a neighbour in an all-reduce, and
    (R - 1) / R in an all-gather.

    Args:
        shapes: Shapes of the global weights.
        dtype: Dtype of the weights.
    """
    digits = DIGIT_BITS[dtype.itemsize]
    counts = sum(len(shapes) << bits for bits in digits)
    sent = 8 * (counts + len(shapes))  # int64 counts, and the next key above each threshold
    gathered = dtype.itemsize * sum(map(prod, shapes))
    return {
        "collectives": len(digits) + 1,
        "bytes": sent,
        "gathered bytes": gathered,
        "of gathering": 2 * sent / gathered,
    }


class Counter:
    """An all_reduce that counts calls and bytes."""

    def __init__(self) -> None:
        self.collectives = self.bytes = 0
        self._all_reduce = dist.all_reduce

    def __call__(self, tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        self.collectives += 1
        self.bytes += tensor.numel() * tensor.element_size()
        return self._all_reduce(tensor, *arguments, **options)


def measure(rank: int, ranks: int, names: Sequence[str], device_type: str, folder: str) -> None:
    """Check and time the inputs on one rank; rank 0 saves the rows in the folder."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = f"file://{folder}/store{ranks}"
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks)
    mesh = init_device_mesh(device_type, (ranks,))
    rows = []
    for name in names:
        weights = make_weights(name, torch.Generator(device).manual_seed(0))
        expected = pdp_thresholds(weights, SPARSITY)
        shards = [distribute_tensor(w, mesh, [Shard(0)], src_data_rank=None) for w in weights]
        del weights
        row = {"input": name, "ranks": ranks}
        with mock.patch.object(dist, "all_reduce", Counter()) as counter:
            found = pdp_thresholds(shards, SPARSITY)
        row |= {"collectives": counter.collectives, "bytes": counter.bytes}
        if not torch.equal(found, expected):
            row["note"] = "wrong: not the thresholds of the global weights"
        else:
            row |= time_both(
                lambda shards=shards: pdp_thresholds(shards, SPARSITY),
                lambda shards=shards: pdp_thresholds([w.full_tensor() for w in shards], SPARSITY),
                device,
            )
        rows.append(row)
    if rank == 0:
        torch.save(rows, f"{folder}/rows{ranks}.pt")
    dist.barrier()
    dist.destroy_process_group()


def time_both(
    ours: Callable[[], Tensor], gather: Callable[[], Tensor], device: torch.device
) -> dict[str, float]:
    """Return median seconds of both, which all ranks run in turn."""
    seconds: dict[str, list[float]] = {"ours": [], "gather": []}
    for _ in range(1 + ROUNDS):
        for name, run in (("ours", ours), ("gather", gather)):
            dist.barrier()
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    medians = {f"{name} (s)": statistics.median(times[1:]) for name, times in seconds.items()}
    return medians | {"faster": medians["gather (s)"] / medians["ours (s)"]}


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributed", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--inputs", nargs="+", choices=NETWORKS, default=MEASURED)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser.parse_args(words)


def main() -> int:
    arguments = parse_arguments()
    environment = describe_environment(torch.device(arguments.device))
    print(format_environment(environment), "\n", sep="")

    counts = []
    for name in COUNTED:
        shapes = [shape for shape, _ in NETWORKS[name]()]
        for dtype in (torch.float32, torch.bfloat16):
            row = {"input": name, "weights": len(shapes), "dtype": str(dtype)[6:]}
            counts.append(row | counted(shapes, dtype))
            print(
                "{input}, {weights} weights, {dtype}: {collectives} collectives, {bytes:,} B; "
                "gathering {gathered bytes:,} B; sent in rings: {of gathering:.2%}".format(
                    **counts[-1]
                )
            )
    print()
    rows = []
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            given = (ranks, arguments.inputs, arguments.device, folder)
            # Processes of a fork server exit without shutting Python down. A shutdown could abort,
            # since gloo's threads hold tensors a moment longer.
            torch.multiprocessing.start_processes(
                measure, given, nprocs=ranks, start_method="forkserver"
            )
            for row in torch.load(f"{folder}/rows{ranks}.pt"):
                rows.append(row)
                print(
                    row.get("note")
                    or "{input} on {ranks} ranks: {collectives} collectives, {bytes:,} B, "
                    "{ours (s):.3g} s; gathering {gather (s):.3g} s: {faster:.3g}x".format(**row)
                )
    if arguments.out:
        content = {"environment": environment, "counted": counts, "measured": rows}
        write_json(arguments.out, content)
    return 1 if any("note" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
