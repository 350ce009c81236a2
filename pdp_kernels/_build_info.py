"""Versions and backends of this installation."""

import importlib
from typing import Any

import torch

from pdp_kernels._version import __version__
from pdp_kernels.ops import backends
from pdp_kernels.ops.build_record import (
    LEFT_OUT_BY_REQUEST,
    build_record,
    major,
    obstacle_of_the_driver,
)
from pdp_kernels.pruning.user_warnings import warn_user


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
                       (selection, masks of lists) and triton (masks), else to reference
            reasons    why, for each backend that calls cannot reach

    Examples:
        >>> build_info()["backends"]["reference"]
        True
    """
    reasons = {
        "native": backends.load_errors["_C"],
        "cuda": backends.load_errors["_C_cuda"] or _no_device(),
        "triton": backends.triton_error or _no_device(),
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


def warn_without_cuda_kernels() -> None:
    """Warn on a machine with a GPU if its tensors take slower backends, unless so requested."""
    reason = backends.load_errors["_C_cuda"]
    if reason is None or torch.version.cuda is None or _is_left_out_by_request():
        return
    if torch.cuda.device_count() == 0:  # asks NVML: this does not initialise CUDA
        return
    if backends.gpu_obstacle:
        warn_user(
            f"pdp_kernels has no CUDA kernels: {reason}. Everything that has CUDA tensors is "
            "computed by slower PyTorch operations. Use a newer GPU, or prune on the CPU"
        )
        return
    warn_user(
        f"pdp_kernels has no CUDA kernels: {reason}. Thresholds and hard masks of CUDA tensors are "
        f"computed by slower PyTorch operations. {_mend(torch.version.cuda)}"
    )


def _is_left_out_by_request() -> bool:
    record = build_record()
    return record is not None and record.left_out.get("_C_cuda") == LEFT_OUT_BY_REQUEST


def _mend(cuda: str) -> str:
    """Return what gives the package its CUDA kernels, for a torch that is built for this CUDA."""
    record = build_record()
    if record is None:
        return "Build the checkout: pip install --no-build-isolation --editable ."
    build_again = (
        "build again for the torch that is installed (this needs setuptools 77 or later, ninja "
        "and pybind11): "
        "pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall "
        "--no-binary pdp_kernels pdp_kernels"
    )
    if "_C" in record.left_out:
        return f"Install a C++ compiler and {build_again}"
    if "TORCH_CUDA_ARCH_LIST" in record.left_out.get("_C_cuda", ""):
        return f"Set TORCH_CUDA_ARCH_LIST to 8.0 or later, or unset it, and {build_again}"
    if obstacle_of_the_driver():
        return (
            "Install a newer driver. Or, for a driver of CUDA 12.1 or later, set CUDA_HOME to an "
            f"older toolkit and {build_again}"
        )
    if record.toolkit is None or major(record.toolkit) != major(cuda):
        return f"Set CUDA_HOME to a toolkit of CUDA {major(cuda)}, 12.1 or later, and {build_again}"
    return f"The build had torch {record.torch}: {build_again}"
