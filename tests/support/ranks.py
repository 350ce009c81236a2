"""Runs a function on several processes that form a process group."""

import multiprocessing
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

DIED = ChildProcessError("ended without a result")

# What a collective waits for the others at most, in seconds; and a whole run.
TIMEOUT = 60
LONGEST_RUN = 300

# A server that has imported these once starts every process.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pdp_kernels", "torch.distributed.tensor.parallel"])

BACKENDS = ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)]


def run_on_ranks(function, ranks, folder, *arguments, backend="gloo", timeout=TIMEOUT):
    """function(rank, *arguments) on each rank: what it returns, or the error it raises, by rank.

    `DIED` for a rank that ended without either.
    """
    if backend == "nccl" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    processes = [
        _context.Process(
            target=_run, args=(function, rank, ranks, folder, backend, timeout, arguments)
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LONGEST_RUN)
    stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not stuck, f"ranks {stuck} did not end"
    files = (folder / f"{rank}.pt" for rank in range(ranks))
    return [torch.load(file, weights_only=False) if file.exists() else DIED for file in files]


def results_on_ranks(function, ranks, folder, *arguments, **options):
    """What function(rank, *arguments) returns on each rank; an error there is one here."""
    results = run_on_ranks(function, ranks, folder, *arguments, **options)
    for rank, result in enumerate(results):
        if isinstance(result, BaseException):
            raise AssertionError(f"rank {rank} failed: {result!r}") from result
    return results


def _run(function, rank, ranks, folder, backend, timeout, arguments):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )
    try:
        result = function(rank, *arguments)
    except Exception as error:
        error.__traceback__, error.__cause__, error.__context__ = None, None, None
        result = error
    torch.save(result, folder / f"{rank}.tmp")
    (folder / f"{rank}.tmp").rename(folder / f"{rank}.pt")
    if not isinstance(result, Exception):
        dist.barrier()
        dist.destroy_process_group()


def device_of(rank):
    return torch.device("cuda", rank) if dist.get_backend() == "nccl" else torch.device("cpu")
