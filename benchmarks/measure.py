"""From one input and one step to rows of the table: check the answers, then time.

Whatever goes wrong with one provider becomes the note of its row; the others go on.
"""

from dataclasses import dataclass, field

import torch

from benchmarks.batches import Batch
from benchmarks.rows import Row
from benchmarks.steps import STEPS
from benchmarks.timing import ProviderError, Timing, clock_for, time_interleaved

# A first run longer than this is warm-up enough, unless it compiled something.
LONG_RUN = 1.0
# The time of a shorter run is mostly overhead, and says nothing about a larger input.
MIN_EXTRAPOLATED = 0.1


def note_of(error: Exception) -> str:
    """What a row says about an exception."""
    if isinstance(error, ProviderError):
        error = error.__cause__
    if isinstance(error, torch.OutOfMemoryError):
        return "skipped: out of memory"
    text = str(error).strip() or "no message"
    return f"failed: {type(error).__name__}: {text.splitlines()[0]}"


def set_timing(row: Row, timing: Timing, base: Timing | None) -> None:
    row.median_s, row.runs = timing.median, timing.runs
    row.quartile_low_s, row.quartile_high_s = timing.quartiles
    row.gb_per_s = row.bytes_per_weight * row.n / timing.median / 1e9
    row.speedup = base.median / timing.median if base else None


@dataclass
class Bench:
    """The settings of a run, and what it has learnt about each provider's speed."""

    device: torch.device
    providers: set[str]
    budget: float
    """Seconds of timing per step and input, for all its providers together."""
    limit: float
    """Seconds one run of a provider may take; beyond it is skipped, unless it is the base."""
    seconds_per_weight: dict[tuple[str, str], float] = field(default_factory=dict)

    def measure(self, input_name: str, step_name: str, batches: list[Batch]) -> list[Row]:
        """Rows of one step on one input, one per chosen provider."""
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
        """Check the answer; returns why not to time it ("" to do so) and the seconds of one run."""
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
