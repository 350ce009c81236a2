"""The GPU tests' own logic is right: their bodies run on a fake device, where there is no GPU."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

# Of a test that runs on the CPU too, the first, the middle and the last set of parameters.
SETS = 3
FEWEST = 400
MEANINGLESS = {
    "NCCL moves memory of GPUs": 34,
    "sparse tensor cores multiply": 3,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, they run on it")
def test_bodies_run_on_a_fake_device():
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "instruments.fake_cuda", "-q"]
    command += ["--parameter-sets", str(SETS), "-rs", "-p", "no:cacheprovider", "tests"]
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
    assert skipped == MEANINGLESS
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= FEWEST
