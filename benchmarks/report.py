"""Tables of rows: all rows, one line for each input, and the most important ratios.

`python -m benchmarks.report FOLDER` summarises a run: a line for each kernel of ncu.csv, and for
each input of benchmark.csv.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.kernels import format_kernels
from benchmarks.rows import Environment, Row, read_rows

# (step, input, other provider) of the ratios in the last lines, with the paper's mask.
HEADLINES = (
    ("threshold", "2359296", "eager-kthvalue"),
    ("step", "2359296", "eager-kthvalue"),
    ("step", "2359296", "compiled-kthvalue"),
    ("mask", "2359296", "compiled"),
    ("threshold", "gpt2", "eager-kthvalue"),
    ("step", "gpt2", "eager-kthvalue"),
)

COLUMNS = {
    "input": str.ljust,
    "n": str.rjust,
    "dtype": str.ljust,
    "mask": str.ljust,
    "step": str.ljust,
    "provider": str.ljust,
    "vs eager": str.rjust,
    "median (ms)": str.rjust,
    "IQR": str.rjust,
    "B/weight": str.rjust,
    "GB/s": str.rjust,
    "of copy": str.rjust,
    "runs": str.ljust,
}


def format_environment(environment: Environment) -> str:
    """Return a line for each entry."""
    return "\n".join(f"{name}: {value}" for name, value in environment.items())


def format_table(rows: Sequence[Row]) -> str:
    """Return a GitHub table that is padded for plain text too. IQR is relative to the median."""
    copies = copy_rates(rows)
    lines = [_cells(row, copies.get((row.input, row.dtype))) for row in rows]
    return table(COLUMNS, lines)


def format_short_table(rows: Sequence[Row]) -> str:
    """Return a line for each input, dtype and mask, then the rows in error.

    A line has the times of `ours` for each step, and its rate as a fraction of the copy's.
    """
    copies = copy_rates(rows)
    ours = [row for row in rows if row.provider == "ours" and row.median_s]
    steps = list(dict.fromkeys(row.step for row in ours))
    masks: dict[tuple[str, str], list[str]] = {}
    for row in ours:
        masks.setdefault((row.input, row.dtype), [])
        if row.mask and row.mask not in masks[row.input, row.dtype]:
            masks[row.input, row.dtype].append(row.mask)
    cells = {}
    for row in ours:
        # A step without a mask is in the first line of its input.
        mask = row.mask or next(iter(masks[row.input, row.dtype]), "")
        copy = copies.get((row.input, row.dtype))
        fraction = f" {row.gb_per_s / copy:4.0%}" if copy else ""
        cells[row.input, row.dtype, mask, row.step] = f"{row.median_s * 1e3:.3g}{fraction}"
    lines = [
        (*key, mask, f"{copies.get(key, 0):.0f}", *(cells.get((*key, mask, s), "") for s in steps))
        for key, names in masks.items()
        for mask in names or [""]
    ]
    columns = {"input": str.ljust, "dtype": str.ljust, "mask": str.ljust, "copy GB/s": str.rjust}
    text = table(columns | dict.fromkeys(steps, str.rjust), lines)
    errors = [f"{describe(row)}: {row.note}" for row in rows if row.is_error]
    return "\n".join(["ours, in ms, and its GB/s as a fraction of the copy's:", text, *errors])


def describe(row: Row) -> str:
    """Return what identifies a row."""
    return " ".join(filter(None, (row.input, row.dtype, row.mask, row.step, row.provider)))


def copy_rates(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """Return GB/s of the copy by input and dtype."""
    copies = (row for row in rows if row.step == "copy" and row.gb_per_s)
    return {(row.input, row.dtype): row.gb_per_s for row in copies}


def table(columns: dict[str, Callable], lines: Iterable[Sequence[str]]) -> str:
    """Return a GitHub table that is padded for plain text too.

    Args:
        columns: Headings, with str.ljust or str.rjust.
        lines: The cells of each line.
    """
    lines = [tuple(columns), *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligns = columns.values()
    rule = [
        "-" * (width - 1) + (":" if align is str.rjust else "-")
        for align, width in zip(aligns, widths, strict=True)
    ]
    padded = [
        [align(cell, width) for align, cell, width in zip(aligns, line, widths, strict=True)]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


def _cells(row: Row, copy: float | None) -> tuple[str, ...]:
    key = (row.input, f"{row.n:,}", row.dtype, row.mask, row.step, row.provider)
    if row.note:
        return (*key, "", "", "", "", "", "", row.note)
    return (
        *key,
        f"{row.speedup:.3g}x" if row.speedup else "",
        f"{row.median_s * 1e3:.4g}",
        f"{(row.quartile_high_s - row.quartile_low_s) / row.median_s:.0%}",
        f"{row.bytes_per_weight:g}",
        f"{row.gb_per_s:.3g}",
        f"{row.gb_per_s / copy:.0%}" if copy else "",
        str(row.runs),
    )


def format_headlines(rows: Iterable[Row]) -> str:
    """Return a line for each headline and dtype: how many times faster ours is."""
    medians = {
        (row.step, row.input, row.dtype, row.provider): row.median_s
        for row in rows
        if row.median_s and row.mask in ("", "paper")
    }
    dtypes = dict.fromkeys(dtype for _, _, dtype, _ in medians)
    lines = []
    for step, name, other in HEADLINES:
        for dtype in dtypes:
            ours = medians.get((step, name, dtype, "ours"))
            theirs = medians.get((step, name, dtype, other))
            if ours and theirs:
                what = f"{step}, {name}, {dtype}"
                lines.append(f"{what}: ours is {theirs / ours:.3g}x as fast as {other}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for path in sorted(folder.rglob("ncu.csv")):
        print(f"{format_kernels(path)}\n")
    for path in sorted(folder.rglob("benchmark.csv")):
        print(f"{path.parent.name}\n{format_short_table(list(read_rows(path)))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
