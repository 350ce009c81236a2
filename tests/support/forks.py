"""Runs programs in forks of a process that has imported torch, which takes longer than they do."""

import multiprocessing
import os
import subprocess
import tempfile
from pathlib import Path

from tests.support import TIMEOUT

# Its server, one for each test process, has imported these once. It leaves out what reads the
# environment on import and is tested with several, such as torch.utils.cpp_extension.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "pdp_kernels",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
    ]
)


def run_program(program: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run `python -c program` in a folder, with more variables, and return what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        arguments = (program, cwd, os.environ | environment, outputs)
        process = FORKS.Process(target=_run, args=arguments)
        process.start()
        process.join(TIMEOUT)
        assert process.exitcode is not None, "the program did not end"
        return subprocess.CompletedProcess(
            program, process.exitcode, *(path.read_text() for path in outputs)
        )


def _run(program, cwd, environment, outputs):
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    exec(program, {"__name__": "__main__"})
