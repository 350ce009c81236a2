"""Tables of rows: all rows, one line for each input, and the most important ratios.

`python -m benchmarks.report FOLDER` summarises a run: a line for each kernel of ncu*.csv, and for
each input of benchmark.csv.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.kernels import format_kernels
from benchmarks.rows import Environment, Row, read_rows

# (step, input, other provider) of the ratios in the last lines, with the first mask measured.
HEADLINES = (
    ("threshold", "2359296", "eager-kthvalue"),
    ("step", "2359296", "eager-kthvalue"),
    ("step", "2359296", "compiled-kthvalue"),
    ("mask", "2359296", "compiled"),
    ("threshold", "gpt2", "eager-kthvalue"),
    ("step", "gpt2", "eager-kthvalue"),
)

HOST_TITLE = "microseconds of the host for each layer:"

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
    "host (us/layer)": str.rjust,
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
    lines = [_cells(row, copies.get((row.input, weight_dtype(row)))) for row in rows]
    return table(list(COLUMNS.items()), lines)


def format_short_table(rows: Sequence[Row]) -> str:
    """Return a line for each input, dtype and mask, then the rows in error.

    A line has the times of `ours` for each step, and its rate as a fraction of the copy's.
    """
    copies = copy_rates(rows)
    ours = [row for row in rows if row.provider == "ours" and row.median_s]
    steps = list(dict.fromkeys(row.step for row in ours))
    # The dtypes and masks of each input and dtype of its weights. Steps without a mask are in the
    # first line.
    kinds: dict[tuple[str, str], dict[tuple[str, str], None]] = {}
    for row in ours:
        of_input = kinds.setdefault((row.input, weight_dtype(row)), {})
        if row.mask:
            of_input[row.dtype, row.mask] = None
    cells = {}
    for row in ours:
        key = row.input, weight_dtype(row)
        kind = (row.dtype, row.mask) if row.mask else next(iter(kinds[key]), (key[1], ""))
        copy = copies.get(key)
        fraction = f" {row.gb_per_s / copy:4.0%}" if copy else ""
        cells[(row.input, *kind, row.step)] = f"{row.median_s * 1e3:.3g}{fraction}"
    lines = []
    for key, of_input in kinds.items():
        for kind in of_input or [(key[1], "")]:
            line = (key[0], *kind)
            times = (cells.get((*line, step), "") for step in steps)
            lines.append((*line, f"{copies.get(key, 0):.0f}", *times))
    columns = [(heading, str.ljust) for heading in ("input", "dtype", "mask")]
    columns += [(heading, str.rjust) for heading in ("copy GB/s", *steps)]
    text = table(columns, lines)
    errors = [f"{describe(row)}: {row.note}" for row in rows if row.is_error]
    return "\n".join(["ours, in ms, and its GB/s as a fraction of the copy's:", text, *errors])


def format_host_table(rows: Sequence[Row]) -> str:
    """Return microseconds of the host for each layer, with a column for each provider.

    Inputs with the same number of weights share a line.
    """
    timed = [row for row in rows if row.host_us is not None]
    providers = list(dict.fromkeys(row.provider for row in timed))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in timed:
        line = lines.setdefault((row.step, str(row.tensors), row.dtype, row.mask), {})
        line[row.provider] = f"{row.host_us:.3g}"
    columns = [
        ("step", str.ljust),
        ("layers", str.rjust),
        ("dtype", str.ljust),
        ("mask", str.ljust),
    ]
    columns += [(name, str.rjust) for name in providers]
    cells = [(*key, *(line.get(name, "") for name in providers)) for key, line in lines.items()]
    return table(columns, cells)


def describe(row: Row) -> str:
    """Return what identifies a row."""
    return " ".join(filter(None, (row.input, row.dtype, row.mask, row.step, row.provider)))


def weight_dtype(row: Row) -> str:
    """Return the dtype of the weights of a row."""
    return row.dtype.partition("/")[0]


def copy_rates(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """Return GB/s of the copy by input and dtype of the weights."""
    copies = (row for row in rows if row.step == "copy" and row.gb_per_s)
    return {(row.input, row.dtype): row.gb_per_s for row in copies}


def table(columns: Sequence[tuple[str, Callable]], lines: Iterable[Sequence[str]]) -> str:
    """Return a GitHub table that is padded for plain text too.

    Args:
        columns: Headings, with str.ljust or str.rjust. The same heading may come twice.
        lines: The cells of each line.
    """
    headings, aligns = zip(*columns, strict=True)
    lines = [headings, *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
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
        return (*key, "", "", "", "", "", "", "", row.note)
    return (
        *key,
        f"{row.speedup:.3g}x" if row.speedup else "",
        f"{row.median_s * 1e3:.4g}",
        f"{(row.quartile_high_s - row.quartile_low_s) / row.median_s:.0%}",
        f"{row.host_us:.3g}" if row.host_us is not None else "",
        f"{row.bytes_per_weight:g}",
        f"{row.gb_per_s:.3g}",
        f"{row.gb_per_s / copy:.0%}" if copy else "",
        str(row.runs),
    )


def format_headlines(rows: Sequence[Row]) -> str:
    """Return a line for each headline and dtype, with the first mask: how many times faster."""
    first = next((row.mask for row in rows if row.mask), "")
    medians = {
        (row.step, row.input, row.dtype, row.provider): row.median_s
        for row in rows
        if row.median_s and row.mask in ("", first)
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
    for path in sorted(folder.rglob("ncu*.csv")):
        print(f"{path.stem}\n{format_kernels(path)}\n")
    for path in sorted(folder.rglob("benchmark.csv")):
        rows = list(read_rows(path))
        print(f"{path.parent.name}\n{format_short_table(rows)}\n")
        if any(row.host_us is not None for row in rows):
            print(f"{HOST_TITLE}\n{format_host_table(rows)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
