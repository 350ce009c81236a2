"""vmap rules: every example of a batch is a layer of its own, with its own threshold."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pdp_kernels.ops.schemas import library

Rule = Callable[..., tuple[Any, Any]]


def map_over_batch(
    call: Callable[..., Any], batch_size: int, in_dims: Sequence[Any], args: Sequence[Any]
) -> tuple[Any, Any]:
    """Call once per example, and stack the results along a new dimension 0."""
    results = [
        call(*[_example(arg, dim, index) for arg, dim in zip(args, in_dims, strict=True)])
        for index in range(batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def _example(arg: Any, dim: Any, index: int) -> Any:
    # dim is None for an argument without a batch dimension, and a tuple of None for a tuple.
    return arg.select(dim, index) if isinstance(dim, int) else arg


def _examples(tensors: Sequence[Any], dims: Sequence[Any], batch_size: int) -> list[Any]:
    """Return the tensors of example 0, then those of example 1, and so on, in one list."""
    return [
        _example(tensor, dim, index)
        for index in range(batch_size)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]


def _for_lists(operator: Callable[..., Any]) -> Rule:
    """Return the rule of an operator on a list of weights: one call for the whole batch."""

    def rule(info: Any, in_dims: Any, weights: Any, values: Any) -> tuple[Any, Any]:
        weight_dims, value_dims = in_dims
        examples = _examples(weights, weight_dims, info.batch_size)
        if isinstance(values, Tensor):
            values = torch.cat(
                [_example(values, value_dims, index) for index in range(info.batch_size)]
            )
        else:
            values = list(values) * info.batch_size
        return operator(examples, values).unflatten(0, (info.batch_size, len(weights))), 0

    return rule


def _power_sums(
    info: Any, in_dims: Any, weights: Any, masks: Any, p: float, q: float, per_row: bool
) -> tuple[Any, Any]:
    weights, masks = (
        _examples(tensors, dims, info.batch_size)
        for tensors, dims in zip((weights, masks), in_dims[:2], strict=True)
    )
    sums = torch.ops.pdp.power_sums(weights, masks, p, q, per_row)
    return sums.unflatten(0, (info.batch_size, -1)), 0


def _for_mask_lists(operator: Callable[..., Any]) -> Rule:
    """Return the rule of an operator from lists of tensors to a list: one call for the batch."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        batch = info.batch_size

        def flattened(arg: Any, dims: Any) -> Any:
            if isinstance(arg, Tensor):
                return torch.cat([_example(arg, dims, index) for index in range(batch)])
            return _examples(arg, dims, batch) if isinstance(arg, (list, tuple)) else arg

        results = operator(*map(flattened, args, in_dims))
        layers = len(results) // batch
        return [torch.stack(results[layer::layers]) for layer in range(layers)], [0] * layers

    return rule


def _for_each_example(operator: Callable[..., Any]) -> Rule:
    """Return the rule of an operator on one weight: one call per example."""
    return lambda info, in_dims, *args: map_over_batch(operator, info.batch_size, in_dims, args)


def _register(name: str, rule: Rule) -> None:
    torch.library.register_vmap(f"pdp::{name}", rule, lib=library)


for _name in ("prune_counts", "thresholds"):
    _register(_name, _for_lists(getattr(torch.ops.pdp, _name)))
for _name in ("hard_mask", "hard_mask_nm", "channel_norms"):
    _register(_name, _for_each_example(getattr(torch.ops.pdp, _name)))
for _name in ("soft_mask_list", "soft_mask_list_backward"):
    _register(_name, _for_mask_lists(getattr(torch.ops.pdp, _name)))
_register("power_sums", _power_sums)
