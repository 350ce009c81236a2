"""The cost of the compiled Triton kernels.

Most kernels are straight-line code: all instructions count, divided by the elements per thread of
the launch. Where a tile exceeds the tensor (3 x 3 convolutions along dim 1 use 9 of 16 columns),
the same instructions serve fewer elements. A loop over tiles counts as many times as it runs to
read its tiles. Where a kernel branches, the side counts that moves more in accesses of 16 bytes,
as full tiles do; of two equal ones the longer.
"""

import base64
import json
import sys
from pathlib import Path
from typing import NamedTuple

from instruments.build import ROOT, build
from instruments.cubin import Kernel, read_cubin
from instruments.measured import LOADS, STORES, Compiled, bits, measure, width
from instruments.sass import Function, Instruction, disassemble


class Launch(NamedTuple):
    """A launch of triton_launches. `measured` is False for kernels that are only compiled."""

    name: str
    measured: bool
    elements: int
    threads: int
    padded: int
    runs: int | None
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
    # The interpreter would compile nothing. The code depends on Triton's version and the sources.
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
    """Return all launches, and the costs of the measured ones and of all those of soft_mask."""
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
    """Return the code outside loops, and each loop with the number of times that it runs."""
    way = function.way(_worth)
    loops = [loop for loop in function.loops() if loop.blocks <= way]
    inside = set().union(*(loop.blocks for loop in loops))
    runs = [(function.instructions(way - inside), 1.0)]
    for loop in loops:
        body = function.instructions(loop.blocks)
        if launch.runs is not None:
            runs.append((body, launch.runs))
            continue
        read = bits(i for i in body if i.name in LOADS) / 8 / launch.element_bytes
        if loop.nested or read == 0 or launch.padded % read != 0:
            raise RuntimeError(f"{launch.name}: a loop whose number of runs is unknown")
        runs.append((body, launch.padded / read))
    return runs


def _worth(instructions: list[Instruction]) -> int:
    """Return a number by which wide accesses come first, and then the number of instructions."""
    wide = [i for i in instructions if i.name in LOADS | STORES and width(i) >= 128]
    return bits(wide) * 2**20 + len(instructions)


if __name__ == "__main__":
    measure_triton(sys.argv[1]).write(Path(sys.argv[2]))
