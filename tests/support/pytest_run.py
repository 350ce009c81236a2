"""Runs pytest on tests that are given as text."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support import TIMEOUT

ROOT = Path(__file__).parents[2]


def run_pytest(folder: Path, tests: str, *words: str, conftest: str = "") -> str:
    """Run `tests` in a process of its own and return what pytest printed.

    Args:
        folder: Where the files are written; tests find it in the environment variable FOLDER.
        tests: Text of the test module.
        words: Arguments of pytest.
        conftest: Text of its conftest.py.
    """
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_it.py").write_text(tests)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    large\n")
    command = [sys.executable, "-m", "pytest", "-c", folder / "pytest.ini", *words, folder]
    environment = os.environ | {"FOLDER": str(folder)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    return result.stdout + result.stderr
