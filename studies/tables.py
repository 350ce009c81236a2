"""The rows of a grid of trainings, their table and their plots."""

import csv
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter


class Row(NamedTuple):
    """One training: a line of the CSV file."""

    network: str
    setting: str
    pattern: str
    sparsity: str
    seed: str
    epochs: str
    accuracy: float
    soft_accuracy: float | None
    own_sparsity: float  # before `finalize`
    seconds: float

    @property
    def key(self) -> tuple[str, ...]:
        """The cells that identify the training."""
        return tuple(self[:6])

    @property
    def column(self) -> str:
        """Heading of the row's column in the table."""
        return self.pattern if ":" in self.pattern else f"{100 * float(self.sparsity):g}%"


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a CSV file, or none if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [
            Row(*cells[:6], *(float(cell) if cell else None for cell in cells[6:]))
            for cells in list(csv.reader(file))[1:]
        ]


def columns_of(rows: list[Row]) -> list[str]:
    """Return the headings of pruned networks in the order of the rows."""
    return [c for c in dict.fromkeys(row.column for row in rows) if c != "0%"]


def spread(values: list[float]) -> str:
    """Return mean and standard deviation over the seeds, in percent."""
    text = f"{100 * mean(values):.2f}"
    return text + (f" ± {100 * stdev(values):.2f}" if len(values) > 1 else "")


def write_table(rows: list[Row], path: Path, command: str) -> None:
    """Write a Markdown table with a line for each setting, and the command that made it."""
    columns = columns_of(rows)
    seeds = len({row.seed for row in rows})
    lines = [
        f"Test accuracy in percent, mean ± standard deviation of {seeds} seeds: of the finished "
        "network, then with soft masks (soft). Time per run with one thread.",
        "",
        f"    {command}",
        "",
        "| | " + " | ".join([*columns, *(f"soft, {column}" for column in columns), "time"]) + " |",
        "|---" * (2 * len(columns) + 2) + "|",
    ]
    notes = []
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [row for row in rows if row.setting == setting]
        cells, soft_cells = [], []
        for column in columns:
            group = [row for row in own if row.column in (column, "0%")]
            soft = [row.soft_accuracy for row in group if row.soft_accuracy is not None]
            cells.append(spread([row.accuracy for row in group]) if group else "")
            soft_cells.append(spread(soft) if soft else "")
            missed = [row for row in group if abs(row.own_sparsity - float(row.sparsity)) > 5e-4]
            if missed and ":" not in column:
                reached = mean(row.own_sparsity for row in group)
                notes.append(f"{setting} at {column}: {100 * reached:.2f}%")
        time = f"{mean(row.seconds for row in own):.0f} s"
        lines.append(f"| {setting} | " + " | ".join([*cells, *soft_cells, time]) + " |")
    if notes:
        title = "Sparsity before the final pruning, where it missed the budget: "
        lines += ["", title + "; ".join(notes) + "."]
    path.write_text("\n".join(lines) + "\n")


def plot_by_sparsity(rows: list[Row], path: Path) -> None:
    """Plot accuracy against the fraction of remaining weights, with a line for each setting."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2])
    for setting in dict.fromkeys(row.setting for row in rows):
        groups: dict[float, list[float]] = {}
        for row in rows:
            if row.setting == setting:
                groups.setdefault(1 - float(row.sparsity), []).append(row.accuracy)
        remaining = sorted(groups)
        means = [mean(groups[x]) for x in remaining]
        errors = [stdev(groups[x]) if len(groups[x]) > 1 else 0.0 for x in remaining]
        if remaining == [1.0]:
            axes.axhline(means[0], color="black", linestyle=":", label=setting)
        else:
            axes.errorbar(
                remaining, means, errors, fmt="o-", markersize=3, capsize=2, label=setting
            )
    axes.set(xscale="log", xlabel="remaining weights", ylabel="test accuracy")
    axes.invert_xaxis()
    axes.set_xticks(sorted({1 - float(row.sparsity) for row in rows if row.column != "0%"}))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.3g}%")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    # Networks that collapsed are left out of the range, so that the others stay distinguishable.
    top = max(row.accuracy for row in rows)
    axes.set_ylim(max(min(row.accuracy for row in rows), top - 0.025) - 0.001, top + 0.001)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)


def plot_by_setting(rows: list[Row], path: Path) -> None:
    """Plot the accuracy of each setting, pruned (filled) and with soft masks (open), by column."""
    columns = columns_of(rows) or ["0%"]
    settings = list(dict.fromkeys(row.setting for row in rows))[::-1]
    figure = Figure(
        figsize=(4 + 2.5 * len(columns), 1.5 + 0.22 * len(settings)), layout="constrained"
    )
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        group = [row for row in rows if row.column in (column, "0%")]
        places = [settings.index(row.setting) for row in group]
        axes.plot([row.accuracy for row in group], places, "o", markersize=4, label="pruned")
        soft = [
            (row.soft_accuracy, settings.index(row.setting)) for row in group if row.soft_accuracy
        ]
        if soft:
            axes.plot(
                *zip(*soft, strict=True), "o", markersize=6, fillstyle="none", label="soft masks"
            )
        top = max(row.accuracy for row in group)
        axes.set(xlabel="test accuracy", title=column)
        axes.set_xlim(left=max(min(row.accuracy for row in group), top - 0.06) - 0.002)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(settings)), settings, fontsize="small")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
