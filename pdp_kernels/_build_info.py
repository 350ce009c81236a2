"""What this installation is made of."""

import importlib

import torch

from pdp_kernels import _ops
from pdp_kernels._version import __version__


def build_info() -> dict:
    """What was built, and which backends are live.

    Returns:
        A dict of plain data::

            version    the package's version
            torch      {"running": version, "built_against": version or None}
            cuda       {"built_against": version, "architectures": list} or None
            backends   {"cpu": ..., "cuda_selection": ..., "cuda_mask": ...}: each the name of the
                       backend that serves those calls, "native C++", "CUDA C++", "Triton" or
                       "reference"
            reasons    for each backend that is not live, why

    Example:
        >>> build_info()["version"]
        '0.1.0'
    """
    native = _module("_C")
    cuda = _module("_C_cuda")
    reasons = {name: error for name, error in _ops.load_errors.items() if error is not None}
    if not _ops.has_triton:
        reasons["triton"] = "No module named 'triton'"
    elif not torch.cuda.is_available():
        reasons["triton"] = "no CUDA device is available"
    return {
        "version": __version__,
        "torch": {
            "running": torch.__version__,
            "built_against": native["torch"] if native else None,
        },
        "compiler": native["compiler"] if native else None,
        "cuda": cuda,
        "backends": {
            "cpu": "native C++" if native else "reference",
            "cuda_selection": "CUDA C++" if cuda else "reference",
            "cuda_mask": "Triton" if _ops.has_triton else "reference",
        },
        "reasons": reasons,
    }


def _module(name: str) -> dict | None:
    if _ops.load_errors[name] is not None:
        return None
    return importlib.import_module(f"pdp_kernels.{name}").build_info()
