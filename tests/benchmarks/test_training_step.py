"""Whole training steps: right gradients are timed, wrong ones are not."""

import json
import sys
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import eager, timing, training_step

MLP = "MLP 784-300-100-10, batch 128"


def run_training(monkeypatch, tmp_path, *tasks):
    result = tmp_path / "training.json"
    words = ["--device", "cpu", "--budget", "0.01", "--out", str(result), "--tasks", *tasks]
    monkeypatch.setattr(sys, "argv", ["training_step", *words])
    return training_step.main(), json.loads(result.read_text())["rows"]


def test_a_training_step_is_checked_and_timed_and_one_that_fails_is_noted(monkeypatch, tmp_path):
    def fail(device, budget):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(training_step.MEASUREMENTS, "too large", fail)
    with torch.compiler.set_stance("force_eager"):
        status, rows = run_training(monkeypatch, tmp_path, "too large", MLP)
    assert status == 1
    assert rows[0] == {"task": "too large", "note": "skipped: out of memory"}
    assert rows[1]["difference"] < training_step.TOLERANCE
    assert set(rows[1]["ratios"]) == {"dense", "pdp", "eager", "compiled", "pdp's step"}
    assert rows[1]["goal"] == 1.15


@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_wrong_gradients_of_a_training_are_reported(monkeypatch, tmp_path, name):
    def wrong(weight, threshold, mask):
        return 1.01 * eager.soft_mask(weight, threshold, mask)

    pruner = partial(training_step.EagerPruner, soft_mask=wrong)
    monkeypatch.setitem(training_step.PRUNERS, name, pruner)
    with torch.compiler.set_stance("force_eager"):
        status, (row,) = run_training(monkeypatch, tmp_path, MLP)
    assert status == 1 and row["note"].startswith("wrong: gradients differ by ")


def test_a_training_step_is_described_with_its_goal():
    result = {"seconds": {"dense": 1e-3, "pdp": 1.2e-3}, "ratios": {"dense": 1, "pdp": 1.2}}
    line = "dense 1 ms (1x), pdp 1.2 ms (1.2x)"
    assert training_step.describe(result) == line
    assert training_step.describe(result | {"goal": 1.15}) == f"{line}, goal 1.15x missed"
    assert training_step.describe(result | {"goal": 1.25}) == f"{line}, goal 1.25x met"
    device = {"device_ratios": {"pdp": 1.012}}
    assert training_step.describe(result | device) == f"{line}, pdp on the device alone 1.01x"


def test_on_a_gpu_steps_are_timed_with_and_without_the_host(monkeypatch):
    monkeypatch.setattr(training_step, "clock_for", lambda device: timing.cpu_clock)
    monkeypatch.setattr(training_step, "DeviceClock", lambda longest: lambda run: (2e-3, run()))
    runs = {"dense": lambda: None, "pdp": lambda: None}
    result = training_step.ratios(runs, "dense", torch.device("cuda"), 0.01)
    assert result["device_seconds"] == {"dense": 2e-3, "pdp": 2e-3}
    assert result["device_ratios"] == {"dense": 1, "pdp": 1}
    assert result["seconds"]["pdp"] > 0
    on_cpu = training_step.ratios(runs, "dense", torch.device("cpu"), 0.01)
    assert set(on_cpu) == {"seconds", "quartiles", "ratios"}


def convolutions():
    convolutions = [nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 1)]
    for layer in convolutions:
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32, 8))


@pytest.mark.parametrize("name", ["eager", "compiled"])
@pytest.mark.parametrize("autocast", [False, True])
def test_pruners_in_pytorch_compute_what_ours_does(device, name, autocast):
    """In each dtype that is timed, and in the layout of the weight."""
    task = training_step.Task(convolutions, None, training_step.SGD, autocast)
    batch = torch.randn(3, 4, 2, 2).to(device), torch.randint(8, (3,)).to(device)
    model = convolutions().to(device)
    ours, other = (training_step.Training(model, task, batch, each) for each in ("pdp", name))
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(other.forward(), ours.forward())
        layer = other.model[0]
        w_hat = layer.soft_mask(layer.weight, layer.threshold, layer.mask)
    assert w_hat.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert w_hat.stride() == layer.weight.stride()
    assert layer.mask.tau == training_step.CONFIG.temperature_at((1.0, 0.02), 0.9)


@pytest.mark.parametrize("name", [name for name, t in training_step.TASKS.items() if t.on_gpu_only])
def test_batches_of_the_large_networks_fit_them(name):
    task = training_step.TASKS[name]
    with torch.device("meta"):
        model = task.network()
    inputs, targets = task.batch()
    with torch.no_grad():
        outputs = model(inputs[:1].to("meta"))
    assert outputs.flatten(0, -2).shape[0] == targets[:1].numel()
