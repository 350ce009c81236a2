"""Figures that stand in the documentation are those of the results and of the code."""

import re
import runpy

from instruments.races import MUTATIONS
from tests.docs.blocks import ROOT

DOCS = ROOT / "docs"


def test_the_tables_of_the_performance_page_are_those_of_the_results():
    tables = runpy.run_path(str(DOCS / "plots" / "tables.py"))
    page = (DOCS / "performance.md").read_text()
    assert re.findall(r"<!-- (\w+) -->\n\n\|", page) == list(tables["TABLES"])
    assert tables["filled"](page) == page, "run docs/plots/tables.py"


def test_commits_of_the_performance_page_are_those_of_the_results():
    results = "".join(path.read_text() for path in (ROOT / "benchmarks/results").rglob("*.json"))
    commits = re.findall(r"\b[0-9a-f]{12}\b", (DOCS / "performance.md").read_text())
    assert len(commits) >= 4
    assert all(f'"commit": "{commit}"' in results for commit in commits)


def test_the_page_of_the_environment_has_what_setup_reads():
    source = (ROOT / "setup.py").read_text()
    read = re.findall(r"""environ(?:\.get|\.setdefault)?[\[(]"(\w+)\"""", source)
    page = (DOCS / "api" / "environment.md").read_text()
    assert len(read) >= 5
    assert all(f"`{name}`" in page for name in read)


def test_the_pages_name_the_number_of_mutations():
    for page in ("verification.md", "developing/instruments.md"):
        (number,) = re.findall(
            r"each of (\d+) deliberate", " ".join((DOCS / page).read_text().split())
        )
        assert int(number) == len(MUTATIONS)
