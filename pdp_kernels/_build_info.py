"""Versions and backends of this installation."""

import importlib
from typing import Any

import torch

from pdp_kernels._version import __version__
from pdp_kernels.ops import backends


def build_info() -> dict[str, Any]:
    """Return what was built, and which backends calls can reach.

    Returns:
        A dict of plain data.

            version    the version of the package
            torch      the version of torch in this process
            native     {"torch", "compiler"} that built the CPU module, or None
            cuda       {"torch", "cuda", "architectures", "compiler"} of the CUDA module, or None
            backends   {"reference", "native", "cuda", "triton"}: True if calls can reach it.
                       CPU tensors go to native, else to reference. CUDA tensors go to cuda
                       (selection) and triton (masks), else to reference
            reasons    why, for each backend that calls cannot reach

    Examples:
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


def _built_with(module: str) -> dict[str, str] | None:
    if backends.load_errors[module] is not None:
        return None
    info: dict[str, str] = importlib.import_module(f"pdp_kernels.{module}").build_info()
    return info
