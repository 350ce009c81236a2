"""Machine code of NVIDIA GPUs (SASS): instructions, and the loops that their branches form.

nvdisasm, which ships with Triton, decodes the instructions. The control flow follows branches only:
a call returns, and BSYNC waits at its label. BRA.DIV, which serves a warp that diverges within a
warp instruction, counts as never taken.
"""

import functools
import itertools
import operator
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from instruments.cubin import Kernel


class Instruction(NamedTuple):
    """A decoded instruction.

    Attributes:
        address: its offset in the code.
        predicate: "@P0", "@!UP1", or empty.
        opcode: the opcode with its modifiers: LDG.E.128.CONSTANT.
        operands: the operands as text.
        places: its file and line, then those at which it was inlined.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    places: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]


class Loop(NamedTuple):
    """Blocks that reach each other. `nested`: the loops that remain without the first block."""

    blocks: set[int]
    nested: "list[Loop]"

    @property
    def own_blocks(self) -> set[int]:
        return self.blocks.difference(*(loop.blocks for loop in self.nested))

    def with_nested(self) -> "Iterator[Loop]":
        yield self
        for loop in self.nested:
            yield from loop.with_nested()


class Function:
    """The instructions of a kernel: basic blocks, and subroutines by name.

    Unreachable blocks are left out: padding, and code that only BRA.DIV reaches.

    Args:
        kernel: the kernel.
        code: its instructions.
        labels: addresses in the kernel by label. A branch names a label or an address.
    """

    def __init__(self, kernel: Kernel, code: Sequence[Instruction], labels: dict[str, int]) -> None:
        self.kernel = kernel
        starts = sorted(kernel.subroutines)
        end = starts[0] if starts else len(kernel.code)
        main = [instruction for instruction in code if instruction.address < end]
        self.subroutines = {
            kernel.subroutines[start]: [i for i in code if start <= i.address < stop]
            for start, stop in itertools.pairwise([*starts, len(kernel.code)])
        }
        labels = labels | {name: start for start, name in kernel.subroutines.items()}
        ways = _ways(kernel.name, main, labels)
        reached = _reached(ways)
        begins = {0} | {after for way in ways if len(way) != 1 for after in way}
        begins |= {after for place, way in enumerate(ways) for after in way if after != place + 1}
        blocks: list[list[int]] = []
        for place in sorted(reached):
            if place in begins or blocks[-1][-1] != place - 1:
                blocks.append([])
            blocks[-1].append(place)
        number = {block[0]: index for index, block in enumerate(blocks)}
        self.blocks = [[main[place] for place in block] for block in blocks]
        self._next = [[number[after] for after in ways[block[-1]]] for block in blocks]

    def instructions(self, blocks: Iterable[int] | None = None) -> list[Instruction]:
        """Return the instructions of some blocks, or of all, in order."""
        chosen = range(len(self.blocks)) if blocks is None else sorted(blocks)
        return [instruction for block in chosen for instruction in self.blocks[block]]

    def called(self, instruction: Instruction) -> str | None:
        """Return the name in `subroutines` that a CALL jumps to, or None."""
        if instruction.name != "CALL":
            return None
        name, address = TARGET.search(instruction.operands).groups()
        name = name or self.kernel.subroutines.get(int(address, 16))
        return name if name in self.subroutines else None

    def way(self, worth: Callable[[list[Instruction]], int]) -> set[int]:
        """Return the blocks of the way through the kernel that is worth most.

        It goes from the first block to an end, and through the whole of a loop.
        """
        loop_of = {block: loop.blocks for loop in self.loops() for block in loop.blocks}

        @functools.cache
        def best(block: int) -> tuple[int, frozenset[int]]:
            here = frozenset(loop_of.get(block, {block}))
            following = {after for each in here for after in self._next[each]} - here
            after, rest = max(map(best, sorted(following)), default=(0, frozenset()), key=first)
            return worth(self.instructions(here)) + after, here | rest

        first = operator.itemgetter(0)
        return set(best(0)[1])

    def loops(self) -> list[Loop]:
        """Return the outermost loops."""
        return _loops(set(range(len(self.blocks))), self._next)


def find_nvdisasm() -> Path:
    """Return Triton's nvdisasm, or the one on PATH.

    Raises:
        RuntimeError: neither is installed.
    """
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        if bundled.exists():
            return bundled
    found = shutil.which("nvdisasm")
    if found is None:
        raise RuntimeError("no nvdisasm: install triton, which brings it, or put CUDA's on PATH")
    return Path(found)


def _nvdisasm(*arguments: object) -> str:
    command = [find_nvdisasm(), "-ndf", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def disassemble(kernels: Sequence[Kernel], architecture: str) -> list[Function]:
    """Return the instructions of the kernels, without source lines.

    One call of nvdisasm decodes all kernels together, because it takes 0.4 s to start.
    """
    with tempfile.TemporaryDirectory() as folder:
        together = Path(folder, "code")
        together.write_bytes(b"".join(kernel.code for kernel in kernels))
        text = _nvdisasm("-b", architecture.replace("sm_", "SM"), together)
    code, _ = _read(text.splitlines())
    functions, begin, first = [], 0, 0
    for kernel in kernels:
        last = first + len(kernel.code) // 16
        own = [_moved(instruction, -begin) for instruction in code[first:last]]
        functions.append(Function(kernel, own, {}))
        begin, first = begin + len(kernel.code), last
    return functions


def disassemble_with_lines(cubin: Path, kernels: Sequence[Kernel]) -> list[Function]:
    """Return the instructions of a cubin's kernels with the source lines of -lineinfo."""
    sections: dict[str, list[str]] = {}
    for line in _nvdisasm("-c", "-gi", cubin).splitlines():
        if match := SECTION.match(line):
            sections[match[1]] = lines = []
        elif sections:
            lines.append(line)
    return [Function(kernel, *_read(sections[kernel.name])) for kernel in kernels]


