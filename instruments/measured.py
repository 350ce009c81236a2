"""Instructions per element of a compiled kernel.

Counts are static. An instruction counts once per run of the code that holds it, whatever its
predicate (it takes an issue slot anyway), and on both sides of a branch (threads of a warp may take
both) unless the caller leaves one out: an upper bound for code without loops. `issue` and the units
leave out subroutines for rare operands (subnormals, divisors beyond 32 bits). `with_subroutines`
counts them once per call. Other subroutines, such as pow, count in both.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from instruments.cards import cost
from instruments.cubin import Kernel
from instruments.sass import Function, Instruction

LOADS = frozenset(("LD", "LDG"))  # LD: generic address, which may be in shared memory
STORES = frozenset(("ST", "STG"))

RARE = re.compile(r"slowpath|mediumpath|div_rn_f64_full|(div|rem)_[su]64")


class Measured(NamedTuple):
    """A kernel, or one loop of it.

    Attributes:
        name: the title of the kernel or loop.
        architecture: the architecture that it is compiled for.
        registers: registers per thread.
        stack: bytes of local memory per thread.
        elements: elements that a thread handles in the counted code.
        bytes_moved: bytes per element that the operator has to move.
        per_element: instructions by unit (see cards.cost), and "with_subroutines".
        loads: loads from global memory per element, by width in bits. A "g" after the width marks a
            generic address, whose memory space the thread has to find out first.
        stores: stores to global memory per element, likewise.
        atomics: atomics in shared memory per element, by kind.
        fraction_wide: the fraction of the bytes that accesses of 16 bytes move.
    """

    name: str
    architecture: str
    registers: int
    stack: int
    elements: float
    bytes_moved: float
    per_element: dict[str, float]
    loads: dict[str, float]
    stores: dict[str, float]
    atomics: dict[str, float]
    fraction_wide: float

    @property
    def instructions(self) -> float:
        return self.per_element["issue"]


def width(access: Instruction) -> int:
    """Return how many bits per thread a load or store moves."""
    for part in access.opcode.split("."):
        if part in ("U8", "S8", "U16", "S16", "64", "128", "256"):
            return int(part.lstrip("US"))
    return 32


def bits(accesses: Iterable[Instruction]) -> int:
    """Return how many bits per thread the accesses move together."""
    return sum(map(width, accesses))


def measure(
    name: str,
    architecture: str,
    function: Function,
    runs: Iterable[tuple[list[Instruction], float]],
    elements: float,
    moved: float,
    needed: float,
) -> Measured:
    """Return the cost per element of the code that a thread runs.

    Args:
        name: the title of the code.
        architecture: the architecture that it is compiled for.
        function: the kernel that it belongs to.
        runs: lists of instructions, and how many times each list runs.
        elements: elements that a thread handles in the runs.
        moved: bytes per element that the operator has to move.
        needed: bytes that the runs move for all elements, including padding.
    """
    total: Counter[str] = Counter()
    loads: Counter[str] = Counter()
    stores: Counter[str] = Counter()
    atomics: Counter[str] = Counter()
    wide = 0.0
    for instructions, times in runs:
        called = list(filter(None, map(function.called, instructions)))
        bodies = {name: function.subroutines[name] for name in called}
        always = [i for name in called if not RARE.search(name) for i in bodies[name]]
        counted = cost([*instructions, *always])
        counted["with_subroutines"] = len(instructions) + sum(len(bodies[name]) for name in called)
        for unit, count in counted.items():
            total[unit] += count * times
        for instruction in instructions:
            if instruction.name in LOADS | STORES:
                moved_bits = width(instruction)
                generic = "g" if instruction.name in ("LD", "ST") else ""
                kind = loads if instruction.name in LOADS else stores
                kind[f"{moved_bits}{generic}"] += times
                wide += times * moved_bits / 8 if moved_bits >= 128 else 0
            elif instruction.name == "ATOMS":
                atomics[instruction.opcode.removeprefix("ATOMS.")] += times

    def each(counts: Counter[str]) -> dict[str, float]:
        return {key: round(count / elements, 3) for key, count in sorted(counts.items())}

    return Measured(
        name,
        architecture,
        function.kernel.registers,
        function.kernel.stack,
        round(elements, 3),
        round(moved, 3),
        each(total),
        each(loads),
        each(stores),
        each(atomics),
        round(min(1.0, wide / needed), 3),
    )


class Compiled(NamedTuple):
    """The kernels that a compiler made for one architecture.

    Attributes:
        resources: "registers" and "stack" of every kernel, by name.
        measured: the measured kernels and loops.
    """

    resources: dict[str, dict[str, int]]
    measured: list[Measured]

    @classmethod
    def of(cls, kernels: dict[str, Kernel], measured: Sequence[Measured]) -> "Compiled":
        resources = {
            name: {"registers": kernel.registers, "stack": kernel.stack}
            for name, kernel in kernels.items()
        }
        return cls(resources, list(measured))

    def write(self, path: Path) -> None:
        measured = [each._asdict() for each in self.measured]
        path.write_text(json.dumps({"resources": self.resources, "measured": measured}))

    @classmethod
    def read(cls, path: Path) -> "Compiled":
        fields = json.loads(path.read_text())
        return cls(fields["resources"], [Measured(**each) for each in fields["measured"]])
