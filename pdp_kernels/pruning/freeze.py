"""Fine-tuning of a pruned model whose zeros stay zero."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pdp_kernels.distributed.shards import is_distributed, is_sharded, local_shard
from pdp_kernels.pruning.optimizers import parameter_ids, torch_optimizer
from pdp_kernels.pruning.user_warnings import warn_user


class FrozenZeros:
    """Hooks of an optimizer that keep zeros at zero, until `remove`.

    `freeze_zeros`, `PDPPruner.freeze` and `SAPPruner.attach` make them. They hold one byte per
    weight.

    Args:
        weights: parameters of the optimizer, those that were pruned: a bias or a norm's parameter
            that starts at zero would stay there. Any may be a DTensor.
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
        self._weights = weights
        self._zeros = [local_shard(weight) == 0 for weight in weights]
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(lambda *_: self._mask_weights()),
        ]

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of the zeros to 0, as happens before each step of the optimizer.

        Call this method earlier if something else reads the gradients before the step, as
        torch.nn.utils.clip_grad_norm_ does: their norm includes the gradients of zeros otherwise.
        With a GradScaler call it between scaler.unscale_ and the clipping.
        """
        for weight, zeros in self._masked_weights():
            if weight.grad is None:
                continue
            gradient = local_shard(weight.grad)
            if gradient.is_sparse:  # an embedding has rows for the indices of a batch
                zeros, gradient = zeros[tuple(gradient._indices())], gradient._values()
            gradient.masked_fill_(zeros, 0)

    def remove(self) -> None:
        """Remove the hooks, so that the optimizer may change the zeros again."""
        for handle in self._handles:
            handle.remove()

    def _before_step(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Mask the gradients, and those that a closure of the step will make."""
        self.mask_gradients()
        if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
            args = (args[0], self._masked(args[1]), *args[2:])
        if callable(kwargs.get("closure")):
            kwargs = kwargs | {"closure": self._masked(kwargs["closure"])}
        return args, kwargs

    def _masked(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure of the loss as a function of the weights that are not frozen.

        A line search needs that: its directions may have entries at zeros, from the steps of LBFGS
        before the call.
        """

        def masked_closure() -> Any:
            self._mask_weights()
            loss = closure()
            self.mask_gradients()
            return loss

        return masked_closure

    @torch.no_grad()
    def _mask_weights(self) -> None:
        # An optimizer that mixes the elements of a gradient changes zeros of gradient 0 too.
        # By .data, because a closure may differentiate a graph from before the step.
        for weight, zeros in self._masked_weights():
            local_shard(weight.data).masked_fill_(zeros, 0)

    def _masked_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the weights with the masks of their zeros, which follow them to other devices."""
        pairs = zip(self._weights, self._zeros, strict=True)
        self._zeros = [zeros.to(weight.device) for weight, zeros in pairs]
        return zip(self._weights, self._zeros, strict=True)


@torch.no_grad()
def freeze_zeros(weights: Iterable[Tensor], optimizer: Optimizer) -> FrozenZeros:
    """Keep the weights that are zero now at zero, while an optimizer trains the others.

    The call sets their entries in the optimizer's state (momentum and the like) to 0 once. From
    then on each step sets their gradients to 0 before it, and the weights to 0 after it. A closure
    of the step, as LBFGS takes one, gives the loss of the weights with these zeros. The state of
    LBFGS and the quantized state of an 8-bit optimizer stay as they are, which changes no zero.

    Code that clips gradients by their norm calls `FrozenZeros.mask_gradients` before it, and after
    unscale_ of a GradScaler. Otherwise the norm includes the gradients of the zeros.

    Args:
        weights: parameters of the optimizer, those that were pruned: a bias or a norm's parameter
            that starts at zero would stay there. Any may be a DTensor.
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
