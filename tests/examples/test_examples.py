"""Every example runs, and prints the result that it promises."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import TIMEOUT

EXAMPLES = Path(__file__).parents[2] / "examples"

CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the result on a CPU")


@pytest.fixture
def run_example(capsys):
    """A function that runs an example in this process and returns what it prints."""

    def run(name):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def accuracies(output):
    return [float(number) for number in re.findall(r"accuracy ([\d.]+)%", output)]


def test_every_example_is_short_and_tested():
    tests = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in tests
        assert 25 <= len(path.read_text().splitlines()) <= 60


def test_mask_by_hand_ends_with_exactly_90_percent_zeros(run_example):
    output = run_example("mask_by_hand.py")
    assert "90.0% zeros" in output
    assert min(accuracies(output)) > 95


def test_prune_a_model_reports_and_reaches_90_percent(run_example):
    output = run_example("prune_a_model.py")
    assert re.search(r"^total +73,728 of 81,920 ", output, re.MULTILINE)
    assert "90.0% zeros" in output
    assert min(accuracies(output)) > 95


@CPU
def test_sparse_tensor_cores_says_on_a_cpu_what_is_missing(run_example):
    output = run_example("sparse_tensor_cores.py")
    assert "0.weight: dense, device cpu has no sparse tensor cores" in output
    assert "2.weight: dense" in output
    assert min(accuracies(output)) > 95


def test_remove_channels_halves_the_hidden_layer(run_example):
    output = run_example("remove_channels.py")
    assert "pruned: 19,210 parameters" in output
    assert f"smaller: {64 * 128 + 128 + 128 * 10 + 10:,} parameters" in output
    assert min(accuracies(output)) > 95


def test_with_accelerate_prunes_and_goes_on_from_its_folder(run_example, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setattr(sys, "argv", ["with_accelerate.py", str(tmp_path / "state")])
    first, resumed = (run_example("with_accelerate.py") for _ in range(2))
    assert "90.0% zeros" in first and resumed == first
    assert min(accuracies(first)) > 95


def test_several_devices_prunes_the_global_weights_and_exits_cleanly():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", EXAMPLES / "several_devices.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"^total +33,178 of 36,864 .* 90\.0011%", result.stdout, re.MULTILINE)
