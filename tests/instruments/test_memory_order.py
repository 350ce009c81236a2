"""How the compiled CUDA kernels order memory across blocks and launches.

A run on a CPU cannot show it: there, one kernel follows the other, and the instructions of
launch.cuh and block.cuh that order memory on a GPU are left out.
"""

import re

import pytest

from instruments import compiled
from instruments.build import ROOT
from instruments.cuda_loops import find_nvcc, read_kernels, source_lines
from instruments.measured import LOADS, STORES

ATOMICS = {"ATOM", "ATOMG", "RED", "REDG"}
WAIT, LET_THE_NEXT_BEGIN = "ACQBULK", "PREEXIT"  # griddepcontrol


@pytest.fixture(
    scope="module",
    params=[compiled.FIGURES_ARCHITECTURES[0]]
    + [pytest.param(each, marks=pytest.mark.slow) for each in compiled.FIGURES_ARCHITECTURES[1:]],
)
def kernels(request):
    """The compiled kernels, by name."""
    try:
        find_nvcc()
    except RuntimeError as error:
        pytest.skip(str(error))
    return read_kernels(request.param)


def template_of(name):
    return name.partition("<")[0]


def test_a_kernel_that_may_begin_early_waits_before_it_touches_memory(kernels):
    text = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh")))
    early = set(re.findall(r"launch_overlapped\((\w+)<", text))
    assert early
    assert early <= set(map(template_of, kernels))
    for name, function in kernels.items():
        if template_of(name) not in early:
            continue
        names = [each.name for each in function.blocks[0]]  # all threads run the first block
        assert WAIT in names, name
        before = names[: names.index(WAIT)]
        assert not {*before} & {*LOADS, *STORES, *ATOMICS, LET_THE_NEXT_BEGIN}, name


def test_the_last_block_to_arrive_sees_what_the_others_wrote(kernels):
    orders = {}
    for name, function in kernels.items():
        order = [
            each.opcode
            for each in function.instructions()
            if each.name in ("MEMBAR", "CCTL", *ATOMICS)
            and any("scratch = arrive(" in line for line in source_lines([each]))
        ]
        if order:
            orders[name] = order
    searching = ("bracket", "survivors", "first_digit", "later_digit", "write_mask")
    assert {template_of(name) for name in orders} == {f"{each}_kernel" for each in searching}
    for name, order in orders.items():
        # A release, the counter, and an acquire, which invalidates the cache of the multiprocessor.
        assert len(order) == 3, (name, order)
        assert re.fullmatch(r"MEMBAR\.\w+\.GPU", order[0]), (name, order)
        assert re.fullmatch(r"ATOMG\.E\.ADD\.64\.STRONG\.GPU", order[1]), (name, order)
        assert order[2] == "CCTL.IVALL", (name, order)
