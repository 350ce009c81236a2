"""The Triton kernels, compiled by Triton, and what their code costs.

Most are straight-line code: the whole kernel counts, divided by the elements that a launch has for
each of its threads. Where a tile reaches beyond the tensor (3 x 3 convolutions along dim 1 use 9 of
16 columns) fewer elements share the same instructions. A loop over tiles counts as often as it has
to run to read its tiles. Branches count on both sides.
"""

import base64
import json
import sys
from pathlib import Path
from typing import NamedTuple

from instruments.build import ROOT, build
from instruments.cubin import Kernel, read_cubin
from instruments.measured import LOADS, Compiled, bits, measure
from instruments.sass import Function, Instruction, disassemble


class Launch(NamedTuple):
    """See triton_launches; `measured` is False for what is only compiled."""

    name: str
    measured: bool
    elements: int
    threads: int
    padded: int
    bytes: int
    element_bytes: int
    kernel: Kernel


def triton_version() -> str:
    """Return Triton's version.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        import triton
    except ImportError as error:
        raise RuntimeError("no triton: pip install triton") from error
    return triton.__version__


def compile_triton(architecture: str) -> list[Launch]:
    """Return everything that Triton compiles for an architecture."""
    name = f"triton_{architecture}.json"
    script = ROOT / "instruments" / "triton_launches.py"
    # The interpreter compiles nothing; what the version is decides the code, as the sources do.
    environment = ["env", "-u", "TRITON_INTERPRET", f"PYTHONPATH={ROOT}"]
    environment += [f"TRITON_VERSION={triton_version()}"]
    written = build(
        name,
        [script, *sorted((ROOT / "triton_kernels").glob("*.py"))],
        [*environment, sys.executable, "-m", "instruments.triton_launches", architecture, name],
    )
    launches = []
    for fields in json.loads(written.read_text()):
        (kernel,) = read_cubin(base64.b64decode(fields.pop("cubin")))
        launches.append(Launch(kernel=kernel, **fields))
    return launches


def measure_triton(architecture: str) -> Compiled:
    """Return all launches, and what the code of those costs that are to be measured.

    Of the others, only those of soft_mask.
    """
    launches = compile_triton(architecture)
    chosen = [each for each in launches if each.measured or each.name.startswith("soft_mask")]
    functions = disassemble([launch.kernel for launch in chosen], architecture)
    measured = []
    for launch, function in zip(chosen, functions, strict=True):
        moved = launch.bytes / launch.elements
        measured.append(
            measure(
                launch.name,
                architecture,
                function,
                _runs(launch, function),
                launch.elements / launch.threads,
                moved,
                launch.padded * moved,
            )
        )
    return Compiled.of({launch.name: launch.kernel for launch in launches}, measured)


def _runs(launch: Launch, function: Function) -> list[tuple[list[Instruction], float]]:
    """The code outside of loops, and each loop as often as it runs to read its elements."""
    loops = function.loops()
    inside = set().union(*(loop.blocks for loop in loops))
    runs = [(function.instructions(set(range(len(function.blocks))) - inside), 1.0)]
    for loop in loops:
        body = function.instructions(loop.blocks)
        read = bits(i for i in body if i.name in LOADS) / 8 / launch.element_bytes
        if loop.nested or read == 0 or launch.padded % read != 0:
            raise RuntimeError(f"{launch.name}: a loop that is not understood")
        runs.append((body, launch.padded / read))
    return runs


if __name__ == "__main__":
    measure_triton(sys.argv[1]).write(Path(sys.argv[2]))
