"""The notebooks run from start to finish, and hold the outputs of such a run."""

import json
import runpy

import pytest

from tests.docs.blocks import ROOT

pytest.importorskip("nbclient", reason="a tool of `make docs`, absent beside the CPU-only torch")

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def kinds(notebook):
    """What each cell of code has put out: text, or figures; the digits depend on the machine."""
    return [
        [(each["output_type"], each.get("name"), sorted(each.get("data", {}))) for each in outputs]
        for outputs in (cell.get("outputs", []) for cell in notebook["cells"])
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.name for path in NOTEBOOKS])
def test_the_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    committed = json.loads(path.read_text())
    executed = runpy.run_path(str(ROOT / "docs" / "plots" / "notebook.py"))["executed"](path)
    assert kinds(executed) == kinds(committed)
    assert sum(map(len, kinds(committed))) > 5
    assert not any("stderr" in output for outputs in kinds(executed) for output in outputs)
