"""The examples run, in a short form on data that needs no download."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_example(name, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "examples" / name, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sap_mnist(tmp_path):
    for package in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(package)
    output = run_example(
        "sap_mnist.py", "--rounds", 2, "--epochs", 1, "--seeds", 1, "--out", tmp_path
    )
    with open(tmp_path / "rounds.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3  # methods, rounds and the dense network
    remaining = {row["method"]: float(row["remaining"]) for row in rows if row["round"] == "2"}
    assert set(remaining) == {"SAP, neuron", "SAP, global", "one-shot", "lottery ticket"}
    assert remaining["lottery ticket"] == pytest.approx(0.64, abs=1e-3)
    assert all(0 < share < 0.9 for share in remaining.values())
    for picture in ("accuracy.png", "pq_index.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "accuracy at equal remaining weights" in output


def test_remove_dead_channels():
    for package in ("sklearn", "torch_pruning", "tqdm"):
        pytest.importorskip(package)
    output = run_example("remove_dead_channels.py", "--epochs", 1, "--sparsity", 0.5)
    masked, smaller, difference = output.strip().splitlines()[-3:]
    weights = [int(line.split()[1].replace(",", "")) for line in (masked, smaller)]
    # Half of the channels between two convolutions of 32 x 64 x 9 weights, in each of 3 blocks.
    assert weights[0] - weights[1] == 3 * (2 * 32 * 32 * 9 + 2 * 32)
    assert masked.split("accuracy")[1] == smaller.split("accuracy")[1]
    assert float(difference.split(":")[1]) < 1e-4
