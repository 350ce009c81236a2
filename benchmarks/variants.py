"""Time constants of the CUDA kernels, each in a build of its own.

`python -m benchmarks.variants build FOLDER` copies the sources for each variant, changes constants
and builds. `time FOLDER` runs the benchmark of thresholds in the unchanged build of this checkout,
then in each variant.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.report import copy_rates
from benchmarks.rows import read_rows

ROOT = Path(__file__).parents[1]
COPIED = ("csrc", "pdp_kernels", "setup.py", "pyproject.toml")
LINKED = ("benchmarks", "studies", "triton_kernels", "README.md", "LICENSE")


# Arguments of the benchmark that each build runs.
BENCHMARK = (
    *("--device", "cuda", "--dtypes", "float32", "bfloat16", "--budget", "0.2"),
    *("--inputs", "2359296", "100000000", "resnet50", "--steps", "copy", "threshold"),
    *("--providers", "copy", "ours"),
)


class Change(NamedTuple):
    """A constant of csrc/cuda/FILE and its new value."""

    file: str
    constant: str
    value: str


VARIANTS = {
    "2 packets in flight": (Change("block.cuh", "kPacketsInFlight", "2"),),
    "tiles of 8 KiB": (Change("weight_table.cuh", "kTile", "8 * 1024 / sizeof(Key)"),),
    "tiles of 64 KiB": (Change("weight_table.cuh", "kTile", "64 * 1024 / sizeof(Key)"),),
    "3 blocks": (Change("selection.cuh", "kSelectionBlocks", "3"),),
    "5 blocks": (Change("selection.cuh", "kSelectionBlocks", "5"),),
    "sampling in 512 threads": (Change("sample.cuh", "kSampleThreads", "512"),),
    "brackets of 4 deviations": (Change("sample.cuh", "kDeviations", "4"),),
    "samples of 8,192 keys": (Change("sample.cuh", "kMaxSample", "8 * 1024"),),
    "brackets of 256 bins": (
        Change("sample.cuh", "kBracketBins", "sizeof(Key) == 2 ? 4096 : 256"),
    ),
    "samples from 2^20 weights": (Change("thresholds.cuh", "kSampledFrom", "1 << 20"),),
    "samples from 2^24 weights": (Change("thresholds.cuh", "kSampledFrom", "1 << 24"),),
}


def changed(source: str, change: Change) -> str:
    """Return the source with the constant's new value.

    Raises:
        ValueError: The source has no such constant, or several.
    """
    pattern = rf"(constexpr \w+ {change.constant} = )[^;]+;"
    result, count = re.subn(pattern, rf"\g<1>{change.value};", source)
    if count != 1:
        raise ValueError(f"{change.file} has {count} constants {change.constant}, not one")
    return result


def folder_of(parent: Path, name: str) -> Path:
    """Return the folder of a variant."""
    return parent / re.sub(r"\W+", "-", name)


def copy_sources(folder: Path, changes: Sequence[Change]) -> None:
    """Copy the sources to a folder and change them; link what stays the same."""
    folder.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    for old in folder.glob("pdp_kernels/*.so"):
        old.unlink()
    for change in changes:
        path = folder / "csrc" / "cuda" / change.file
        path.write_text(changed(path.read_text(), change))


def build(folder: Path, name: str) -> bool:
    """Build a variant, with the compilers' output in build.log of its folder."""
    folder = folder_of(folder, name)
    copy_sources(folder, VARIANTS[name])
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    with (folder / "build.log").open("w") as log:
        environment = os.environ | {"MAX_JOBS": "2"}  # for each of the builds that run at a time
        result = subprocess.run(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    print(f"{name}: {'built' if result.returncode == 0 else f'failed, see {log.name}'}", flush=True)
    return result.returncode == 0


def time_build(checkout: Path, name: str, result: Path) -> bool:
    """Run the benchmark of thresholds in a checkout, and print a line for each input."""
    command = [sys.executable, "-m", "benchmarks", *BENCHMARK, "--out", str(result)]
    subprocess.run(command, cwd=checkout, stdout=subprocess.DEVNULL)
    rows = list(read_rows(result)) if result.exists() else []
    copies = copy_rates(rows)
    timed = [row for row in rows if row.step == "threshold" and row.median_s]
    for row in timed:
        of_copy = row.gb_per_s / copies[row.input, row.dtype]
        figures = f"{row.median_s * 1e6:9.1f} us {of_copy:5.0%}"
        print(f"{name:32}{row.input:12}{row.dtype:10}{figures}", flush=True)
    notes = [f"{row.input} {row.dtype}: {row.note}" for row in rows if row.is_error]
    if not timed:
        notes.append("nothing was timed")
    for note in notes:
        print(f"{name:32}{note}", flush=True)
    return not notes


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.variants", description=__doc__.splitlines()[0]
    )
    parser.add_argument("action", choices=("build", "time"))
    parser.add_argument("folder", type=Path, help="folder of the builds")
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT",
        help=f"any of: {'; '.join(VARIANTS)}",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=len(VARIANTS), help="builds at a time")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder for the CSV file of each variant"
    )
    arguments = parser.parse_args(words)
    if arguments.action == "time" and not arguments.out:
        parser.error("time needs --out")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.action == "build":
        with ThreadPoolExecutor(arguments.jobs) as pool:
            built = pool.map(lambda name: build(arguments.folder, name), arguments.only)
            return 0 if all(list(built)) else 1
    out = arguments.out.resolve()
    right = [time_build(ROOT, "as it is", out / "as-it-is.csv")]
    for name in arguments.only:
        folder = folder_of(arguments.folder, name)
        right.append(time_build(folder, name, out / f"{folder.name}.csv"))
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