SECTION = re.compile(r"\s*\.section\s+\.text\.([^\s,]+)")
PLACE = re.compile(r'\s*//## File "([^"]*)", line (\d+)')
LABEL = re.compile(r"(\.L_x_\d+):")
CODE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z]\S*)\s*([^;]*?)\s*;")
TARGET = re.compile(r"`\((\S+)\)$|\b0x([0-9a-f]+)$")
JUMPS = ("BRA", "CALL", "JMP")  # ptxas also calls addresses in the kernel's own code
PREDICATE_OPERAND = re.compile(r"!?U?P\d\b")


def _read(lines: Iterable[str]) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions of one function, and the addresses of its labels."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    places: tuple[tuple[str, int], ...] = ()
    continues = False  # whether the previous line was a place too
    for line in lines:
        if match := CODE.match(line):
            address, predicate, opcode, operands = match.groups(default="")
            code.append(Instruction(int(address, 16), predicate.strip(), opcode, operands, places))
            continues = False
        elif match := PLACE.match(line):
            place = (match[1], int(match[2]))
            places = (*places, place) if continues else (place,)
            continues = True
        elif match := LABEL.match(line):
            labels[match[1]] = 16 * len(code)
    return code, labels


def _moved(instruction: Instruction, distance: int) -> Instruction:
    operands = instruction.operands
    if instruction.name in JUMPS:
        operands = re.sub(
            r"\b0x([0-9a-f]+)$", lambda match: hex(int(match[1], 16) + distance), operands
        )
    return instruction._replace(address=instruction.address + distance, operands=operands)


def _ways(name: str, code: list[Instruction], labels: dict[str, int]) -> list[list[int]]:
    """Return the indices of the instructions that may follow each instruction."""
    place_of = {instruction.address: place for place, instruction in enumerate(code)}
    ways = []
    for place, instruction in enumerate(code):
        after = [place + 1] if place + 1 < len(code) else []
        if instruction.name in ("BRX", "JMX"):
            raise RuntimeError(f"{name} has a jump table ({instruction.opcode})")
        if instruction.name in JUMPS and instruction.opcode != "BRA.DIV":
            label, address = TARGET.search(instruction.operands).groups()
            target = place_of.get(labels[label] if label else int(address, 16))
            condition = PREDICATE_OPERAND.search(instruction.operands.partition("`")[0])
            if target is None:  # a subroutine
                ways.append(after)
            elif instruction.predicate or condition or instruction.name == "CALL":
                ways.append(sorted({target, *after}))
            else:
                ways.append([target])
        elif instruction.name in ("EXIT", "RET"):
            ways.append(after if instruction.predicate else [])
        else:
            ways.append(after)
    return ways


def _reached(ways: list[list[int]]) -> set[int]:
    reached: set[int] = set()
    waiting = [0]
    while waiting:
        place = waiting.pop()
        if place not in reached:
            reached.add(place)
            waiting += ways[place]
    return reached


def _loops(blocks: set[int], following: list[list[int]]) -> list[Loop]:
    found = []
    for cycle in _cycles(blocks, following):
        entered = {
            after for block, way in enumerate(following) if block not in cycle for after in way
        }
        first = min(cycle & entered, default=min(cycle))
        found.append(Loop(cycle, _loops(cycle - {first}, following)))
    return found


def _cycles(blocks: set[int], following: list[list[int]]) -> list[set[int]]:
    """Return the strongly connected components that hold an edge (Kosaraju and Sharir)."""
    forward = {block: [n for n in following[block] if n in blocks] for block in sorted(blocks)}
    backward: dict[int, list[int]] = {block: [] for block in forward}
    for block, way in forward.items():
        for after in way:
            backward[after].append(block)
    seen: set[int] = set()
    order = [block for start in forward for block in _depth_first(start, forward, seen)]
    seen = set()
    components = [set(_depth_first(start, backward, seen)) for start in reversed(order)]
    return sorted(
        (c for c in components if len(c) > 1 or any(block in forward[block] for block in c)),
        key=min,
    )


def _depth_first(start: int, ways: dict[int, list[int]], seen: set[int]) -> list[int]:
    """Return the unseen blocks that `start` reaches, in postorder."""
    if start in seen:
        return []
    seen.add(start)
    finished, stack = [], [(start, iter(ways[start]))]
    while stack:
        block, rest = stack[-1]
        after = next((n for n in rest if n not in seen), None)
        if after is None:
            finished.append(block)
            stack.pop()
        else:
            seen.add(after)
            stack.append((after, iter(ways[after])))
    return finished
