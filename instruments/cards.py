"""GPUs, the cost of instructions on their multiprocessors, and the bandwidth that it allows.

Every instruction takes an issue slot of its warp's scheduler: 4 schedulers x 32 lanes per clock.
Some also take a unit that has fewer lanes. A kernel is no faster than the slowest of these, and no
faster than a copy of the bytes that it moves. Stalls, latency and bank conflicts make it slower.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from instruments.sass import Instruction

# Lanes per clock and multiprocessor, compute capability 9.0. CUDA C++ Best Practices Guide,
# "Throughput of Native Arithmetic Instructions": float32 arithmetic 128; float64 arithmetic, and
# integer addition, logic, shifts, comparisons and minima 64; exponentials, reciprocals, square
# roots, population counts and conversions from and to 64 bits 16.
LANES = {"issue": 128, "ALU": 64, "FP64": 64, "XU": 16}

# Integer instructions except IMAD, which runs on float32's unit, and comparisons of any type.
ALU = frozenset(("BMSK", "IABS", "IADD3", "LEA", "LOP3", "MOV", "PLOP3", "PRMT", "SGXT", "SHF"))
ALU |= frozenset(("FMNMX", "FMNMX3", "FSEL", "FSET", "FSETP", "IMNMX", "ISETP", "SEL", "VIADD"))
ALU |= frozenset(("VIADDMNMX", "VIMNMX", "VIMNMX3"))
FP64 = frozenset(("DADD", "DFMA", "DMNMX", "DMUL", "DSETP"))
CONVERSIONS = frozenset(("F2F", "F2I", "FRND", "I2F"))
XU = frozenset(("FLO", "MUFU", "POPC"))


def cost(instructions: Iterable[Instruction]) -> Counter[str]:
    """Return the number of instructions, and how many of them each unit executes.

    "MUFU" and "conversions" (from or to 64 bits) are included in "XU", the unit for both.
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
    """A GPU.

    Attributes:
        name: the name of the model.
        architecture: the architecture that its code is compiled for.
        multiprocessors: the number that the device reports.
        clock: Hz, an assumption for a loaded card; the maximum of both cards is 1.98 GHz.
        copy: bytes per second, read and written, of a large copy on the device; measured.
    """

    name: str
    architecture: str
    multiprocessors: int
    clock: float
    copy: float

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
    """Return how many instructions of a unit run in the time in which the card copies the bytes."""
    return LANES[unit] * card.multiprocessors * card.clock * bytes_moved / card.copy


def fractions(card: Card, per_element: dict[str, float], bytes_moved: float) -> dict[str, float]:
    """Return the fraction of the copy bandwidth that each unit allows, the lowest first.

    Args:
        card: the GPU.
        per_element: instructions per element, as `cost` counts them.
        bytes_moved: bytes per element.

    Returns:
        The fraction by unit; above 1 if the unit is faster than the copy.
    """
    allowed = {
        unit: room(card, unit, bytes_moved) / per_element[unit]
        for unit in LANES
        if per_element[unit] > 0
    }
    return dict(sorted(allowed.items(), key=lambda item: item[1]))
