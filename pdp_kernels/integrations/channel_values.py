"""Channels with other values than a model computes, which show what else depends on them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pdp_kernels.pruning.layers import first_argument

Channels = Mapping[nn.Module, Sequence[int]]


@contextlib.contextmanager
def replaced(outputs: Channels, inputs: Channels, sign: int) -> Iterator[None]:
    """Replace channels where layers compute them, and hide them from the layers that read them.

    Args:
        outputs: for each layer its outputs that become random, larger than all outputs of the
            layer.
        inputs: for each layer its inputs that become zero.
        sign: of the random outputs, 1 or -1.
    """
    generator = torch.Generator().manual_seed(0)

    def compute(layer: nn.Module, _: Any, values: Tensor) -> Tensor:
        size = sign * (1 + torch.linalg.vector_norm(values.float()))

        def noise(chosen: Tensor) -> Tensor:
            factors = 1 + torch.rand(chosen.shape, generator=generator, device=generator.device)
            return (size * factors.to(chosen.device)).to(chosen.dtype)

        return _with(layer, values, outputs[layer], noise)

    def read(
        layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = first_argument(args, kwargs)
        hidden = _with(layer, values, inputs[layer], torch.zeros_like)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {next(iter(kwargs)): hidden}

    with contextlib.ExitStack() as hooks:
        for layer in outputs:
            hooks.enter_context(layer.register_forward_hook(compute))
        for layer in inputs:
            hooks.enter_context(layer.register_forward_pre_hook(read, with_kwargs=True))
        yield


def _with(
    layer: nn.Module, values: Tensor, channels: Sequence[int], new: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the inputs or outputs of a layer with new values in these channels."""
    dim = -1 - len(getattr(layer, "kernel_size", ()))
    index = torch.tensor(channels, device=values.device)
    return values.index_copy(dim, index, new(values.index_select(dim, index)))
