"""A model in evaluation mode, and how it is run on the inputs that a caller gives."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, and restore the mode of each of its modules."""
    modes = {each: each.training for each in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for each, training in modes.items():
            each.training = training


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, in which it calls each of its layers, and restore its mode.

    Without it the fused attention of torch.nn reads the weights of layers that it does not call,
    and what torch.compile has compiled calls no hook that is younger.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with evaluation_mode(model), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def run_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model with one argument, a tuple of arguments, or a mapping of keyword arguments."""
    if isinstance(model, torch._dynamo.OptimizedModule):  # warns of the hooks that count products
        model = model._orig_mod
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
