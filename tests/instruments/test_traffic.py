"""The CUDA operators move no more bytes of device memory than they did, counted on a CPU."""

import pytest

from instruments.build import CXX
from instruments.host_build import CountingBuild
from instruments.traffic import DTYPES, INPUTS, MULTIPROCESSORS, measure

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")

# By input and dtype, for each operator: bytes a weight, and launches, neither of which may rise.
MOST = {
    ("1e6", "float32"): {
        "thresholds": (9.1, 4),
        "hard_mask": (14.4, 6),
        "digit_counts": (4.1, 2),
        "power_sums": (4.05, 3),
    },
    ("1e6", "bfloat16"): {
        "thresholds": (2.95, 2),
        "hard_mask": (8.15, 4),
        "digit_counts": (2.05, 2),
        "power_sums": (2.05, 3),
    },
    ("resnet50", "float32"): {
        "thresholds": (8.95, 4),
        "digit_counts": (4.2, 2),
        "power_sums": (4.1, 3),
    },
    ("resnet50", "bfloat16"): {
        "thresholds": (3.2, 2),
        "digit_counts": (2.15, 2),
        "power_sums": (2.1, 3),
    },
    ("300 x 50,000", "float32"): {
        "thresholds": (12.9, 4),
        "digit_counts": (5.15, 2),
        "power_sums": (4.2, 3),
    },
    ("300 x 50,000", "bfloat16"): {
        "thresholds": (8.2, 2),
        "digit_counts": (2.85, 2),
        "power_sums": (2.2, 3),
    },
}


@pytest.mark.parametrize(
    ("input_name", "dtype"),
    [
        pytest.param(*case, marks=[] if case[0] == "1e6" else pytest.mark.slow, id=", ".join(case))
        for case in MOST
    ],
)
def test_no_operator_moves_more_than_it_did(input_name, dtype):
    build = CountingBuild()
    build.device(multiprocessors=MULTIPROCESSORS)
    most = MOST[input_name, dtype]
    met = set()
    for row in measure(build, input_name, INPUTS[input_name](), dtype):
        operator = row.operator.split(",")[0]
        met.add(operator)
        bytes_per_weight, launches = most[operator]
        assert row.total <= bytes_per_weight, row.operator
        assert row.launches <= launches, row.operator
        assert row.by_buffer["weights"] >= DTYPES[dtype].itemsize, "not all weights are counted"
        assert row.stale_loads == 0, row.operator
    assert met == set(most)
