"""Runs a notebook, and writes its outputs into it: python docs/plots/notebook.py FILE.ipynb."""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config


def executed(path: Path) -> nbformat.NotebookNode:
    """Return the notebook as it is after a run of all its cells, in a fresh kernel."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    with TemporaryDirectory() as sockets:  # files in place of ports of the machine
        transport = {"transport": "ipc", "ip": f"{sockets}/kernel"}
        config = Config({"KernelManager": transport})
        NotebookClient(notebook, config=config, timeout=300, resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
    notebook.metadata = {
        "kernelspec": notebook.metadata["kernelspec"],
        "language_info": {"name": "python"},
    }
    return notebook


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    file = Path(sys.argv[1])
    nbformat.write(executed(file), file)
