"""The GPU run of the studies calls grids that exist, with runs of the right number."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from studies import grid
from tests.support import TIMEOUT

ROOT = Path(__file__).parents[2]

RECORDS_CALLS = """#!/bin/sh
if [ "$2" = studies.grid ]; then
  shift 2
  echo "$@" >>"$CALLS"
  echo "0 s: 0 of 1 runs, 0 waiting"
fi
"""


@pytest.fixture
def call(tmp_path):
    """Return the command lines of the grids that gpu.sh calls, and the folder of its results."""
    python = tmp_path / "python"
    python.write_text(RECORDS_CALLS)
    python.chmod(0o755)

    def call(*parts, **environment):
        out, calls = tmp_path / "out", tmp_path / "calls"
        environment |= {"PYTHON": str(python), "CALLS": str(calls), "OUT": str(out), "DATA": "DIR"}
        done = subprocess.run(
            [ROOT / "studies" / "gpu.sh", *parts],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [line.split() for line in calls.read_text().splitlines()], out

    return call


def jobs_of(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grid", *words])
    arguments = grid.parse_arguments()
    return arguments, grid.make_jobs(arguments)


def test_grids_have_runs_of_the_right_number(call, monkeypatch):
    monkeypatch.setattr(grid.torch.cuda, "get_device_name", lambda device: "GPU")
    counts = []
    calls, _ = call(DEADLINE="240")
    for words in calls:
        arguments, jobs = jobs_of(words, monkeypatch)
        assert arguments.device == "cuda"
        assert 200 < arguments.time_limit < 230
        # A setting that its study lacks would match nothing.
        assert {job.setting.name for job in jobs} == set(arguments.settings)
        counts.append((arguments.study, arguments.network, len(jobs), jobs[0].epochs))
    assert counts == [
        ("methods", "resnet20", 2 * (1 + 5 * 2), 15),
        ("nm", "resnet20", 3 * 3 * 2, 15),
        ("channels", "resnet20", 3 * 3, 15),
        ("finetune", "gpt-small", 2 * (1 + 3 * 2), 2),
        ("methods", "gpt-small", 2 * (1 + 3 * 2), 3),
    ]


def test_variables_change_the_trainings_of_resnet20(call, monkeypatch):
    calls, out = call("methods", "nm", EPOCHS="3", SEEDS="1", WORKERS="4")
    for words in calls:
        arguments, _ = jobs_of(words, monkeypatch)
        assert (arguments.epochs, arguments.seeds, arguments.workers) == (3, 1, 4)
    assert len(calls) == 2
    assert [line.partition(",")[0] for line in (out / "summary.csv").open()] == [
        "part",
        "methods",
        "nm",
    ]
