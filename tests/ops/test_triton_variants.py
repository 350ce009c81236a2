"""Triton compiles few variants of each kernel for a network.

The first step of a training waits for them, half a second or more each. Triton is asked by the
operators' own launchers on tensors without memory, and compiles nothing here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Prints, by network and pattern, how many variants of all kernels a training and an evaluation in
# float32 need. Convolutions are channels_last.
PROGRAM = """
import json
import torch
from pdp_kernels.triton_kernels import soft_mask, soft_mask_channel, soft_mask_nm
from triton import knobs
from triton.runtime import driver

from benchmarks import layer_shapes
from instruments.triton_launches import CompilingDriver

variants = set()

def note_and_skip(key, fn, **rest):
    variants.add((fn.name, key))
    return True

def unstructured(weight, t):
    soft_mask.soft_mask(weight, t, t, True, None, False)
    soft_mask.soft_mask_backward(weight, None, weight, t, t, True)

def groups_of_4(weight, t):
    if weight.shape[1] % 4 == 0:
        soft_mask_nm.soft_mask_nm(weight, t, 4, 2, 1, True, None, False)
        soft_mask_nm.soft_mask_nm_backward(weight, None, weight, t, 4, 2, 1, True)
        soft_mask_nm.hard_mask_nm(weight, 4, 2, 1)

def channels(dim):
    def step(weight, t):
        norms = soft_mask_channel.channel_norms(weight, dim, True)
        rest = (weight, norms, t, t, dim, True)
        soft_mask_channel.soft_mask_channel(*rest, None)
        soft_mask_channel.soft_mask_channel_backward(weight, None, *rest, True)
    return step

PATTERNS = {
    "unstructured": unstructured,
    "2:4": groups_of_4,
    "output channels": channels(0),
    "input channels": channels(1),
}

driver.set_active(CompilingDriver("sm_90"))
knobs.runtime.jit_cache_hook = note_and_skip
counts = {}
for network in (layer_shapes.resnet50, layer_shapes.gpt2):
    for pattern, step in PATTERNS.items():
        variants.clear()
        for shape, _ in network():
            weight = torch.empty(shape, device="meta")
            if len(shape) == 4:
                weight = weight.to(memory_format=torch.channels_last)
            step(weight, torch.empty((), device="meta"))
        counts[f"{network.__name__}, {pattern}"] = len(variants)
print(json.dumps(counts))
"""

MOST = {
    "resnet50, unstructured": 2,
    "resnet50, 2:4": 3,
    "resnet50, output channels": 27,
    "resnet50, input channels": 19,
    "gpt2, unstructured": 2,
    "gpt2, 2:4": 3,
    "gpt2, output channels": 8,
    "gpt2, input channels": 4,
}


@pytest.fixture(scope="module")
def counts():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", MOST)
def test_no_more_variants_than_committed(counts, name):
    assert 0 < counts[name] <= MOST[name]
