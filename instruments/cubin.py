"""Cubins, the ELF files of ptxas: code, subroutines, registers and stack of each kernel."""

import struct
from typing import NamedTuple

# Attributes in the section .nv.info that hold a function's symbol and a number.
FRAME_SIZE = 0x11
REGISTER_COUNT = 0x2F

SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
SYMBOL = struct.Struct("<IBBHQQ")


class Section(NamedTuple):
    name: str
    data: bytes


class Kernel(NamedTuple):
    """A compiled kernel.

    Attributes:
        name: its mangled name.
        code: its machine code.
        subroutines: their names, by offset in the code.
        registers: registers per thread.
        stack: bytes of local memory per thread: a frame, or spilled registers.
    """

    name: str
    code: bytes
    subroutines: dict[int, str]
    registers: int
    stack: int


def read_cubin(data: bytes) -> list[Kernel]:
    """Return the kernels of a cubin."""
    sections = _sections(data)
    names = next(s.data for s in sections if s.name == ".strtab")
    table = next(s.data for s in sections if s.name == ".symtab")
    symbols = [
        (_text(names, name), section, value)
        for name, _, _, section, value, _ in SYMBOL.iter_unpack(table)
    ]
    numbers = _function_numbers(next(s.data for s in sections if s.name == ".nv.info"))
    kernels = []
    for index, section in enumerate(sections):
        name = section.name.removeprefix(".text.")
        if name == section.name:
            continue
        inside = {value: symbol for symbol, place, value in symbols if place == index and value > 0}
        subroutines = {value: symbol for value, symbol in inside.items() if symbol[0] == "$"}
        own = next(i for i, (symbol, _, _) in enumerate(symbols) if symbol == name)
        kernels.append(
            Kernel(
                name,
                section.data,
                subroutines,
                numbers[REGISTER_COUNT, own],
                numbers.get((FRAME_SIZE, own), 0),
            )
        )
    return kernels


def _text(table: bytes, begin: int) -> str:
    return table[begin : table.index(b"\0", begin)].decode()


def _sections(data: bytes) -> list[Section]:
    if data[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    (begin,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    headers = [SECTION_HEADER.unpack_from(data, begin + i * size) for i in range(count)]
    _, _, _, _, names_begin, names_size, *_ = headers[names_index]
    names = data[names_begin : names_begin + names_size]
    return [Section(_text(names, h[0]), data[h[4] : h[4] + h[5]]) for h in headers]


def _function_numbers(info: bytes) -> dict[tuple[int, int], int]:
    """Return the numbers of functions, by attribute and symbol."""
    numbers, place = {}, 0
    while place < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, place)
        place += 4
        if form == 4:  # `size` bytes follow; in other forms `size` is the value
            if size == 8:
                symbol, number = struct.unpack_from("<II", info, place)
                numbers[attribute, symbol] = number
            place += size
    return numbers
