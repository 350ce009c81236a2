"""Builds of the kernels' sources, kept under build/instruments as long as nothing changes."""

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "instruments"

HOST_CUDA = ROOT / "instruments" / "host_cuda"
CXX = shutil.which("c++") or shutil.which("g++")


def cuda_sources() -> list[Path]:
    """The files that a build of the CUDA kernels may include."""
    csrc = ROOT / "csrc"
    return sorted([*csrc.glob("*.h"), *csrc.glob("cuda/*"), *HOST_CUDA.glob("*")])


def build(name: str, sources: Iterable[Path], *commands: Sequence[object]) -> Path:
    """Return the file `name` that the commands make, which run one after another.

    They run in an empty folder, with absolute paths of their inputs, and leave `name` there. A file
    made earlier is returned if commands, contents of `sources` and compilers' versions are the same.

    Raises:
        RuntimeError: a command fails; the message ends with what it printed.
    """
    lines = [[str(word) for word in command] for command in commands]
    digest = hashlib.sha256(repr(lines).encode())
    for program in sorted({line[0] for line in lines}):
        digest.update(subprocess.check_output([program, "--version"]))
    for source in sources:
        digest.update(f"{source}\0".encode() + source.read_bytes())
    kept = KEPT / digest.hexdigest()[:16] / name
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        for line in lines:
            result = subprocess.run(
                line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            if result.returncode != 0:
                raise RuntimeError(f"{' '.join(line)}\n{result.stdout[-4000:]}")
        Path(folder, name).replace(kept)  # at once: another process may be building it too
    return kept
