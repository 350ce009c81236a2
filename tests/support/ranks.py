"""Runs functions on several processes that form a process group."""

import contextlib
import io
import os
import tempfile
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support import TIMEOUT
from tests.support.forks import FORKS

DIED = ChildProcessError("ended without a result")

BACKENDS = ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)]


class Group:
    """Processes that form a process group and run one function after another."""

    def __init__(self, ranks, backend="gloo"):
        if backend == "nccl" and torch.cuda.device_count() < ranks:
            pytest.skip(f"needs {ranks} GPUs")
        self.folder = tempfile.TemporaryDirectory()
        pipes = [FORKS.Pipe() for _ in range(ranks)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            FORKS.Process(
                target=_serve, args=(theirs, rank, ranks, backend, self.folder.name), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def run(self, function, *arguments, awaited=None):
        """Return what function(rank, *arguments) returns or raises on each rank.

        Args:
            awaited: the ranks to wait for; all by default.

        Returns:
            A list; `DIED` stands for a rank that ended without either, or was not awaited.
        """
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results = [DIED] * len(self.pipes)
        pending = {self.pipes[rank]: rank for rank in awaited or range(len(self.pipes))}
        while pending:
            ready = wait(pending, TIMEOUT)
            assert ready, f"ranks {sorted(pending.values())} did not end"
            for pipe in ready:
                rank = pending.pop(pipe)
                with contextlib.suppress(EOFError, ConnectionResetError):  # it has died
                    results[rank] = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
        return results

    def close(self, patience=0):
        """End the processes, which have `patience` seconds to leave by themselves."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(patience)
            process.kill()
            process.join()
        self.folder.cleanup()


_groups = {}  # by backend and number of ranks, kept for all tests of this process


def close_groups():
    while _groups:
        _groups.popitem()[1].close(patience=10)


def results_on_ranks(function, ranks, *arguments, backend="gloo"):
    """Return what function(rank, *arguments) returns on each rank; an error there is one here."""
    key = backend, ranks
    if key not in _groups:
        _groups[key] = Group(ranks, backend)
    results = [None] * ranks
    try:
        results = _groups[key].run(function, *arguments)
    finally:
        if any(result is None or isinstance(result, Exception) for result in results):
            _groups.pop(key).close()  # its ranks may wait for each other
    for rank, result in enumerate(results):
        if isinstance(result, Exception):
            raise AssertionError(f"rank {rank} failed: {result!r}") from result
    return [result for (result,) in results]


def results_on_mortal_ranks(function, ranks, *arguments, awaited=None):
    """Return what each rank of a group of its own returns or raises: it may end without either."""
    group = Group(ranks)
    try:
        results = group.run(function, *arguments, awaited=awaited)
    finally:
        group.close()
    return [result[0] if isinstance(result, tuple) else result for result in results]


def _serve(pipe, rank, ranks, backend, folder):
    """Run what the pipe brings, until it is closed."""
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{Path(folder, 'store')}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=TIMEOUT),
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)  # threads of gloo may outlast the interpreter and abort it
        torch.manual_seed(0)
        try:
            result = (function(rank, *arguments),)
        except Exception as error:
            error.__traceback__, error.__cause__, error.__context__ = None, None, None
            result = error
        file = io.BytesIO()
        torch.save(result, file)
        pipe.send_bytes(file.getvalue())


def device_of(rank):
    return torch.device("cuda", rank) if dist.get_backend() == "nccl" else torch.device("cpu")
