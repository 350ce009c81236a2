"""Find races in the CUDA kernels, on a CPU: `python -m instruments.races`.

The sources of the kernels are compiled for the CUDA model of instruments/host_cuda, where every
CUDA thread is a fiber of ThreadSanitizer. ThreadSanitizer reports two accesses of one place, at
least one of them a plain write, that no barrier, no fence with an atomic and no end of a kernel
orders, even if the result was right. Each workload of host_cuda/workloads.cu also checks its
results.

Mutations are deliberate mistakes, such as a missing barrier. The checker must report each of them,
which shows that it can. One build of a changed copy of the sources has all mutations, and each run
switches one of them on.

Not modelled: a read through `__ldg` that finds a stale line in the cache (host_cuda/counters.cpp
detects those), and orders that the scheduler of fibers did not draw. Needs g++ on x86-64 Linux.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from instruments.build import CXX, HOST_CUDA, KEPT, ROOT, build, content_digest, cuda_sources

# -O1: at -O2 the compilation takes longer than the run. The pragmas that unroll loops are for nvcc.
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]

# Only one line of each report is used, so ThreadSanitizer needs no long history of accesses.
TSAN_OPTIONS = "halt_on_error=0 history_size=0 print_suppressions=0"


class Mutation(NamedTuple):
    """A deliberate mistake: `instead` replaces `statement` in `context`.

    context: text that occurs once in the file of csrc/cuda.
    workload: one that executes the statement.
    """

    name: str
    file: str
    context: str
    statement: str
    instead: str = ""
    workload: str = "thresholds-float32"


BARRIER, FENCE = "__syncthreads();", "__threadfence();"

MUTATIONS = [
    Mutation(
        "last_to_arrive: no barrier before the fence",
        "block.cuh",
        "  __syncthreads();\n  if (threadIdx.x == 0) {\n    scratch = arrive",
        BARRIER,
    ),
    Mutation(
        "last_to_arrive: no barrier after the answer",
        "block.cuh",
        "== total;\n  }\n  __syncthreads();\n  return scratch;",
        BARRIER,
    ),
    Mutation(
        "last_to_arrive: no fence before the atomic",
        "block.cuh",
        "  __threadfence();\n  const Count before = atomicAdd",
        FENCE,
    ),
    Mutation(
        "last_to_arrive: no fence after the atomic",
        "block.cuh",
        "= atomicAdd(done, mine);\n  __threadfence();",
        FENCE,
    ),
    Mutation(
        "find_rank: no barrier before the sums of warps are read",
        "block.cuh",
        "= lower + mine;\n  __syncthreads();",
        BARRIER,
    ),
    Mutation(
        "find_rank: no barrier at the end",
        "block.cuh",
        "    scratch.count = here;\n  }\n  __syncthreads();",
        BARRIER,
    ),
    Mutation(
        "find_next_bin: no barrier at the end",
        "block.cuh",
        "static_cast<uint32_t>(bin));\n  __syncthreads();",
        BARRIER,
        workload="digits-neighbours",
    ),
    Mutation(
        "for_each_slice: no barrier before the next slice",
        "weight_table.cuh",
        "    if (!slice.more) return;\n    __syncthreads();",
        BARRIER,
    ),
    Mutation(
        "select_in_block: no barrier before the keys are counted",
        "block_select.cuh",
        "    scratch.counters.clear(bins);\n    __syncthreads();",
        BARRIER,
    ),
    Mutation(
        "select_in_block: no barrier before the counters are read",
        "block_select.cuh",
        "      }\n    }\n    __syncthreads();\n    const auto count",
        BARRIER,
    ),
    Mutation(
        "least_above: no barrier before the minimum of warps",
        "block_select.cuh",
        "scratch.least = otherwise;\n  __syncthreads();",
        BARRIER,
        workload="thresholds-small",
    ),
    Mutation(
        "least_above: no barrier before the minimum is read",
        "block_select.cuh",
        "least);\n  __syncthreads();\n  return static_cast<Key>(scratch.least);",
        BARRIER,
        workload="thresholds-small",
    ),
    Mutation(
        "select_two_in_block: no barrier before the keys are counted",
        "block_select.cuh",
        "scratch.counts[i] = 0;\n    __syncthreads();",
        BARRIER,
    ),
    Mutation(
        "select_two_in_block: no barrier before the counts are summed",
        "block_select.cuh",
        "    });\n    __syncthreads();\n\n    // Both histograms",
        BARRIER,
    ),
    Mutation(
        "select_two_in_block: no barrier before the ends are read",
        "block_select.cuh",
        "static_cast<Key>(bin);\n    }\n    __syncthreads();\n  };",
        BARRIER,
    ),
    Mutation(
        "bracket: no barrier after the counters are cleared",
        "bracket.cuh",
        "    if (threadIdx.x == 0) shared.sums = {};\n    __syncthreads();",
        BARRIER,
    ),
    Mutation(
        "bracket: no barrier before the sums are read",
        "bracket.cuh",
        "    add(at_high_, sums.at_high);\n    __syncthreads();",
        BARRIER,
    ),
    Mutation(
        "bracket: no barrier before the place is read",
        "bracket.cuh",
        "return;\n    __syncthreads();\n    append(",
        BARRIER,
    ),
    Mutation(
        "bracket: no barrier before the merged counts are read",
        "bracket.cuh",
        "shared.merged);\n    }\n    __syncthreads();",
        BARRIER,
    ),
    Mutation(
        "finish_slice: no barrier before the merged counts are read",
        "radix_select.cuh",
        "shared.merged);\n  __syncthreads();",
        BARRIER,
        workload="digits-float32",
    ),
    Mutation(
        "first_digit: no barrier after the counters are cleared",
        "radix_select.cuh",
        "    shared.counters.clear();\n    __syncthreads();\n    for_each_weight_key",
        BARRIER,
        workload="digits-float32",
    ),
    Mutation(
        "finish_slice: no barrier before the counters are read",
        "radix_select.cuh",
        "Shared& shared) {\n  __syncthreads();",
        BARRIER,
        workload="digits-float32",
    ),
    Mutation(
        "finish_slice: tiles_done reset by a plain store",
        "radix_select.cuh",
        "atomicExch(tiles_done, Count{0});",
        "atomicExch(tiles_done, Count{0});",
        "*tiles_done = 0;",
        workload="digits-float32",
    ),
    Mutation(
        "merge_counters: a plain addition",
        "histogram.cuh",
        "atomicAdd(&histogram[bin], count);",
        "atomicAdd(&histogram[bin], count);",
        "histogram[bin] += count;",
    ),
    Mutation(
        "CandidateStage::flush: no barrier before the stage is empty",
        "radix_select.cuh",
        "= keys[i];\n    __syncthreads();",
        BARRIER,
        workload="digits-float32",
    ),
    Mutation(
        "later_digit: no barrier before the smallest key is read",
        "radix_select.cuh",
        "atomic_min(&shared.next, next);\n    __syncthreads();",
        BARRIER,
        workload="digits-float32",
    ),
    Mutation(
        "Histogram: a plain addition",
        "histogram.cuh",
        "{ atomicAdd(&words[bin], 1u); }",
        "atomicAdd(&words[bin], 1u);",
        "++words[bin];",
    ),
    Mutation(
        "count_digit: no barrier after the counters are cleared",
        "digit_counts.cuh",
        "shared.above = kNoKey;\n    __syncthreads();",
        BARRIER,
        workload="digit-counts-float32",
    ),
    Mutation(
        "count_digit: a plain addition to a block's counter",
        "digit_counts.cuh",
        "atomicAdd(&counters[min(place, size) >> shift], 1u);",
        "atomicAdd(&counters[min(place, size) >> shift], 1u);",
        "++counters[min(place, size) >> shift];",
        workload="digit-counts-bfloat16",
    ),
    Mutation(
        "count_digit: a plain addition to a tensor's count",
        "digit_counts.cuh",
        "atomicAdd(&row[bin], count);",
        "atomicAdd(&row[bin], count);",
        "row[bin] += count;",
        workload="digit-counts-float32",
    ),
    Mutation(
        "count_digit: no barrier before the counters are merged",
        "digit_counts.cuh",
        "    __syncthreads();\n    Count* row",
        BARRIER,
        workload="digit-counts-float32",
    ),
    Mutation(
        "write_mask: no barrier before the ties of a block are written",
        "hard_mask.cuh",
        "  __syncthreads();\n  if (threadIdx.x == 0) ties_of_block",
        BARRIER,
        workload="hard-mask-ties",
    ),
    Mutation(
        "add_tiles: no barrier before the sums of threads are added",
        "power_sums.cuh",
        "  __syncthreads();\n  const int value",
        BARRIER,
        workload="power-sums",
    ),
    Mutation(
        "soft_mask_list: no barrier before the tensor of a tile is read",
        "soft_mask_list.cuh",
        "  __syncthreads();\n  const int32_t tensor = shared.tensor;",
        BARRIER,
        "shared.tensor = table.find(block);",  # noise would be no place of the table
        workload="soft-masks",
    ),
]


class Report(NamedTuple):
    """races: the place of each, as `file:line function`. wrong: lines about wrong results."""

    races: list[str]
    wrong: list[str]


def mutated_sources() -> Path:
    """Return a copy of csrc and instruments/host_cuda in which each mutation can be switched on."""
    texts = {path: path.read_text() for path in cuda_sources()}
    edits: dict[Path, list[tuple[int, int, str]]] = {}
    for number, mutation in enumerate(MUTATIONS, start=1):
        path = ROOT / "csrc" / "cuda" / mutation.file
        text, context, statement = texts[path], mutation.context, mutation.statement
        if text.count(context) != 1 or context.count(statement) != 1:
            raise ValueError(f"{mutation.name}: its context must occur once in {mutation.file}")
        begin = text.index(context) + context.index(statement)
        choice = f"if (host_cuda::device.mutation == {number}) {{ {mutation.instead} }} else "
        edit = (begin, begin + len(statement), f"{choice}{{ {statement} }}")
        edits.setdefault(path, []).append(edit)
    for path, changes in edits.items():
        for begin, end, text in sorted(changes, reverse=True):
            texts[path] = texts[path][:begin] + text + texts[path][end:]
    folder = KEPT / f"mutated-{content_digest(texts.values())}"
    for path, text in texts.items():
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
    return folder


def build_checker(mutated: bool = False) -> Path:
    """Build host_cuda/workloads.cu with ThreadSanitizer and return the program."""
    folder = (mutated_sources() if mutated else ROOT) / "instruments" / "host_cuda"
    workloads, engine = folder / "workloads.cu", HOST_CUDA / "engine.cpp"
    compiled = [CXX, *FLAGS, "-fsanitize=thread", "-I", folder, "-x", "c++", "-c", workloads]
    return build(
        "races",
        cuda_sources(),
        [*compiled, "-o", "workloads.o"],
        [CXX, *FLAGS, "-c", engine, "-o", "engine.o"],
        [CXX, "-fsanitize=thread", "workloads.o", "engine.o", "-o", "races"],
    )


def check(program: Path, *workloads: str, seed: int = 1, mutation: int = 0) -> Report:
    """Run workloads (all by default) in the order of threads that `seed` determines.

    Raises:
        RuntimeError: the program crashed.
    """
    command = [str(program), "--seed", str(seed), "--mutation", str(mutation), *workloads]
    environment = os.environ | {"TSAN_OPTIONS": TSAN_OPTIONS}
    run = {"env": environment, "capture_output": True, "text": True}
    result = subprocess.run(command, **run)
    if "unexpected memory mapping" in result.stderr and shutil.which("setarch"):
        # The addresses have more random bits than ThreadSanitizer supports.
        result = subprocess.run(["setarch", "-R", *command], **run)
    if not re.search(r"^\d+ wrong$", result.stdout, re.MULTILINE):
        raise RuntimeError(f"{' '.join(command)}: {result.stdout[-2000:]}{result.stderr[-2000:]}")
    found = re.findall(r"^SUMMARY: ThreadSanitizer: data race (.*)$", result.stderr, re.MULTILINE)
    races = sorted({_short(line) for line in found})
    return Report(races, [line for line in result.stdout.splitlines() if ": " in line])


def _short(summary: str) -> str:
    """Return `file:line function`, without folders, template arguments and parameters."""
    place, _, function = summary.partition(" in ")
    function = re.sub(r"<.*|\(.*", "", function.removeprefix("void "))
    return f"{Path(place).name} {function}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m instruments.races", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "workloads", nargs="*", help="names of host_cuda/workloads.cu (default: all)"
    )
    parser.add_argument("--seeds", type=int, default=2, help="orders of threads (default: 2)")
    parser.add_argument("--mutations", action="store_true", help="run each mutation, too")
    chosen = parser.parse_args(arguments)
    program = build_checker()
    faults = 0
    for seed in range(1, chosen.seeds + 1):
        report = check(program, *chosen.workloads, seed=seed)
        print(f"seed {seed}: {len(report.races)} races, {len(report.wrong)} wrong results")
        for line in report.races + report.wrong:
            print(f"  {line}")
        faults += len(report.races) + len(report.wrong)
    if chosen.mutations:
        program = build_checker(mutated=True)
        for number, mutation in enumerate(MUTATIONS, start=1):
            report = check(program, mutation.workload, mutation=number)
            found = report.races + report.wrong
            print(f"{mutation.name}: {', '.join(found) or 'NOT REPORTED'}", flush=True)
            faults += not found
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
