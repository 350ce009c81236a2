"""The backends under test."""

from types import SimpleNamespace

import pytest
import torch

from pdp_kernels import ops

GPU = pytest.param("gpu", marks=pytest.mark.gpu)


def dispatched(name):
    """Return all operators as the dispatcher calls them, and the device of a backend."""
    operators = {name: getattr(torch.ops.pdp, name) for name in ops.schemas.SCHEMAS}
    return SimpleNamespace(device="cuda" if name == "gpu" else "cpu", **operators)


def on_device(backend, *arguments):
    """Return the arguments with all tensors, also those in lists, on the backend's device."""

    def moved(argument):
        if isinstance(argument, list):
            return [moved(each) for each in argument]
        return argument.to(backend.device) if isinstance(argument, torch.Tensor) else argument

    return [moved(argument) for argument in arguments]


def interpreted():
    """Return the mask operators that Triton's interpreter runs."""
    from pdp_kernels.triton_kernels import (
        soft_mask,
        soft_mask_channel,
        soft_mask_list,
        soft_mask_nm,
    )

    operators = (
        vars(soft_mask) | vars(soft_mask_list) | vars(soft_mask_nm) | vars(soft_mask_channel)
    )
    return SimpleNamespace(device="cpu", **operators)
