"""What a compiled kernel costs for each element, counted in its instructions.

Counts are static. An instruction in the counted code counts once each time the code is run through,
whether its predicate holds or not (it takes an issue slot all the same), and on both sides of a
branch (threads of a warp may take both): a bound from above for code without loops. Subroutines
for rare operands (denormals, divisors beyond 32 bits) are left out of `issue` and the units, and
counted, once for every call, in `with_subroutines`; others, such as pow, are in both.
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

LOADS = frozenset(("LD", "LDG"))  # LD: from an address that might be shared memory's
STORES = frozenset(("ST", "STG"))

RARE = re.compile(r"slowpath|mediumpath|div_rn_f64_full|(div|rem)_[su]64")


class Measured(NamedTuple):
    """A kernel, or one loop of it."""

    name: str
    architecture: str
    registers: int
    stack: int
    elements: float  # that a thread handles in the counted code
    bytes_moved: float  # of one element, as the operator needs it
    per_element: dict[str, float]  # instructions by unit, see cards.cost, and "with_subroutines"
    loads: dict[str, float]  # from global memory, per element, by their width in bits; "32g": by
    stores: dict[str, float]  # generic addresses, which a thread has to look at first
    atomics: dict[str, float]  # in shared memory, per element, by kind
    fraction_wide: float  # of the bytes moved, in accesses of 16 bytes

    @property
    def instructions(self) -> float:
        return self.per_element["issue"]


def width(access: Instruction) -> int:
    """Return how many bits of a thread a load or store moves."""
    for part in access.opcode.split("."):
        if part in ("U8", "S8", "U16", "S16", "64", "128", "256"):
            return int(part.lstrip("US"))
    return 32


def bits(accesses: Iterable[Instruction]) -> int:
    """Return how many bits of a thread they move together."""
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
    """Return what each of the `elements` costs that a thread handles in the `runs`.

    runs: instructions, and how often they are run through. moved: bytes of one element, as the
    operator needs it. needed: bytes that the runs move for all elements, padding included.
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

    def each(counts: Counter) -> dict[str, float]:
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
    """What a compiler made for an architecture: all kernels by name, and those measured."""

    resources: dict[str, dict[str, int]]  # "registers" and "stack"
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
