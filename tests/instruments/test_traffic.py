"""The CUDA operators move no more bytes of device memory than they did, counted on a CPU."""

import pytest
import torch

from instruments.build import CXX
from instruments.host_build import CountingBuild
from instruments.traffic import DTYPES, INPUTS, MULTIPROCESSORS, measure

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")

# By input and dtype, for each operator: bytes a weight, and launches, neither of which may rise.
MOST = {
    ("1e6", "float32"): {
        "thresholds": (8.8, 4),
        "hard_mask": (13.9, 6),
        "digit_counts": (4.1, 2),
        "power_sums": (4.05, 3),
        "soft_mask_list": (8, 1),
        "soft_mask_list_backward": (12, 1),
    },
    ("1e6", "bfloat16"): {
        "thresholds": (2.15, 4),
        "hard_mask": (5.45, 6),
        "digit_counts": (2.05, 2),
        "power_sums": (2.05, 3),
        "soft_mask_list": (4, 1),
        "soft_mask_list_backward": (6, 1),
    },
    ("2^22", "float32"): {
        "thresholds": (4.32, 6),
        "hard_mask": (9.4, 8),
        "digit_counts": (4.1, 2),
        "power_sums": (4.05, 3),
        "soft_mask_list": (8, 1),
        "soft_mask_list_backward": (12, 1),
    },
    ("resnet50", "float32"): {
        "thresholds": (4.33, 6),
        "digit_counts": (4.15, 2),
        "power_sums": (4.1, 3),
        "soft_mask_list": (8, 1),
        "soft_mask_list_backward": (12, 1),
    },
    ("resnet50", "bfloat16"): {
        "thresholds": (2.1, 4),
        "digit_counts": (2.1, 2),
        "power_sums": (2.1, 3),
        "soft_mask_list": (4, 1),
        "soft_mask_list_backward": (6, 1),
    },
    ("300 x 50,000", "float32"): {
        "thresholds": (5.02, 6),
        "digit_counts": (4.7, 2),
        "power_sums": (4.2, 3),
        "soft_mask_list": (8, 1),
        "soft_mask_list_backward": (12, 1),
    },
    ("300 x 50,000", "bfloat16"): {
        "thresholds": (2.2, 4),
        "digit_counts": (2.4, 2),
        "power_sums": (2.2, 3),
        "soft_mask_list": (4, 1),
        "soft_mask_list_backward": (6, 1),
    },
}
# With half of the weights pruned, most keys lie inside the bracket of a sample.
MOST_AT_HALF = 4.4


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


@pytest.mark.slow
def test_thresholds_read_float32_weights_once_at_any_sparsity():
    build = CountingBuild()
    build.device(multiprocessors=MULTIPROCESSORS)
    weight = torch.randn(1 << 22)
    for sparsity in (0.01, 0.5, 0.99):
        prune_counts = [round(sparsity * weight.numel())]
        counts = build.count(lambda: build.thresholds([weight], prune_counts))  # noqa: B023
        assert counts.moved() / weight.numel() <= MOST_AT_HALF
        assert counts.stale_loads == 0
