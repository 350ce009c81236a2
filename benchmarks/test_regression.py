"""The regression set: `pytest benchmarks/test_regression.py --benchmark-autosave`, and then with
`--benchmark-compare` after a change. On a GPU it times with the device synchronised.
"""

from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import nn

from benchmarks import models, profile
from benchmarks.batches import make_batches
from benchmarks.networks import NETWORKS
from benchmarks.steps import STEPS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

CASES = [
    ("threshold", "65536", "float32"),
    ("threshold", "2359296", "float32"),
    ("threshold", "2359296", "bfloat16"),
    ("threshold", "resnet50", "float32"),
    ("mask", "2359296", "float32"),
    ("mask", "2359296", "bfloat16"),
    ("step", "2359296", "float32"),
    ("step", "resnet50", "float32"),
]


@pytest.mark.parametrize(("step", "name", "dtype"), CASES)
def test_speed(benchmark, step: str, name: str, dtype: str) -> None:
    batch = make_batches(name, getattr(torch, dtype), DEVICE, sparsity=0.9)[0]
    run = STEPS[step].providers["ours"](batch)

    def synchronised() -> object:
        answer = run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return answer

    assert STEPS[step].check(batch, benchmark(synchronised)) is None


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("resnet50", 25_502_912),
        ("mobilenet-v1", 4_209_088),
        ("bert-base", 85_524_480),
        ("gpt2", 123_532_032),
        ("llama-7b", 6_607_077_376),
        ("llama-7b-block", 202_375_168),
    ],
)
def test_layer_list_has_all_weights_of_the_network(name: str, total: int) -> None:
    assert sum(prod(shape) for shape, _ in NETWORKS[name]()) == total


@pytest.mark.parametrize("dtype", profile.DTYPES.values())
def test_everything_that_is_profiled_runs(dtype: torch.dtype) -> None:
    names = []
    for operation in profile.operations(32, dtype, DEVICE):
        assert operation.run() is not None
        assert operation.bytes >= 8 * profile.COLUMNS * dtype.itemsize
        names.append(operation.name)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("make", "name"), [(models.resnet50, "resnet50"), (models.gpt2, "gpt2")])
def test_trained_network_has_the_weights_of_its_list(make: Callable, name: str) -> None:
    with torch.device("meta"):
        model = make()
    layers = (layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    assert sorted(layer.weight.numel() for layer in layers) == sorted(
        prod(shape) for shape, _ in NETWORKS[name]()
    )
