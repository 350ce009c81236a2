"""Find the loops in which the CUDA kernels, compiled by nvcc, read their weights.

A hot loop is an innermost loop among those with loads from a source line that reads weights. nvcc
-lineinfo, which changes no instruction, tells the lines. If the compiler unrolled a loop and left
another for the remainder, the one that reads more counts. An iteration handles as many weights as
its loads read. A loop inside a hot loop that reads none (it writes candidates now and then) counts
as if it ran once in every iteration.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from instruments.build import ROOT, build, cuda_sources
from instruments.cubin import read_cubin
from instruments.measured import LOADS, Compiled, Measured, bits, measure, width
from instruments.sass import Function, Instruction, Loop, disassemble_with_lines

KERNELS = ROOT / "instruments" / "cuda_kernels.cu"

FLAGS = ("-O3", "-std=c++17", "-lineinfo", "-cubin")  # the first two are setup.py's

SIZES = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8}


class HotLoop(NamedTuple):
    kernel: str  # name of the template
    title: str
    reads: str  # text of the source lines with its loads
    contains: str = ""  # text of another source line in the loop
    beside: int = 0  # bytes of other arrays for each weight
    leaves_out: str = ""  # text of a source line that runs in few iterations
    reads_beside: int = 0  # bytes of other arrays that these loads read for each weight
    dtype: str = ""  # of the weights, and of w_hat if it differs; else the loop tells it


def _soft_mask_loops() -> Iterator[HotLoop]:
    """Yield the loops of soft_mask_list: one for each pair of types, temperature and direction."""
    types = {"f32": "float", "bf16": "BFloat16", "f16": "Half", "f64": "double"}
    pairs = [
        dtype.split(">") for dtype in ("f32>f32", "f32>bf16", "bf16>bf16", "f16>f16", "f64>f64")
    ]
    for number, way in enumerate(("forward", "backward")):
        for relative, temperature in (("false", "absolute"), ("true", "relative")):
            for weight, w_hat in pairs:
                real = "double" if weight == "f64" else "float"
                yield HotLoop(
                    f"soft_mask_list_kernel<(MaskPass){number}, {real}, {relative}",
                    f"soft_mask_list {way} {temperature}",
                    "packet * kElements]",
                    f"mask_packets<kPass, {types[weight]}, {types[w_hat]}>",
                    # The forward writes w_hat. The backward reads its gradient and writes another.
                    beside=SIZES[w_hat] + number * SIZES[weight],
                    reads_beside=number * SIZES[w_hat],
                    dtype=weight if weight == w_hat else f"{weight}>{w_hat}",
                )


# For each kernel, the first that matches counts.
HOT_LOOPS = [
    *_soft_mask_loops(),
    HotLoop("bracket_kernel", "thresholds bracket", "packets[", leaves_out="flush();"),
    HotLoop("survivors_kernel", "thresholds survivors", "packets["),
    HotLoop("first_digit_kernel", "thresholds first digit", "packets["),
    HotLoop("later_digit_kernel", "thresholds collecting", "packets[", "stage.push("),
    HotLoop("later_digit_kernel", "thresholds candidates", "packets[", "Memory::kWorkspace>("),
    HotLoop("later_digit_kernel", "thresholds later digit", "packets["),
    HotLoop("write_mask_kernel", "hard_mask write", "loads[i", beside=1),
    HotLoop("write_mask_kernel", "hard_mask write unaligned", "weights[i]", beside=1),
    HotLoop("count_digit_kernel", "digit_counts", "packets["),
    HotLoop(
        "sum_tiles_kernel<(Norms)0>", "power_sums p=0.5 q=1 masked", "packets[", "masks[", beside=1
    ),
    HotLoop("sum_tiles_kernel<(Norms)0>", "power_sums p=0.5 q=1", "packets["),
    HotLoop("sum_tiles_kernel<(Norms)0>", "power_sums p=0.5 q=1 unaligned", "unaligned[j]"),
    HotLoop("sum_tiles_kernel<(Norms)0>", "power_sums p=0.5 q=1", "weights[i]"),
    HotLoop(
        "sum_tiles_kernel<(Norms)1>", "power_sums p=0.5 q=2 masked", "packets[", "masks[", beside=1
    ),
    HotLoop("sum_tiles_kernel<(Norms)1>", "power_sums p=0.5 q=2", "packets["),
    HotLoop("sum_tiles_kernel<(Norms)1>", "power_sums p=0.5 q=2 unaligned", "unaligned[j]"),
    HotLoop("sum_tiles_kernel<(Norms)1>", "power_sums p=0.5 q=2", "weights[i]"),
    HotLoop(
        "sum_tiles_kernel<(Norms)2>", "power_sums p=1 q=2 masked", "packets[", "masks[", beside=1
    ),
    HotLoop("sum_tiles_kernel<(Norms)2>", "power_sums p=1 q=2", "packets["),
    HotLoop("sum_tiles_kernel<(Norms)2>", "power_sums p=1 q=2 unaligned", "unaligned[j]"),
    HotLoop("sum_tiles_kernel<(Norms)2>", "power_sums p=1 q=2", "weights[i]"),
    HotLoop("sum_tiles_kernel<(Norms)3>", "power_sums any p, q", "weights[i]"),
]

# The dtype of a loop's weights: from the kernel's first template argument, or from source lines in
# the loop if the kernel handles several dtypes.
ARGUMENT_DTYPES = {
    "double": "f64",
    "unsigned long": "f64",
    "float": "f32",
    "unsigned int": "f32",
    "BFloat16": "bf16",
    "Half": "f16",
}
LINE_DTYPES = {
    "return words[j] & 0x7FFFFFFF": "f32",
    "word << 16 : word": "bf16",
    "cvt.f32.f16": "f16",
    "static_cast<const BFloat16*>": "bf16",
    "static_cast<const Half*>": "f16",
    "0x1p112": "f16",
}
WIDTH_DTYPES = {64: "f64", 32: "f32", 16: "bf16"}


def find_nvcc() -> Path:
    """Return the path of nvcc, from PATH, CUDA_HOME or its usual place.

    Raises:
        RuntimeError: there is no nvcc in any of them.
    """
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        raise RuntimeError("no nvcc: put it on PATH or set CUDA_HOME")
    return Path(found)


def nvcc_version() -> str:
    """Return the release of nvcc, such as 13.0.88."""
    printed = subprocess.check_output([find_nvcc(), "--version"], text=True)
    return re.search(r"release .*, V([\d.]+)", printed)[1]


def sources() -> list[Path]:
    """Return the source files of the kernels."""
    return [KERNELS, *(path for path in cuda_sources() if ROOT / "csrc" in path.parents)]


def compile_cuda(architecture: str) -> Path:
    """Compile all CUDA kernels and return the cubin."""
    name = f"kernels_{architecture}.cubin"
    command = [find_nvcc(), *FLAGS, f"-arch={architecture}", KERNELS, "-o", name]
    return build(name, sources(), command)


def read_kernels(architecture: str) -> dict[str, Function]:
    """Return the CUDA kernels by their C++ names, such as write_mask_kernel<float>."""
    cubin = compile_cuda(architecture)
    functions = disassemble_with_lines(cubin, read_cubin(cubin.read_bytes()))
    mangled = "\n".join(function.kernel.name for function in functions)
    filtered = subprocess.run(
        ["c++filt", "-p"], input=mangled, capture_output=True, text=True, check=True
    )
    names = filtered.stdout.replace("pdp::", "").splitlines()
    return dict(zip(names, functions, strict=True))


@cache
def _source(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_relative_to(ROOT) else []


def source_lines(instructions: Iterable[Instruction]) -> set[str]:
    """Return the project's source lines of instructions, and of the calls they were inlined at."""
    places = {place for instruction in instructions for place in instruction.places}
    # nvdisasm names a wrong file now and then, which may be shorter.
    return {_source(path)[line - 1] for path, line in places if line <= len(_source(path))}


