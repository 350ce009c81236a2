"""What this installation is made of."""

import importlib

import torch

from pdp_kernels._version import __version__
from pdp_kernels.ops import backends


def build_info() -> dict:
    """What was built, and which backends are live.

    Returns:
        A dict of plain data::

            version    the package's version
            torch      the torch that runs
            native     {"torch", "compiler"}: what the CPU module was built with, or None
            cuda       {"torch", "cuda", "architectures", "compiler"}: the same of the CUDA module
            backends   {"reference", "native", "cuda", "triton"}: whether calls can reach each.
                       CPU tensors are served by native, else by reference; CUDA tensors by cuda
                       (selection) and triton (masks), else by reference
            reasons    for each backend that is not live, why

    Example:
        >>> build_info()["backends"]["reference"]
        True
    """
    reasons = {
        "native": backends.load_errors["_C"],
        "cuda": backends.load_errors["_C_cuda"] or _no_device(),
        "triton": (None if backends.has_triton else "No module named 'triton'") or _no_device(),
    }
    return {
        "version": __version__,
        "torch": torch.__version__,
        "native": _built_with("_C"),
        "cuda": _built_with("_C_cuda"),
        "backends": {"reference": True} | {name: why is None for name, why in reasons.items()},
        "reasons": {name: why for name, why in reasons.items() if why is not None},
    }


def _no_device() -> str | None:
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _built_with(module: str) -> dict | None:
    if backends.load_errors[module] is not None:
        return None
    return importlib.import_module(f"pdp_kernels.{module}").build_info()
