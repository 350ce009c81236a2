"""No two accesses of the CUDA kernels race, and the checker that says so sees every mutation."""

import platform
import sys

import pytest

from instruments.build import CXX
from instruments.races import MUTATIONS, build_checker, check

pytestmark = pytest.mark.skipif(
    CXX is None or sys.platform != "linux" or platform.machine() != "x86_64",
    reason="needs g++ and ThreadSanitizer's fibers on x86-64 Linux",
)


@pytest.mark.parametrize("seed", [1, 2])
def test_no_kernel_has_a_race_or_a_wrong_answer(seed):
    report = check(build_checker(), seed=seed)
    assert not report.races
    assert not report.wrong


@pytest.mark.parametrize(
    "number", range(1, 1 + len(MUTATIONS)), ids=lambda n: MUTATIONS[n - 1].name
)
def test_mutation_is_reported(number):
    report = check(build_checker(mutated=True), MUTATIONS[number - 1].workload, mutation=number)
    assert report.races


def test_mutated_source_with_no_mutation_has_no_race():
    assert not check(build_checker(mutated=True), "thresholds-float32").races
