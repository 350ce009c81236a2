"""Reports on the compiled kernels. It needs nvcc or Triton, but no GPU.

The report shows registers, widths of accesses, instructions per element, and the fraction of a
card's copy bandwidth that they allow.

    python -m instruments.compiled                                released kernels, sm_90, H200
    python -m instruments.compiled --kernels "*backward bf16*" --card H100
    python -m instruments.compiled --arch sm_100                  counts only: no card is known
    python -m instruments.compiled --update                       rewrite compiled_figures.json

cuda_loops.py counts instructions of CUDA kernels in the loop that reads the weights, triton_code.py
those of Triton kernels from end to end. measured.py divides both by the number of elements, and
cards.py compares them with the issue rate of a multiprocessor. Counts are static: they ignore
stalls, latency, occupancy, bank conflicts, and how often a branch is taken or atomics collide. So
"of copy" is an upper bound: below 100% the kernel is not bound by memory; at 100% only a
measurement can tell.

tests/instruments/test_compiled_kernels.py keeps the instructions per element at or below the
committed figures.
"""

import argparse
import fnmatch
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from instruments import cuda_loops, triton_code
from instruments.build import ROOT, build
from instruments.cards import CARDS, Card, fractions
from instruments.measured import Compiled, Measured

FIGURES = ROOT / "instruments" / "compiled_figures.json"
FIGURES_ARCHITECTURES = ("sm_90", "sm_100")

COMPILERS = {"nvcc": cuda_loops.nvcc_version, "triton": triton_code.triton_version}
MODULES = {"nvcc": "cuda_loops", "triton": "triton_code"}


def versions() -> dict[str, str]:
    """Return the versions of the installed compilers."""
    found = {}
    for compiler, version in COMPILERS.items():
        try:
            found[compiler] = version()
        except RuntimeError as error:
            print(f"{error}: its kernels are left out", file=sys.stderr)
    return found


def compile_and_measure(jobs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Compiled]:
    """Compile for each (compiler, architecture) in parallel, and return the cached results."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(lambda job: _measure(*job), jobs), strict=True))


def _measure(compiler: str, architecture: str) -> Compiled:
    module = MODULES[compiler]
    result = f"{module}_{architecture}.json"
    modules = ("cards", "cubin", "measured", "sass", "triton_launches", module)
    sources = [ROOT / "instruments" / f"{name}.py" for name in modules]
    if compiler == "nvcc":
        sources += cuda_loops.sources()
    else:
        sources += (ROOT / "triton_kernels").glob("*.py")
    # Nobody reads the variable VERSION: it makes the compiler's version part of the cache's key.
    environment = ["env", f"PYTHONPATH={ROOT}", f"VERSION={COMPILERS[compiler]()}"]
    program = [sys.executable, "-m", f"instruments.{module}", architecture, result]
    return Compiled.read(build(result, sorted(sources), [*environment, *program]))


# Widths of the report's columns. cards.cost counts the units.
COLUMNS = {"kernel": 48, "regs": 4, "spill": 5, "loads": 8, "stores": 7, "bytes": 5}
COLUMNS |= {"instr": 6, "most": 5, "MUFU": 5, "FP64": 5, "cvt64": 5, "of copy": 7}
UNITS = ("MUFU", "FP64", "conversions")

LEGEND = """\
per element: bytes moved; instructions; most: with the subroutines for rare operands; MUFU
(exponential, reciprocal, root); float64 arithmetic; conversions from or to 64 bits; shared atomics.
loads, stores: bits per access, for accesses that move a quarter or more; g: generic addresses.
of copy: the bound by the units, which include issue slots; XU executes MUFU and conversions.
f32>bf16: float32 weights to bfloat16 w_hat. odd: 16 does not divide the number of elements. linear:
4096 x 4096, conv: 512 x 512 x 3 x 3."""


def table(results: Iterable[Measured], card: Card | None) -> Iterator[str]:
    """Yield the table of the kernels of one architecture, line by line."""
    yield _line([*COLUMNS][: None if card else -1], "bound by" if card else "", "shared atomics")
    previous = ""
    for measured in results:
        if measured.name.split()[0] != previous:
            yield ""
        previous = measured.name.split()[0]
        each = measured.per_element
        most = each["with_subroutines"]
        cells = [
            measured.name,
            measured.registers,
            measured.stack or "-",
            _widths(measured.loads),
            _widths(measured.stores),
            f"{measured.bytes_moved:.3g}",
            f"{measured.instructions:.1f}",
            f"{most:.0f}" if most > measured.instructions else "-",
            *(f"{each[unit]:.3g}" if each[unit] >= 0.01 else "-" for unit in UNITS),
        ]
        bound = ""
        if card is not None:
            allowed = fractions(card, each, measured.bytes_moved)
            cells.append(f"{min(1.0, *allowed.values()):.0%}")
            bound = _bound(allowed)
        atomics = [f"{count:.2g} {kind}" for kind, count in measured.atomics.items()]
        yield _line(cells, bound, ", ".join(atomics))


def _line(cells: Sequence[object], bound: str, atomics: str) -> str:
    first, *rest = COLUMNS.values()
    columns = [f"{cells[0]:<{first}}"]
    columns += [f"{cell:>{width}}" for cell, width in zip(cells[1:], rest, strict=False)]
    return " ".join([*columns, f" {bound:<22}", atomics]).rstrip()


def _widths(accesses: dict[str, float]) -> str:
    """Return the widths that move at least a quarter of the bytes, most bytes first."""
    moved = {width: int(width.rstrip("g")) * count for width, count in accesses.items()}
    chosen = [width for width in moved if moved[width] >= sum(moved.values()) / 4]
    return "+".join(sorted(chosen, key=moved.__getitem__, reverse=True)) or "-"


def _bound(allowed: dict[str, float]) -> str:
    """Return the units that allow less than the copy, or else the slowest unit's fraction."""
    below = [f"{unit} {fraction:.0%}" for unit, fraction in allowed.items() if fraction < 1]
    unit, fraction = next(iter(allowed.items()))
    return ", ".join(below) or f"memory ({unit} {fraction:.1f}x)"


