"""The figures of the documentation are drawn by the scripts that are committed with them."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = ROOT / "docs" / "plots" / "concepts.py"
FIGURES = ROOT / "docs" / "assets" / "concepts"


def test_the_script_draws_every_figure_of_the_concepts(tmp_path):
    pytest.importorskip("matplotlib")
    runpy.run_path(str(SCRIPT))["main"](tmp_path)
    drawn = sorted(figure.name for figure in tmp_path.iterdir())
    assert drawn == sorted(figure.name for figure in FIGURES.iterdir())
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "concepts").glob("*.md"))
    assert all(f"../assets/concepts/{name})" in pages for name in drawn)
