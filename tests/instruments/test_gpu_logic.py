"""The bodies of the GPU tests run on a fake device, so that their own mistakes show."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

# By the number of parameter sets of each test that runs on the CPU too (first; first, middle and
# last): how many tests must pass at least, and how many mean nothing on a fake device.
EXPECTED = {
    1: (
        250,
        {
            "NCCL moves memory of GPUs": 28,
            "an operator is one launch": 3,
            "sparse tensor cores multiply": 1,
            "two compilers: within budget, not equal": 1,
        },
    ),
    3: (
        400,
        {
            "NCCL moves memory of GPUs": 49,
            "an operator is one launch": 3,
            "sparse tensor cores multiply": 3,
            "two compilers: within budget, not equal": 3,
        },
    ),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, they run on it")
@pytest.mark.parametrize("sets", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_bodies_run_on_a_fake_device(sets):
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "instruments.fake_cuda", "-q"]
    command += ["--parameter-sets", str(sets), "-rs", "-p", "no:cacheprovider"]
    command += ["tests", "--ignore", "tests/stacks"]  # libraries that the fake would confuse
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    skipped = Counter()
    for count, reason in re.findall(r"^SKIPPED \[(\d+)\] \S+: (.*)$", result.stdout, re.MULTILINE):
        skipped[reason] += int(count)
    fewest, meaningless = EXPECTED[sets]
    assert skipped == meaningless
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= fewest
