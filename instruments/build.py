"""Builds of the kernels' sources, cached under build/instruments by content."""

import fcntl
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


def content_digest(texts: Iterable[str]) -> str:
    """Return 16 hexadecimal digits that tell different texts apart."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]


def build(name: str, sources: Iterable[Path], *commands: Sequence[object]) -> Path:
    """Run the commands one after another, and return the file `name` that they make.

    Args:
        name: the file that the commands write in their working folder.
        sources: the files on which the result depends.
        commands: they run in an empty folder, with absolute paths of their inputs.

    Returns:
        The path of the file. An earlier file is reused if the commands, the `sources` and the
        versions of the programs are the same.

    Raises:
        RuntimeError: a command fails. The message ends with its output.
    """
    lines = [[str(word) for word in command] for command in commands]
    versions = [
        subprocess.check_output([program, "--version"], text=True)
        for program in sorted({line[0] for line in lines})
    ]
    inputs = [f"{source}\n{source.read_text()}" for source in sources]
    kept = KEPT / content_digest([repr(lines), *versions, *inputs]) / name
    kept.parent.mkdir(parents=True, exist_ok=True)
    with open(kept.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds, the others wait
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
                for line in lines:
                    _run(line, folder)
                Path(folder, name).replace(kept)
    return kept


def _run(command: Sequence[str], folder: str) -> None:
    result = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout[-4000:]}")