def measure_cuda(architecture: str) -> Compiled:
    """Compile all kernels and return them with the costs of their hot loops."""
    functions = read_kernels(architecture)
    found: dict[str, Measured] = {}
    for name, function in functions.items():
        for outermost in function.loops():
            for loop in outermost.with_nested():
                hot = _measure_loop(architecture, name, function, loop)
                if hot and (hot.name not in found or found[hot.name].elements < hot.elements):
                    found[hot.name] = hot
    titles = dict.fromkeys(hot.title for hot in HOT_LOOPS)
    names = [f"{title} {dtype}" for title in titles for dtype in (*SIZES, "f32>bf16")]
    if missing := {hot.title for hot in HOT_LOOPS} - {name.rpartition(" ")[0] for name in found}:
        raise RuntimeError(f"no loop for {sorted(missing)}: no line has the text of HOT_LOOPS")
    kernels = {name: function.kernel for name, function in functions.items()}
    return Compiled.of(kernels, [found[name] for name in names if name in found])


def _measure_loop(
    architecture: str, kernel: str, function: Function, loop: Loop
) -> Measured | None:
    for hot in HOT_LOOPS:
        if not kernel.startswith(hot.kernel):
            continue
        loads = _reading(function, loop.own_blocks, hot.reads)
        if not loads or any(_reading(function, n.blocks, hot.reads) for n in loop.nested):
            continue
        body = function.instructions(loop.blocks)
        lines = source_lines(body)
        if not any(hot.contains in line for line in lines):
            continue
        dtype = hot.dtype or _dtype(kernel, lines, max(map(width, loads)))
        size = SIZES[dtype.partition(">")[0]]
        moved = size + hot.beside
        elements = bits(loads) / 8 / (size + hot.reads_beside)
        if hot.leaves_out:
            body = [each for each in body if not _is_of(each, hot.leaves_out)]
        runs = [(body, 1.0)]
        return measure(
            f"{hot.title} {dtype}", architecture, function, runs, elements, moved, elements * moved
        )
    return None


def _reading(function: Function, blocks: set[int], text: str) -> list[Instruction]:
    """Return the loads from a source line that contains `text`."""
    return [
        instruction
        for instruction in function.instructions(blocks)
        if instruction.name in LOADS and any(text in line for line in source_lines([instruction]))
    ]


def _is_of(instruction: Instruction, text: str) -> bool:
    """Whether an instruction comes from a source line that contains `text`, or from its calls."""
    return any(text in line for line in source_lines([instruction]))


def _dtype(kernel: str, lines: set[str], widest: int) -> str:
    argument = kernel.partition("<")[2].rstrip("> ").partition(",")[0]
    if argument in ARGUMENT_DTYPES:
        return ARGUMENT_DTYPES[argument]
    for text, dtype in LINE_DTYPES.items():
        if any(text in line for line in lines):
            return dtype
    return WIDTH_DTYPES[widest]


if __name__ == "__main__":
    measure_cuda(sys.argv[1]).write(Path(sys.argv[2]))
