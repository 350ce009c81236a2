"""Measurements: check the answers, then time. What fails becomes a note, and the others go on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.batches import Batch
from benchmarks.rows import Environment, Row, write_json
from benchmarks.steps import STEPS
from benchmarks.timing import ProviderError, Timing, clock_for, time_interleaved

# A first run that takes longer is a sufficient warm-up, unless it compiled something.
LONG_RUN = 1.0
# The time of a shorter run is mostly overhead, and does not scale to a larger input.
MIN_EXTRAPOLATED = 0.1


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
    """The settings of a run, and the speed of each provider measured so far."""

    device: torch.device
    providers: set[str]
    budget: float
    """Seconds of timing per step and input, for all providers together."""
    limit: float
    """Longest run in seconds of a provider that is not the base; slower ones are skipped."""
    seconds_per_weight: dict[tuple[str, str], float] = field(default_factory=dict)

    def measure(self, input_name: str, step_name: str, batches: list[Batch]) -> list[Row]:
        """Return the rows of one step on one input, one for each chosen provider."""
        step, first = STEPS[step_name], batches[0]
        dtype = first.weights[0].dtype
        rows = {
            provider: Row(
                input=input_name,
                tensors=len(first.weights),
                n=first.numel,
                dtype=str(dtype).removeprefix("torch."),
                mask=first.mask.name if step.masked else "",
                step=step_name,
                provider=provider,
                bytes_per_weight=step.moved(dtype.itemsize, first.mask.out_dtype.itemsize),
            )
            for provider in step.providers
            if provider in self.providers
        }
        estimates = {}
        for provider, row in rows.items():
            row.note, estimates[provider] = self._warm_up(step_name, provider, first)
        ready = {name: step.providers[name] for name, row in rows.items() if not row.note}
        timings: dict[str, Timing] = {}
        while ready and not timings:
            try:
                clock = clock_for(self.device)
                timings = time_interleaved(ready, estimates, batches, clock, self.budget)
            except ProviderError as failure:
                rows[failure.provider].note = note_of(failure)
                del ready[failure.provider]
        for provider, timing in timings.items():
            set_timing(rows[provider], timing, timings.get(step.base))
            if timing.median > MIN_EXTRAPOLATED:
                self.seconds_per_weight[step_name, provider] = timing.median / first.numel
        return list(rows.values())

    def _warm_up(self, step_name: str, provider: str, batch: Batch) -> tuple[str, float]:
        """Check the answer. Return the reason not to time it, or "", and the seconds of one run."""
        step, clock = STEPS[step_name], clock_for(self.device)
        prepare, may_skip = step.providers[provider], provider != step.base
        seconds = self.seconds_per_weight.get((step_name, provider), 0.0) * batch.numel
        if may_skip and seconds > self.limit:
            return f"skipped: about {seconds:.1f} s per run, limit {self.limit:g} s", seconds
        try:
            seconds, answer = clock(prepare(batch))
            wrong = step.check(batch, answer)
            del answer
            if wrong:
                return f"wrong: {wrong}", seconds
            if seconds < LONG_RUN or seconds > self.limit:
                seconds, _ = clock(prepare(batch))
        except Exception as error:
            return note_of(error), seconds
        if may_skip and seconds > self.limit:
            return f"skipped: {seconds:.1f} s per run, limit {self.limit:g} s", seconds
        return "", seconds
