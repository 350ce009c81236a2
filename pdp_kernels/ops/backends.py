"""Fast backends: extension modules register their own kernels; this file registers Triton's."""

import functools
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from pdp_kernels.ops import arguments
from pdp_kernels.ops.build_record import (
    obstacle_of_the_driver,
    obstacle_of_the_gpus,
    reason_of,
)
from pdp_kernels.ops.schemas import library


def _load(module: str) -> str | None:
    """Import a module that registers kernels. Return the reason if it does not load."""
    try:
        importlib.import_module(f"pdp_kernels.{module}")
    except ImportError as error:
        return reason_of(module, str(error))
    return None


# Why no kernel runs on this machine's GPUs, or None.
gpu_obstacle: str | None = obstacle_of_the_gpus() if torch.version.cuda else None

# Why an extension module is not loaded, for each; None if it is. With a GPU or a driver that cannot
# run the CUDA module, its kernels must not be registered: those of other backends would not be
# reached.
load_errors: dict[str, str | None] = {
    "_C": _load("_C"),
    "_C_cuda": gpu_obstacle
    or (obstacle_of_the_driver() if torch.version.cuda else None)
    or _load("_C_cuda"),
}

# Why Triton's kernels are not registered, or None.
triton_error: str | None = gpu_obstacle if find_spec("triton") else "No module named 'triton'"

# The operators that Triton serves, by file in triton_kernels.
TRITON_OPERATORS: dict[str, tuple[str, ...]] = {
    "soft_mask": ("soft_mask", "soft_mask_backward"),
    "soft_mask_nm": ("soft_mask_nm", "soft_mask_nm_backward", "hard_mask_nm"),
    "compress": ("compress_2to4",),
    "soft_mask_channel": ("channel_norms", "soft_mask_channel", "soft_mask_channel_backward"),
}


# The operators that Triton serves where the extension module for CUDA is not there.
TRITON_SUBSTITUTES: dict[str, tuple[str, ...]] = {
    "soft_mask_list": ("soft_mask_list", "soft_mask_list_backward"),
}


def _on_first_call(file: str, name: str) -> Callable[..., Any]:
    """Return the Triton implementation, which imports Triton on its first call."""
    check = getattr(arguments, name)

    @functools.cache
    def implementation() -> Callable[..., Any]:
        module = importlib.import_module(f"pdp_kernels.triton_kernels.{file}")
        return getattr(module, name)

    def call(*args: Any) -> Any:
        check(*args)
        return implementation()(*args)

    return call


if triton_error is None:
    for _file, _names in (TRITON_OPERATORS | TRITON_SUBSTITUTES).items():
        for _name in _names:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"pdp::{_name}", "CUDA"):
                library.impl(_name, _on_first_call(_file, _name), "CUDA")
