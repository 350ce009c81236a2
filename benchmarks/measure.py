"""Measurements: check the answers, then time. What fails becomes a note, and the others go on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.batches import Batch, make_tiny_batch
from benchmarks.masks import Dtypes
from benchmarks.rows import Environment, Row, write_json
from benchmarks.steps import STEPS, Step
from benchmarks.timing import (
    Clock,
    ProviderError,
    Timing,
    device_clock_for,
    host_clock_for,
    time_interleaved,
)

# A first run that takes longer is a sufficient warm-up, unless it compiled something.
LONG_RUN = 1.0
# The time of a shorter run is mostly overhead, and does not scale to a larger input.
MIN_EXTRAPOLATED = 0.1
# A hundred rounds over a few tiny weights take less; with a network's list, some ten fit.
HOST_SECONDS = 0.5


def note_of(error: Exception) -> str:
    """Return the note for an exception."""
    if isinstance(error, ProviderError):
        error = error.__cause__
    if isinstance(error, torch.OutOfMemoryError):
        return "skipped: out of memory"
    text = str(error).strip() or "no message"
    return f"failed: {type(error).__name__}: {text.splitlines()[0]}"


def measure_all(
    label: str,
    measurements: Mapping[str, Callable[[], dict]],
    describe: Callable[[dict], str],
    environment: Environment,
    out: Path | None,
) -> int:
    """Measure one after another; print and write each result at once.

    Args:
        label: The key of a measurement's name in its row.
        measurements: Functions by name. Each returns a row, with a "note" if an answer is wrong.
        describe: Formats a row without a note.
        environment: What the results were measured on.
        out: The JSON file, if any.

    Returns:
        The exit status: 1 if a row has a note.
    """
    rows: list[dict] = []
    for name, measure in measurements.items():
        row = {label: name}
        try:
            row |= measure()
        except Exception as error:
            row["note"] = note_of(error)
        rows.append(row)
        print(f"{name}: {row.get('note') or describe(row)}", flush=True)
        if out:
            write_json(out, {"environment": environment, "rows": rows})
    return 1 if any("note" in row for row in rows) else 0


def set_timing(row: Row, timing: Timing, base: Timing | None) -> None:
    """Enter a timing into its row."""
    row.median_s, row.runs = timing.median, timing.runs
    row.quartile_low_s, row.quartile_high_s = timing.quartiles
    row.gb_per_s = row.bytes_per_weight * row.n / timing.median / 1e9
    row.speedup = base.median / timing.median if base else None


@dataclass
class Bench:
    """The settings of a run, and what it has measured so far."""

    device: torch.device
    providers: set[str]
    budget: float
    """Seconds of timing per step and input, for all providers together."""
    limit: float
    """Longest run in seconds of a provider that is not the base; slower ones are skipped."""
    seconds_per_weight: dict[tuple[str, str], float] = field(default_factory=dict)
    """By step and provider."""
    host_us: dict[tuple, float] = field(default_factory=dict)
    """By what the time on the host depends on: all of a row but the sizes of its weights."""

    def measure(self, input_name: str, step_name: str, batches: list[Batch]) -> list[Row]:
        """Return the rows of one step on one input, one for each chosen provider."""
        step, first = STEPS[step_name], batches[0]
        weight, w_hat = first.weights[0].dtype, first.mask.out_dtype
        rows = {
            provider: Row(
                input=input_name,
                tensors=len(first.weights),
                n=first.numel,
                dtype=Dtypes(weight, w_hat if step.masked else weight).name,
                mask=first.mask.name if step.masked else "",
                step=step_name,
                provider=provider,
                bytes_per_weight=step.moved(weight.itemsize, w_hat.itemsize),
            )
            for provider in step.providers
            if provider in self.providers
        }
        estimates = {}
        for provider, row in rows.items():
            row.note, estimates[provider] = self._warm_up(step_name, provider, first)
        self._measure_host(first, [row for row in rows.values() if not row.note])
        ready = [row for row in rows.values() if not row.note]
        timings = self._time(ready, estimates, batches, device_clock_for(self.device), self.budget)
        for provider, timing in timings.items():
            set_timing(rows[provider], timing, timings.get(step.base))
            if timing.median > MIN_EXTRAPOLATED:
                self.seconds_per_weight[step_name, provider] = timing.median / first.numel
        return list(rows.values())

    def _warm_up(self, step_name: str, provider: str, batch: Batch) -> tuple[str, float]:
        """Check the answer. Return the reason not to time it, or "", and the seconds of one run."""
        step, clock = STEPS[step_name], device_clock_for(self.device)
        may_skip = provider != step.base
        seconds = self.seconds_per_weight.get((step_name, provider), 0.0) * batch.numel
        if may_skip and seconds > self.limit:
            return f"skipped: about {seconds:.1f} s per run, limit {self.limit:g} s", seconds
        note, seconds = check(step, provider, batch, clock, self.limit)
        if not note and may_skip and seconds > self.limit:
            note = f"skipped: {seconds:.1f} s per run, limit {self.limit:g} s"
        return note, seconds

    def _measure_host(self, batch: Batch, rows: Sequence[Row]) -> None:
        """Enter the microseconds of the host, checked and timed on as many tiny weights.

        They are the same for all inputs of one number of weights, and measured once.
        """
        new = [row for row in rows if host_key(row) not in self.host_us]
        if new:
            step, clock = STEPS[new[0].step], host_clock_for(self.device)
            dtype, mask = batch.weights[0].dtype, batch.mask
            tiny = make_tiny_batch(len(batch.weights), step.tiny, dtype, self.device)
            tiny = tiny.masked_by(mask.name, mask.out_dtype)
            estimates = {}
            for row in new:
                row.note, estimates[row.provider] = check(step, row.provider, tiny, clock)
            ready = [row for row in new if not row.note]
            budget = min(self.budget, HOST_SECONDS)
            timings = self._time(ready, estimates, [tiny], clock, budget)
            for row in ready:
                if not row.note:
                    per_layer = timings[row.provider].median / row.tensors
                    self.host_us[host_key(row)] = per_layer * 1e6
        for row in rows:
            row.host_us = self.host_us.get(host_key(row))

    def _time(
        self,
        rows: Sequence[Row],
        estimates: dict[str, float],
        batches: list[Batch],
        clock: Clock,
        budget: float,
    ) -> dict[str, Timing]:
        """Return the timings of these rows' providers. One that fails becomes a note of its row."""
        ready = {row.provider: row for row in rows}
        while ready:
            providers = {name: STEPS[row.step].providers[name] for name, row in ready.items()}
            try:
                return time_interleaved(providers, estimates, batches, clock, budget)
            except ProviderError as failure:
                ready.pop(failure.provider).note = note_of(failure)
        return {}


def host_key(row: Row) -> tuple:
    """Return what the time of a row on the host depends on."""
    return row.step, row.provider, row.tensors, row.dtype, row.mask


def check(
    step: Step, provider: str, batch: Batch, clock: Clock, limit: float = 0.0
) -> tuple[str, float]:
    """Run a provider and check its answer.

    Returns:
        What is wrong, or "", and the seconds of a run. It is the second run, since the first may
        compile, unless the first took at least LONG_RUN and at most the limit.
    """
    seconds = 0.0
    try:
        prepare = step.providers[provider]
        seconds, answer = clock(prepare(batch))
        wrong = step.check(batch, answer)
        del answer
        if wrong:
            return f"wrong: {wrong}", seconds
        if seconds < LONG_RUN or seconds > limit:
            seconds, _ = clock(prepare(batch))
    except Exception as error:
        return note_of(error), seconds
    return "", seconds
