"""A regression set: `pytest benchmarks/test_regression.py --benchmark-autosave`.

Run it with `--benchmark-compare` after a change. On a GPU each call waits for the device.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.batches import make_batch
from benchmarks.masks import DTYPES
from benchmarks.steps import STEPS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

CASES = [
    ("threshold", "65536", "float32"),
    ("threshold", "2359296", "float32"),
    ("threshold", "2359296", "bfloat16"),
    ("threshold", "resnet50", "float32"),
    ("mask", "2359296", "float32"),
    ("mask", "2359296", "bfloat16"),
    ("mask", "2359296", "float32/bfloat16"),
    ("step", "2359296", "float32"),
    ("step", "resnet50", "float32"),
]


@pytest.mark.parametrize(("step", "name", "dtype"), CASES)
def test_speed(benchmark: BenchmarkFixture, step: str, name: str, dtype: str) -> None:
    weight, w_hat = DTYPES[dtype]
    batch = make_batch(name, weight, 0.9, torch.Generator(DEVICE).manual_seed(0))
    batch = batch.masked_by("relative", w_hat)
    run = STEPS[step].providers["ours"](batch)

    def synchronised() -> object:
        answer = run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return answer

    assert STEPS[step].check(batch, benchmark(synchronised)) is None
