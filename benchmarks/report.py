"""Rows as a table, as CSV or JSON, and as the few ratios that matter most."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from benchmarks.measure import Row

Environment = dict[str, object]

# (step, input, other provider): the ratios that the last lines state, where they were measured.
HEADLINES = (
    ("threshold", "2359296", "eager-kthvalue"),
    ("step", "2359296", "eager-kthvalue"),
    ("step", "2359296", "compiled"),
    ("mask", "2359296", "compiled"),
    ("threshold", "gpt2", "eager-kthvalue"),
    ("step", "gpt2", "eager-kthvalue"),
)

COLUMNS = {
    "input": str.ljust,
    "n": str.rjust,
    "dtype": str.ljust,
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
    return "\n".join(f"{name}: {value}" for name, value in environment.items())


def format_table(rows: Sequence[Row]) -> str:
    """A GitHub table, padded so that it reads as plain text too. IQR is relative to the median."""
    copies = {(row.input, row.dtype): row.gb_per_s for row in rows if row.step == "copy"}
    lines = [tuple(COLUMNS), *(_cells(row, copies.get((row.input, row.dtype))) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligns = COLUMNS.values()
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
    key = (row.input, f"{row.n:,}", row.dtype, row.step, row.provider)
    if row.note:
        return (*key, "", "", "", "", "", "", row.note)
    return (
        *key,
        f"{row.speedup:.3g}x" if row.speedup else "",
        f"{row.median_s * 1e3:.4g}",
        f"{(row.quartile_high_s - row.quartile_low_s) / row.median_s:.0%}",
        str(row.bytes_per_weight),
        f"{row.gb_per_s:.3g}",
        f"{row.gb_per_s / copy:.0%}" if copy else "",
        str(row.runs),
    )


def format_headlines(rows: Iterable[Row]) -> str:
    """One line per headline and dtype: how many times faster ours is."""
    medians = {
        (row.step, row.input, row.dtype, row.provider): row.median_s for row in rows if row.median_s
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


def write_results(
    destination: Path, rows: Sequence[Row], environment: Environment, settings: Environment
) -> list[Path]:
    """Write FILE.csv or FILE.json, or both as benchmark.* into a folder; returns what it wrote."""
    writers = {".csv": _write_csv, ".json": _write_json}
    if destination.suffix in writers:
        paths = [destination]
    else:
        paths = [destination / f"benchmark{suffix}" for suffix in writers]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        writers[path.suffix](path, rows, environment, settings)
    return paths


def _write_csv(
    path: Path, rows: Sequence[Row], environment: Environment, settings: Environment
) -> None:
    """Comment lines with environment and settings, then a header, then the rows."""
    with path.open("w", newline="") as file:
        for name, value in (environment | settings).items():
            print(f"# {name}: {value}", file=file)
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def _write_json(
    path: Path, rows: Sequence[Row], environment: Environment, settings: Environment
) -> None:
    content = {
        "environment": environment,
        "settings": settings,
        "rows": [asdict(row) for row in rows],
    }
    write_json(path, content)


def write_json(path: Path, content: dict[str, object]) -> None:
    """Environment and rows as JSON, in a folder that is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")
