"""A row of a benchmark's results, and the files that rows are written to as they are measured.

Imports nothing but Python's library, so that results can be read without torch.
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
    """The time of one provider for one step on one input."""

    input: str
    tensors: int
    n: int
    dtype: str
    """Of the weight, or "weight/w_hat" where a soft mask writes another one."""
    mask: str
    """"relative" or "paper"; empty for a step without a soft mask."""
    step: str
    provider: str
    bytes_per_weight: float
    median_s: float | None = None
    quartile_low_s: float | None = None
    quartile_high_s: float | None = None
    runs: int = 0
    gb_per_s: float | None = None
    speedup: float | None = None
    """Median of the step's base divided by this median."""
    host_us: float | None = None
    """Microseconds on the host for each layer, with layers so small that kernels take no time."""
    note: str = ""
    """Why there is no time: "wrong: ...", "failed: ..." or "skipped: ..."."""

    @property
    def is_error(self) -> bool:
        """Whether the answer was wrong or the provider failed."""
        return self.note.startswith(("wrong", "failed"))


class ResultFiles:
    """The CSV and JSON files of a run, complete after every `add`.

    A CSV file begins with environment and settings in comment lines.

    Args:
        destination: FILE.csv, FILE.json, a folder for benchmark.csv and benchmark.json, or None
            for no file.
        environment: What the rows were measured on.
        settings: Arguments of the run.
    """

    def __init__(self, destination: Path | None, environment: Environment, settings: Environment):
        self._content = {"environment": environment, "settings": settings, "rows": []}
        if destination is None:
            self.paths = []
        elif destination.suffix in SUFFIXES:
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
        """Append rows to all files."""
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
    """Write a JSON file in one step, and its folder if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}")
    new.write_text(json.dumps(content, indent=1, default=str) + "\n")
    os.replace(new, path)


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a CSV file, without a last row that is cut off."""
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
