"""Interleaved timing (A B C A B C) over rotating batches, with medians and quartiles."""

import copy
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
# The slowest provider determines the time of a round, and three samples say little about a fast
# one. So the others run up to this often per round, for at most a quarter of the slowest's time.
MAX_RUNS_PER_ROUND = 5

Clock = Callable[[Callable[[], Any]], tuple[float, Any]]


@dataclass(frozen=True)
class Timing:
    """Median, quartiles and number of runs of one provider, in seconds."""

    median: float
    quartiles: tuple[float, float]
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Return the statistics of samples."""
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, (low, high), len(seconds))


class ProviderError(Exception):
    """A provider failed while it was timed, with the error as cause."""

    def __init__(self, provider: str):
        super().__init__(provider)
        self.provider = provider


def cpu_clock(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that `run` takes on the host, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def cuda_clock(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds between events around `run` on the current stream, and its result.

    The stream is empty at the first event, so the time includes what the device waits for the host.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, result


class DeviceClock:
    """The seconds that a GPU works on `run`, and its result: the host is ahead of the device.

    So it is where the device is busy with earlier work, as in the forward of a large model. Before
    the first event the device waits for as long as the host is likely to take: a little longer than
    it took last. Each provider needs a clock of its own.
    """

    HZ = 2e9  # no less than the GPU's clock, in whose cycles it waits

    def __init__(self, longest: float = 20e-3) -> None:
        self.lead = 1e-3
        # Seconds: where a provider waits for the device, the wait would grow without end.
        self.longest = longest

    def __call__(self, run: Callable[[], Any]) -> tuple[float, Any]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(self.lead * self.HZ))
        start.record()
        host, result = cpu_clock(run)
        end.record()
        end.synchronize()
        self.lead = min(1.5 * host + 1e-4, self.longest)
        return start.elapsed_time(end) / 1e3, result


def clock_for(device: torch.device) -> Clock:
    """Return the clock of a device, which includes what it waits for the host."""
    return cuda_clock if device.type == "cuda" else cpu_clock


def device_clock_for(device: torch.device) -> Clock:
    """Return the clock of the work of a device."""
    return DeviceClock() if device.type == "cuda" else cpu_clock


def host_clock_for(device: torch.device) -> Clock:
    """Return the clock of the host: it waits for the device before a run, and not after it."""

    def clock(run: Callable[[], Any]) -> tuple[float, Any]:
        torch.cuda.synchronize(device)
        return cpu_clock(run)

    return clock if device.type == "cuda" else cpu_clock


def time_interleaved(
    providers: dict[str, Provider],
    estimates: dict[str, float],
    batches: list[Batch],
    clock: Clock,
    budget: float,
) -> dict[str, Timing]:
    """Time providers in turn, and at least MIN_ROUNDS times.

    Args:
        providers: Warmed-up providers by name.
        estimates: Seconds of one run of each provider.
        batches: Batches over which runs rotate.
        clock: Times a run. Each provider gets a copy.
        budget: Seconds for all providers together.

    Raises:
        ProviderError: A provider failed.
    """
    longest = max(estimates[name] for name in providers) / 4
    runs_per_round = {
        name: max(1, min(MAX_RUNS_PER_ROUND, int(longest / estimates[name]))) for name in providers
    }
    # Each provider goes through all batches, since kthvalue's time depends on the data. Each starts
    # at another batch, so that the one before it has not brought the weights into the cache.
    starts = [index * len(batches) // len(providers) for index in range(len(providers))]
    rotations = {
        name: itertools.cycle(batches[start:] + batches[:start])
        for name, start in zip(providers, starts, strict=True)
    }
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    clocks = {name: copy.copy(clock) for name in providers}
    stop = time.perf_counter() + budget
    for round_index in range(MAX_ROUNDS):
        if round_index >= MIN_ROUNDS and time.perf_counter() > stop:
            break
        for name, provider in providers.items():
            for _ in range(runs_per_round[name]):
                try:
                    run = provider(next(rotations[name]))
                    seconds[name].append(clocks[name](run)[0])
                except Exception as error:
                    raise ProviderError(name) from error
    return {name: Timing.of(samples) for name, samples in seconds.items()}
