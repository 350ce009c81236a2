"""Fine-tuning of a pruned model whose zeros stay zero."""

from collections.abc import Iterable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pdp_kernels.distributed.shards import is_distributed, is_sharded, local_shard
from pdp_kernels.pruning.optimizers import parameter_ids, torch_optimizer
from pdp_kernels.pruning.user_warnings import warn_user


class FrozenZeros:
    """Hooks of an optimizer that keep zeros at zero, until `remove`.

    `freeze_zeros` and `PDPPruner.freeze` make them. They hold one byte per weight.

    Args:
        weights: parameters of the optimizer; any may be a DTensor.
        optimizer: the optimizer that trains them.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([0.0, 2.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> frozen = freeze_zeros([weight], optimizer)
        >>> weight.sum().backward()
        >>> frozen.mask_gradients()  # before torch.nn.utils.clip_grad_norm_, for example
        >>> weight.grad
        tensor([0., 1.])
        >>> frozen.remove()
    """

    def __init__(self, weights: list[Tensor], optimizer: Optimizer) -> None:
        self._zeros = [(weight, local_shard(weight) == 0) for weight in weights]
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self.mask_gradients()),
            optimizer.register_step_post_hook(lambda *_: self._mask_weights()),
        ]

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of the zeros to 0, as happens before each step of the optimizer.

        Call this method earlier if something else reads the gradients before the step, as
        torch.nn.utils.clip_grad_norm_ does.
        """
        for weight, zeros in self._zeros:
            if weight.grad is not None:
                local_shard(weight.grad).masked_fill_(zeros, 0)

    def remove(self) -> None:
        """Remove the hooks, so that the optimizer may change the zeros again."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _mask_weights(self) -> None:
        # An optimizer that mixes the elements of a gradient changes zeros of gradient 0 too.
        for weight, zeros in self._zeros:
            local_shard(weight).masked_fill_(zeros, 0)


@torch.no_grad()
def freeze_zeros(weights: Iterable[Tensor], optimizer: Optimizer) -> FrozenZeros:
    """Keep the weights that are zero now at zero, while an optimizer trains the others.

    The call sets their entries in the optimizer's state (momentum and the like) to 0 once. From
    then on each step sets their gradients to 0 before it, and the weights to 0 after it. Code that
    uses a GradScaler or gradient clipping needs no change. The quantized state of an 8-bit
    optimizer stays as it is, which changes no zero.

    Args:
        weights: parameters of the optimizer; any may be a DTensor.
        optimizer: the optimizer that trains them.

    Returns:
        A `FrozenZeros`. Its remove() lets the zeros change again.

    Warns:
        UserWarning: no weight is zero (not checked if one of them is sharded).

    Raises:
        TypeError: optimizer is no torch.optim.Optimizer; a weight is no tensor.
        ValueError: a weight is no parameter of the optimizer.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([0.0, 2.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> frozen = freeze_zeros([weight], optimizer)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.tolist()
        [0.0, 1.5]
    """
    optimizer = torch_optimizer(optimizer)
    weights = list(weights)
    trained = parameter_ids(optimizer)
    for index, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"weights[{index}] must be a torch.nn.Parameter, got {type(weight).__name__}"
            )
        if id(weight) not in trained:
            raise ValueError(
                f"weights[{index}] must be a parameter of the optimizer, got one of shape "
                f"{tuple(weight.shape)} that it does not have"
            )
    for weight in weights:
        for value in optimizer.state.get(weight, {}).values():
            if _is_plain_state(value) and value.shape == weight.shape:
                local_shard(value).masked_fill_(local_shard(weight) == 0, 0)
    # A shard without zeros may be one of a global weight with zeros.
    if not any(is_sharded(weight) or (weight == 0).any() for weight in weights):
        warn_user("freeze_zeros found no zero to keep in the weights")
    return FrozenZeros(weights, optimizer)


def _is_plain_state(value: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor of numbers: no quantized codes, no subclass that holds them."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return type(value) in (Tensor, nn.Parameter) or is_distributed(value)
