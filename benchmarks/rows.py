"""One line of a benchmark's result, and the files that lines are written to as they are measured.

Needs nothing but Python, so that results can be read where there is no torch.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

Environment = dict[str, object]


@dataclass
class Row:
    """What one provider took for one step on one input."""

    input: str
    tensors: int
    n: int
    dtype: str
    mask: str
    """"paper" or "pruner"; empty where a step has no soft mask."""
    step: str
    provider: str
    bytes_per_weight: float
    median_s: float | None = None
    quartile_low_s: float | None = None
    quartile_high_s: float | None = None
    runs: int = 0
    gb_per_s: float | None = None
    speedup: float | None = None
    """Median of the step's base over this median."""
    note: str = ""
    """Why there is no time: "wrong: ...", "failed: ..." or "skipped: ..."."""

    @property
    def is_error(self) -> bool:
        return self.note.startswith(("wrong", "failed"))


class ResultFiles:
    """FILE.csv or FILE.json, or both as benchmark.* in a folder: complete after every `add`.

    A CSV file begins with comment lines: environment and settings.
    """

    def __init__(self, destination: Path, environment: Environment, settings: Environment):
        self._content = {"environment": environment, "settings": settings, "rows": []}
        if destination.suffix in SUFFIXES:
            self.paths = [destination]
        else:
            self.paths = [destination / f"benchmark{suffix}" for suffix in SUFFIXES]
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".csv":
                with path.open("w", newline="") as file:
                    for name, value in (environment | settings).items():
                        print(f"# {name}: {value}", file=file)
                    csv.DictWriter(file, NAMES).writeheader()
        self.add([])

    def add(self, rows: Iterable[Row]) -> None:
        lines = [asdict(row) for row in rows]
        self._content["rows"] += lines
        for path in self.paths:
            if path.suffix == ".csv":
                with path.open("a", newline="") as file:
                    csv.DictWriter(file, NAMES).writerows(lines)
            else:
                write_json(path, self._content)


SUFFIXES = (".csv", ".json")
NAMES = [field.name for field in fields(Row)]


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write JSON at once, whatever becomes of the process; the folder is made where it is not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}")
    new.write_text(json.dumps(content, indent=1, default=str) + "\n")
    os.replace(new, path)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a CSV file, the last of which may be cut off."""
    numbers = {"tensors": int, "n": int, "runs": int}
    texts = ("input", "dtype", "mask", "step", "provider", "note")
    with path.open(newline="") as file:
        for line in csv.DictReader(text for text in file if not text.startswith("#")):
            if None in line.values():
                return
            yield Row(
                **{
                    name: value if name in texts else numbers.get(name, float)(value)
                    for name, value in line.items()
                    if value != "" or name in texts
                }
            )
