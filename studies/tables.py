"""The rows of a grid of trainings, their table and their plots."""

import csv
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.stats import t as student_t

CONFIDENCE = 0.95


class Row(NamedTuple):
    """One training: a line of the CSV file."""

    network: str
    setting: str
    pattern: str
    sparsity: str
    seed: str
    epochs: str
    device: str  # cpu, or the name of the GPU
    score: float  # accuracy, or the loss of a text model in nats per character
    soft_score: float | None
    own_sparsity: float  # before `finalize`
    seconds: float
    commit: str  # of the code that trained it

    @property
    def key(self) -> tuple[str, ...]:
        """The cells that identify the training."""
        return tuple(self[:7])

    @property
    def column(self) -> str:
        """Heading of the row's column in the table."""
        return self.pattern if ":" in self.pattern else f"{100 * float(self.sparsity):g}%"


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a CSV file, or none if there is no such file.

    Raises:
        ValueError: The columns are not those of a grid.
    """
    if not path.exists():
        return []
    with open(path, newline="") as file:
        columns, *rows = csv.reader(file)
    if columns != list(Row._fields):
        raise ValueError(f"{path} must have the columns {', '.join(Row._fields)}, got {columns}")
    return [
        Row(*cells[:7], *(float(cell) if cell else None for cell in cells[7:11]), cells[11])
        for cells in rows
    ]


class Score(NamedTuple):
    """How scores are shown."""

    name: str
    factor: float  # to the unit in which they are shown
    digits: int
    is_loss: bool  # less is better

    @property
    def description(self) -> str:
        return f"{self.name}, nats per character" if self.is_loss else f"{self.name}, percent"

    def text(self, values: list[float]) -> str:
        """Return mean and standard deviation over the seeds."""
        numbers = [mean(values), *([stdev(values)] if len(values) > 1 else [])]
        return " ± ".join(f"{self.factor * number:.{self.digits}f}" for number in numbers)

    def difference(self, mine: dict[str, float], other: dict[str, float]) -> str:
        """Return by how much mine are better, paired by seed: mean [95% interval of the mean].

        Bold if the interval does not contain 0.
        """
        sign = -self.factor if self.is_loss else self.factor
        paired = [sign * (mine[seed] - other[seed]) for seed in sorted(mine.keys() & other.keys())]
        if not paired:
            return ""
        middle = mean(paired)
        text = f"{middle:+.{self.digits}f}"
        if len(paired) == 1:
            return text
        quantile = student_t.ppf((1 + CONFIDENCE) / 2, len(paired) - 1)
        half = quantile * stdev(paired) / len(paired) ** 0.5
        low, high = middle - half, middle + half
        text += f" [{low:+.{self.digits}f}, {high:+.{self.digits}f}]"
        return f"**{text}**" if low > 0 or high < 0 else text

    def format_axis(self, axis: Axis) -> None:
        if not self.is_loss:
            axis.set_major_formatter(PercentFormatter(1))

    def best_range(self, scores: list[float], width: float) -> tuple[float, float]:
        """Return limits of an axis around the best scores.

        Networks that collapsed are left out, so that the others stay distinguishable.
        """
        width *= 16 if self.is_loss else 1
        margin = 0.05 * width
        if self.is_loss:
            return min(scores) - margin, min(max(scores), min(scores) + width) + margin
        return max(min(scores), max(scores) - width) - margin, max(scores) + margin


def score_of(rows: list[Row]) -> Score:
    """Return how the scores of these rows are shown, all of one network."""
    if rows and rows[0].network.startswith("gpt"):
        return Score("loss", 1, 4, True)
    return Score("accuracy", 100, 2, False)


def columns_of(rows: list[Row]) -> list[str]:
    """Return the headings of pruned networks in the order of the rows."""
    return [c for c in dict.fromkeys(row.column for row in rows) if c != "0%"]


def write_table(rows: list[Row], path: Path, command: str, reference: str = "pdp") -> None:
    """Write a Markdown table with a line for each setting, and the command that made it.

    All rows are of one device. The commits of their code stand below the command. A second table
    compares the settings with the reference, if that is among them.
    """
    score = score_of(rows)
    columns = columns_of(rows)
    settings = list(dict.fromkeys(row.setting for row in rows))
    seeds = len({row.seed for row in rows})
    counts = {len(group_of(rows, setting, column)) for setting in settings for column in columns}
    of_seeds = "one seed" if seeds == 1 else f"{seeds} seeds"
    if len(counts - {0}) > 1:
        of_seeds = f"up to {seeds} seeds (one where no deviation stands)"
    device = rows[0].device
    how = "with one thread" if device == "cpu" else f"beside others on one {device}"
    lines = [
        f"Test {score.description}, mean ± standard deviation of {of_seeds}: of the "
        f"finished network, then with soft masks (soft). Time per run {how}.",
        "",
        f"    {command}",
        "",
        f"Commits of the code: {', '.join(dict.fromkeys(row.commit for row in rows))}.",
        "",
        "| | " + " | ".join([*columns, *(f"soft, {column}" for column in columns), "time"]) + " |",
        "|---" * (2 * len(columns) + 2) + "|",
    ]
    notes = []
    for setting in settings:
        cells, soft_cells = [], []
        for column in columns:
            group = group_of(rows, setting, column)
            soft = [row.soft_score for row in group if row.soft_score is not None]
            cells.append(score.text([row.score for row in group]) if group else "")
            soft_cells.append(score.text(soft) if soft else "")
            missed = [row for row in group if abs(row.own_sparsity - float(row.sparsity)) > 5e-4]
            if missed and ":" not in column:
                reached = mean(row.own_sparsity for row in group)
                notes.append(f"{setting} at {column}: {100 * reached:.2f}%")
        time = f"{mean(row.seconds for row in rows if row.setting == setting):.0f} s"
        lines.append(f"| {setting} | " + " | ".join([*cells, *soft_cells, time]) + " |")
    if notes:
        title = "Sparsity before the final pruning, where it missed the budget: "
        lines += ["", title + "; ".join(notes) + "."]
    if reference in settings and len(settings) > 1:
        lines += ["", *comparison(rows, reference, settings, columns, score)]
    path.write_text("\n".join(lines) + "\n")


def comparison(
    rows: list[Row], reference: str, settings: list[str], columns: list[str], score: Score
) -> list[str]:
    """Return the lines of a table of how much better the reference is than each other setting."""

    def by_seed(setting: str, column: str) -> dict[str, float]:
        return {row.seed: row.score for row in group_of(rows, setting, column)}

    lines = [
        f"By how much {reference} is better than each, over the same seeds: mean [95% interval of "
        "the mean, Student's t], bold where the interval does not contain 0.",
        "",
        f"| {reference} against | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for setting in settings:
        if setting != reference:
            cells = [
                score.difference(by_seed(reference, column), by_seed(setting, column))
                for column in columns
            ]
            lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return lines


def group_of(rows: list[Row], setting: str, column: str) -> list[Row]:
    """Return the rows of a cell of the table. Dense networks stand in every column."""
    return [row for row in rows if row.setting == setting and row.column in (column, "0%")]


def plot_by_sparsity(rows: list[Row], path: Path) -> None:
    """Plot accuracy against the fraction of remaining weights, with a line for each setting."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    score = score_of(rows)
    axes.set_prop_cycle(color=colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2])
    for setting in dict.fromkeys(row.setting for row in rows):
        groups: dict[float, list[float]] = {}
        for row in rows:
            if row.setting == setting:
                groups.setdefault(1 - float(row.sparsity), []).append(row.score)
        remaining = sorted(groups)
        means = [mean(groups[x]) for x in remaining]
        errors = [stdev(groups[x]) if len(groups[x]) > 1 else 0.0 for x in remaining]
        if remaining == [1.0]:
            axes.axhline(means[0], color="black", linestyle=":", label=setting)
        else:
            axes.errorbar(
                remaining, means, errors, fmt="o-", markersize=3, capsize=2, label=setting
            )
    axes.set(xscale="log", xlabel="remaining weights", ylabel=f"test {score.name}")
    axes.invert_xaxis()
    axes.set_xticks(sorted({1 - float(row.sparsity) for row in rows if row.column != "0%"}))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.3g}%")
    score.format_axis(axes.yaxis)
    axes.set_ylim(*score.best_range([row.score for row in rows], 0.025))
    axes.grid(alpha=0.3)
    corner = "upper left" if score.is_loss else "lower left"
    axes.legend(loc=corner, ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)


def plot_by_setting(rows: list[Row], path: Path) -> None:
    """Plot the accuracy of each setting, pruned (filled) and with soft masks (open), by column."""
    score = score_of(rows)
    columns = columns_of(rows) or ["0%"]
    settings = list(dict.fromkeys(row.setting for row in rows))[::-1]
    figure = Figure(
        figsize=(4 + 2.5 * len(columns), 1.5 + 0.22 * len(settings)), layout="constrained"
    )
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        group = [row for row in rows if row.column in (column, "0%")]
        places = [settings.index(row.setting) for row in group]
        axes.plot([row.score for row in group], places, "o", markersize=4, label="pruned")
        soft = [(row.soft_score, settings.index(row.setting)) for row in group if row.soft_score]
        if soft:
            axes.plot(
                *zip(*soft, strict=True), "o", markersize=6, fillstyle="none", label="soft masks"
            )
        axes.set(xlabel=f"test {score.name}", title=column)
        axes.set_xlim(*score.best_range([row.score for row in group], 0.06))
        score.format_axis(axes.xaxis)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(settings)), settings, fontsize="small")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
