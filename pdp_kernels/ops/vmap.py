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
    if batch_size == 0:
        return _of_no_examples(lambda one: map_over_batch(call, 1, in_dims, one), in_dims, args)
    results = [
        call(*[_example(arg, dim, index) for arg, dim in zip(args, in_dims, strict=True)])
        for index in range(batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def _of_no_examples(
    rule: Callable[[list[Any]], tuple[Any, Any]], in_dims: Sequence[Any], args: Sequence[Any]
) -> tuple[Any, Any]:
    """Return the results of an empty batch: none of those of one example, which have the shapes."""
    results, dims = rule([_sum_of_examples(*pair) for pair in zip(args, in_dims, strict=True)])
    if isinstance(results, Tensor):
        return results[:0], dims
    return type(results)(result[:0] for result in results), dims


def _sum_of_examples(arg: Any, dim: Any) -> Any:
    """Return a batch of one: zeros if there are no examples. It stays a function of the batch."""
    if isinstance(dim, (list, tuple)):
        return [_sum_of_examples(*pair) for pair in zip(arg, dim, strict=True)]
    return arg if dim is None else arg.sum(dim, keepdim=True, dtype=arg.dtype)


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
    def for_any_batch(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        if info.batch_size > 0:
            return rule(info, in_dims, *args)
        one = info._replace(batch_size=1)
        return _of_no_examples(lambda given: rule(one, in_dims, *given), in_dims, args)

    torch.library.register_vmap(f"pdp::{name}", for_any_batch, lib=library)


for _name in ("prune_counts", "thresholds"):
    _register(_name, _for_lists(getattr(torch.ops.pdp, _name)))
for _name in ("hard_mask", "hard_mask_nm", "channel_norms"):
    _register(_name, _for_each_example(getattr(torch.ops.pdp, _name)))
for _name in ("soft_mask_list", "soft_mask_list_backward"):
    _register(_name, _for_mask_lists(getattr(torch.ops.pdp, _name)))
_register("power_sums", _power_sums)
