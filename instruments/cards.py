"""Cards, what instructions cost their multiprocessors, and the bandwidth that this leaves room for.

Every instruction takes an issue slot of its warp's scheduler: 4 schedulers x 32 lanes a clock. Some
also take a unit that has fewer lanes. A kernel cannot be faster than the slowest of these allows,
nor than a copy of the bytes it moves. Stalls, latency and bank conflicts make it slower.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from instruments.sass import Instruction

# Lanes a clock and multiprocessor of compute capability 9.0. CUDA C++ Best Practices Guide,
# "Throughput of Native Arithmetic Instructions": float32 arithmetic 128; float64 arithmetic, and
# integer addition, logic, shifts, comparisons and minima 64; exponentials, reciprocals, square
# roots, population counts and conversions from and to 64 bits 16.
LANES = {"issue": 128, "ALU": 64, "FP64": 64, "XU": 16}

# Integers but for IMAD, which float32's unit multiplies, and comparisons of any type.
ALU = frozenset(("BMSK", "IABS", "IADD3", "LEA", "LOP3", "MOV", "PLOP3", "PRMT", "SGXT", "SHF"))
ALU |= frozenset(("FMNMX", "FMNMX3", "FSEL", "FSET", "FSETP", "IMNMX", "ISETP", "SEL", "VIADD"))
ALU |= frozenset(("VIADDMNMX", "VIMNMX", "VIMNMX3"))
FP64 = frozenset(("DADD", "DFMA", "DMNMX", "DMUL", "DSETP"))
CONVERSIONS = frozenset(("F2F", "F2I", "FRND", "I2F"))
XU = frozenset(("FLO", "MUFU", "POPC"))


def cost(instructions: Iterable[Instruction]) -> Counter[str]:
    """Return how many instructions there are, and how many of them each unit takes.

    "MUFU" and "conversions" (from or to 64 bits) are parts of "XU", the unit for both.
    """
    counts: Counter[str] = Counter()
    for instruction in instructions:
        name = instruction.name
        converts = name in CONVERSIONS and "64" in instruction.opcode
        counts["issue"] += 1
        counts["ALU"] += name in ALU
        counts["FP64"] += name in FP64
        counts["MUFU"] += name == "MUFU"
        counts["conversions"] += converts
        counts["XU"] += name in XU or converts
    return counts


class Card(NamedTuple):
    name: str
    architecture: str
    multiprocessors: int  # as the device reports
    clock: float  # assumed under load; the maximum of both cards is 1.98 GHz
    copy: float  # bytes a second, read and written: a large copy on the device, measured

    @property
    def description(self) -> str:
        return (
            f"{self.name}: {self.multiprocessors} multiprocessors at an assumed "
            f"{self.clock / 1e9:.3f} GHz, a copy measured at {self.copy / 1e12:.1f} TB/s"
        )


CARDS = {
    "H200": Card("H200", "sm_90", 132, 1.755e9, 4.3e12),
    "H100": Card("H100", "sm_90", 132, 1.755e9, 3.0e12),  # SXM, 80 GB
}


def room(card: Card, unit: str, bytes_moved: float) -> float:
    """Return how many instructions of a unit fit into the time the card copies these bytes in."""
    return LANES[unit] * card.multiprocessors * card.clock * bytes_moved / card.copy


def fractions(card: Card, per_element: dict[str, float], bytes_moved: float) -> dict[str, float]:
    """Return the fraction of the copy's bandwidth that each unit allows, the tightest first.

    `per_element`: instructions, as `cost` counts them; `bytes_moved`: of one element.
    """
    allowed = {
        unit: room(card, unit, bytes_moved) / per_element[unit]
        for unit in LANES
        if per_element[unit] > 0
    }
    return dict(sorted(allowed.items(), key=lambda item: item[1]))
