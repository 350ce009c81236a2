"""`python -m pdp_kernels.info`, the report for bug reports."""

import os
import subprocess
import sys

import pdp_kernels
from pdp_kernels import info


def run(**environment):
    return subprocess.run(
        [sys.executable, "-m", "pdp_kernels.info"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_the_report_states_versions_backends_and_variables():
    result = run(PDP_COMMIT="a test's", SECRET_TOKEN="not to be shown")
    assert result.returncode == 0, result.stderr
    assert f"  version: {pdp_kernels.__version__}" in result.stdout
    assert "  backends: {'reference': True" in result.stdout
    assert "  PDP_COMMIT: a test's" in result.stdout
    assert "SECRET_TOKEN" not in result.stdout
    assert "error:" not in result.stdout


def test_a_torch_that_does_not_load_hides_nothing_else(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise OSError('libcudart.so.13: no such file')")
    result = run(PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "  error: OSError: libcudart.so.13: no such file" in result.stdout
    assert f"  version: {pdp_kernels.__version__}" in result.stdout
    assert "environment:" in result.stdout


def test_a_part_that_fails_states_its_error(monkeypatch):
    def fail():
        yield "driver", "580"
        raise RuntimeError("no device")

    monkeypatch.setattr(info, "_gpus", fail)
    lines = info.report().splitlines()
    start = lines.index("GPUs:")
    assert lines[start + 1 : start + 3] == ["  driver: 580", "  error: RuntimeError: no device"]
    assert lines[start + 3] == "environment:"
