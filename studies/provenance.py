"""Which code and which command made a result."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

RESULTS = (":(exclude,top)studies/results", ":(exclude,top)benchmarks/results")


def checkout_commit() -> str:
    """Return the commit of the checkout, or PDP_COMMIT if git did not come with the sources.

    "+dirty" follows it if tracked files differ from it, other than results.
    """
    if "PDP_COMMIT" in os.environ:
        return os.environ["PDP_COMMIT"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *RESULTS)
        dirty = "+dirty" if changed else ""
        return git("rev-parse", "--short=12", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def shown_command(program: str) -> str:
    """Return the command line that trains, with DIR for the folder of the data.

    Args:
        program: The module that runs, such as studies.grid.
    """
    words = ["python", "-m", program, *(word for word in sys.argv[1:] if word != "--redraw")]
    if "--data-dir" in words:
        words[words.index("--data-dir") + 1] = "DIR"
    return shlex.join(words)
