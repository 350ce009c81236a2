"""No two accesses of the CUDA kernels race, and the checker reports every deliberate mistake."""

import platform
import sys

import pytest

from instruments.build import CXX
from instruments.races import MUTATIONS, build_checker, check

pytestmark = pytest.mark.skipif(
    CXX is None or sys.platform != "linux" or platform.machine() != "x86_64",
    reason="needs g++ and ThreadSanitizer's fibers on x86-64 Linux",
)


# A barrier, a fence and an atomic: what `make test` has of the mutations.
REPRESENTATIVES = {
    "last_to_arrive: no fence before the atomic",
    "find_rank: no barrier at the end",
    "merge_counters: a plain addition",
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_no_kernel_has_a_race_or_a_wrong_answer(seed):
    report = check(build_checker(), seed=seed)
    assert not report.races
    assert not report.wrong


def test_sources_with_every_mutation_switched_off_have_no_race_and_no_wrong_answer():
    """The build of the mutations serves, so that `make test` compiles the sources once."""
    report = check(build_checker(mutated=True))
    assert not report.races
    assert not report.wrong


def test_representatives_are_mutations():
    assert {mutation.name for mutation in MUTATIONS} > REPRESENTATIVES


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(
            number,
            id=mutation.name,
            marks=[] if mutation.name in REPRESENTATIVES else pytest.mark.slow,
        )
        for number, mutation in enumerate(MUTATIONS, start=1)
    ],
)
def test_every_mutation_is_reported(number):
    report = check(build_checker(mutated=True), MUTATIONS[number - 1].workload, mutation=number)
    assert report.races or report.wrong
