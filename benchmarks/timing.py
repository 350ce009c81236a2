"""Interleaved timing: A B C A B C, over rotating batches, with medians and quartiles."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.batches import Batch
from benchmarks.steps import Provider

MIN_ROUNDS = 3
MAX_ROUNDS = 100
# A round is paid for by the slowest provider, and three samples say little about a fast one. So the
# others run up to this many times per round, each for at most a quarter of the slowest's time.
MAX_RUNS_PER_ROUND = 5

Clock = Callable[[Callable[[], Any]], tuple[float, Any]]


@dataclass(frozen=True)
class Timing:
    """Seconds of one provider in one row."""

    median: float
    quartiles: tuple[float, float]
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, (low, high), len(seconds))


class ProviderError(Exception):
    """A provider failed while it was timed; the cause is what it raised."""

    def __init__(self, provider: str):
        super().__init__(provider)
        self.provider = provider


def cpu_clock(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `run` takes on the host, and what it returns."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def cuda_clock(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds between events around `run` on the current stream, and what it returns.

    The stream is empty at the first event, so that a small input shows what its launches cost the
    host, as it would in a training loop without CUDA graphs.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, result


def clock_for(device: torch.device) -> Clock:
    return cuda_clock if device.type == "cuda" else cpu_clock


def time_interleaved(
    providers: dict[str, Provider],
    estimates: dict[str, float],
    batches: list[Batch],
    clock: Clock,
    budget: float,
) -> dict[str, Timing]:
    """Time warmed-up providers in turn for `budget` seconds, and for MIN_ROUNDS at the least.

    estimates: seconds that one run of each takes, from its warm-up.

    Raises:
        ProviderError: one of them failed.
    """
    share = max(estimates[name] for name in providers) / 4
    runs_per_round = {
        name: max(1, min(MAX_RUNS_PER_ROUND, int(share / estimates[name]))) for name in providers
    }
    # Each provider goes through all batches, since kthvalue's time depends on the data, and starts
    # elsewhere, so that it does not find in the cache what the one before it has read.
    starts = [index * len(batches) // len(providers) for index in range(len(providers))]
    rotations = {
        name: itertools.cycle(batches[start:] + batches[:start])
        for name, start in zip(providers, starts, strict=True)
    }
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    stop = time.perf_counter() + budget
    for round_index in range(MAX_ROUNDS):
        if round_index >= MIN_ROUNDS and time.perf_counter() > stop:
            break
        for name, provider in providers.items():
            for _ in range(runs_per_round[name]):
                try:
                    seconds[name].append(clock(provider(next(rotations[name])))[0])
                except Exception as error:
                    raise ProviderError(name) from error
    return {name: Timing.of(samples) for name, samples in seconds.items()}
