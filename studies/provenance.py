"""Which code made a result."""

import os
import subprocess
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