def figures(results: dict[tuple[str, str], Compiled]) -> dict[str, dict[str, Any]]:
    """Return the content of compiled_figures.json.

    For each compiler it has the version, and for each architecture the instructions per element of
    every measured kernel.
    """
    found: dict[str, dict[str, Any]] = {}
    for (compiler, architecture), compiled in results.items():
        entry = found.setdefault(compiler, {"version": COMPILERS[compiler]()})
        entry[architecture] = {each.name: each.instructions for each in shipped(compiled)}
    return found


def shipped(compiled: Compiled) -> list[Measured]:
    """Return the released kernels, without those compiled only for the tests."""
    return [each for each in compiled.measured if not each.name.endswith("(all outputs)")]


def rises(committed: dict[str, float], measured: dict[str, float]) -> list[str]:
    """Return the errors in the figures of one compiler and architecture, one line each."""
    wrong = [f"{name}: no committed figure" for name in measured if name not in committed]
    wrong += [f"{name}: committed, but not measured" for name in committed if name not in measured]
    return wrong + [
        f"{name}: {measured[name]} instructions per element, {committed[name]} are committed"
        for name in committed
        if name in measured and measured[name] > committed[name]
    ]


def main() -> None:
    """Print the report, or rewrite the committed figures."""
    parser = argparse.ArgumentParser(
        prog="python -m instruments.compiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=FIGURES_ARCHITECTURES)
    parser.add_argument("--kernels", metavar="GLOB", default="*", help="only these kernels")
    parser.add_argument("--card", choices=CARDS, default="H200", help="default: H200")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write everything there")
    parser.add_argument("--update", action="store_true", help=f"rewrite {FIGURES.name}")
    options = parser.parse_args()
    found = versions()
    if not found:
        sys.exit("neither nvcc nor Triton is installed")
    architectures = FIGURES_ARCHITECTURES if options.update else options.arch
    jobs = [(compiler, architecture) for architecture in architectures for compiler in found]
    results = compile_and_measure(jobs)
    if options.update:
        kept = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
        FIGURES.write_text(json.dumps(kept | figures(results), indent=1) + "\n")
        return
    for architecture in options.arch:
        made = [results[key] for key in results if key[1] == architecture]
        print("\n".join(report(made, card_for(architecture, options.card), options.kernels)), "\n")
    if options.json:
        document = {
            "versions": found,
            "resources": {f"{c} {a}": results[c, a].resources for c, a in results},
            "measured": [_fields(m, options.card) for c in results.values() for m in c.measured],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def card_for(architecture: str, name: str) -> Card | None:
    """Return the card of that name if the architecture is its own."""
    return CARDS[name] if CARDS[name].architecture == architecture else None


def report(made: Sequence[Compiled], card: Card | None, names: str) -> Iterator[str]:
    """Yield the report on one architecture, line by line."""
    every = [measured for each in made for measured in shipped(each)]
    resources = {name: each for compiled in made for name, each in compiled.resources.items()}
    stacks = {name: each["stack"] for name, each in resources.items() if each["stack"] > 0}
    yield f"{every[0].architecture}, {card.description if card else 'counts only'}"
    yield LEGEND
    yield ""
    yield from table([each for each in every if fnmatch.fnmatch(each.name, names)], card)
    yield ""
    yield f"{len(resources)} kernels compiled, {len(stacks)} with local memory"
    yield from (f"{name}: {stack} bytes" for name, stack in stacks.items())


def _fields(measured: Measured, card_name: str) -> dict[str, Any]:
    card = card_for(measured.architecture, card_name)
    allowed = card and fractions(card, measured.per_element, measured.bytes_moved)
    return measured._asdict() | {"fractions_of_copy": allowed}


if __name__ == "__main__":
    main()
