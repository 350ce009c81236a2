"""Plots of speedups. Imported only for --plot, since it needs matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullFormatter

from benchmarks.measure import Row
from benchmarks.steps import STEPS

PROVIDERS = dict.fromkeys(provider for step in STEPS.values() for provider in step.providers)
COLOURS = {provider: f"C{index}" for index, provider in enumerate(PROVIDERS)}
LINES = {"float32": "-", "bfloat16": "--", "float32/bfloat16": ":"}


def plot_speedups(path: Path, rows: Sequence[Row], title: str) -> None:
    """Plot the speedup over eager against the number of weights, with a panel for each step.

    Lists of tensors are stars. Lines are dashed for bfloat16 and dotted for float32/bfloat16, with
    hollow markers for both.
    """
    timed = [row for row in rows if row.speedup and row.provider != STEPS[row.step].base]
    steps = list(dict.fromkeys(row.step for row in timed))
    if not steps:
        raise ValueError("nothing to plot: no row has a ratio to eager")
    columns = min(3, len(steps))
    lines = math.ceil(len(steps) / columns)
    figure = Figure(figsize=(5 * columns, 4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, step in zip(panels, steps, strict=False):
        _plot_step(axes, [row for row in timed if row.step == step])
        axes.set(title=step, xlabel="weights", ylabel=f"times as fast as {STEPS[step].base}")
    for axes in panels[len(steps) :]:
        axes.remove()
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _plot_step(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.15, y=0.1)
    axes.grid(alpha=0.3)
    axes.axhline(1, color="grey")
    for provider, dtype in dict.fromkeys((row.provider, row.dtype) for row in rows):
        series = [row for row in rows if (row.provider, row.dtype) == (provider, dtype)]
        single = sorted((row.n, row.speedup) for row in series if row.tensors == 1)
        lists = [(row.n, row.speedup) for row in series if row.tensors > 1]
        fill = COLOURS[provider] if dtype == "float32" else "none"
        axes.plot(
            *([point[axis] for point in single] for axis in (0, 1)),
            color=COLOURS[provider],
            linestyle=LINES[dtype],
            marker="o",
            markerfacecolor=fill,
            label=f"{provider}, {dtype}",
        )
        axes.scatter(
            *([point[axis] for point in lists] for axis in (0, 1)),
            edgecolors=COLOURS[provider],
            facecolors=fill,
            marker="*",
            s=90,
        )
    for row in rows:
        if row.tensors > 1 and (row.provider, row.dtype) == ("ours", rows[0].dtype):
            axes.annotate(row.input, (row.n, row.speedup), xytext=(4, 5), fontsize="small",
                          textcoords="offset points")  # fmt: skip
    axes.legend(fontsize="small")
