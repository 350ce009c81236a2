"""The steps that are timed, who provides each, and what its answer is checked with.

A provider takes a batch, prepares what is not to be timed, and returns the function that is. To add
a step, write its providers and its check and enter them in STEPS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import channels, eager, groups, sparsity, truth
from benchmarks.batches import Batch
from pdp_kernels import pdp_mask, pdp_threshold, pdp_thresholds

Tensors = Sequence[Tensor]
Provider = Callable[[Batch], Callable[[], Any]]
SoftMask = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """One thing to time."""

    passes: int
    """Elements that the best implementation reads and writes per weight."""
    providers: dict[str, Provider]
    check: Callable[[Batch, Any], str | None]
    """Says what is wrong with a provider's answer, or None."""
    base: str | None = None
    """The provider that ratios are taken to."""


def all_timed(run: Callable[[Batch], Any]) -> Provider:
    """The provider that prepares nothing."""
    return lambda batch: partial(run, batch)


def select(threshold: Callable[[Tensor, float], Tensor]) -> Callable[[Batch], Tensors]:
    """Thresholds of a batch, one weight at a time."""
    return lambda batch: [threshold(weight, batch.sparsity) for weight in batch.weights]


def our_thresholds(batch: Batch) -> Tensors:
    """A list through one call of `pdp_thresholds`, a single weight through `pdp_threshold`."""
    if len(batch.weights) == 1:
        return [pdp_threshold(batch.weights[0], batch.sparsity)]
    return pdp_thresholds(batch.weights, batch.sparsity).unbind()


def our_mask(weight: Tensor, threshold: Tensor) -> Tensor:
    """`pdp_mask` at a given threshold."""
    return pdp_mask(weight, threshold=threshold)


def forward(soft_mask: SoftMask) -> Provider:
    """Masked weights at given thresholds, with what autograd keeps for backward."""
    return all_timed(lambda batch: list(map(soft_mask, batch.weights, batch.thresholds)))


def backward(soft_mask: SoftMask) -> Provider:
    """Gradients of the weights; the forward just before is not timed.

    Small weights are then still in the cache, unlike in the other steps.
    """

    def prepare(batch: Batch) -> Callable[[], Tensors]:
        masked = list(map(soft_mask, batch.weights, batch.thresholds))
        return partial(torch.autograd.grad, masked, batch.weights, batch.grads)

    return prepare


def forward_backward(
    soft_mask: SoftMask, thresholds: Callable[[Batch], Tensors] | None = None
) -> Provider:
    """Masked weights and gradients, at given thresholds or with selection of them before."""

    def run(batch: Batch) -> tuple[Tensors, Tensors]:
        selected = thresholds(batch) if thresholds else batch.thresholds
        masked = list(map(soft_mask, batch.weights, selected))
        return masked, torch.autograd.grad(masked, batch.weights, batch.grads)

    return all_timed(run)


def copy(batch: Batch) -> Callable[[], Tensors]:
    """The roof: a copy into memory that is there and has been touched."""
    weights = [weight.detach() for weight in batch.weights]
    copies = list(map(torch.ones_like, weights))
    return lambda: list(map(Tensor.copy_, copies, weights))


def sums(batch: Batch) -> Tensors:
    """The roof of what only reads."""
    return [weight.detach().sum(dtype=torch.float32) for weight in batch.weights]


SELECTIONS: dict[str, Callable[[Batch], Tensors]] = {
    "eager-kthvalue": select(eager.kthvalue_threshold),
    "eager-topk": select(eager.topk_threshold),
    "one-topk": select(eager.one_topk_threshold),
    "sort": select(eager.sort_threshold),
    "ours": our_thresholds,
}

SOFT_MASKS: dict[str, SoftMask] = {
    "eager": eager.soft_mask,
    "compiled": eager.compiled_soft_mask,
    "autotuned": eager.autotuned_soft_mask,
    "ours": our_mask,
}

STEPS = {
    "copy": Step(2, {"copy": copy}, truth.check_copy),
    "sum": Step(1, {"sum": all_timed(sums)}, truth.check_sums),
    "threshold": Step(
        passes=1,
        providers={name: all_timed(selection) for name, selection in SELECTIONS.items()},
        check=truth.check_thresholds,
        base="eager-kthvalue",
    ),
    "forward": Step(
        passes=2,
        providers={name: forward(mask) for name, mask in SOFT_MASKS.items()},
        check=truth.check_forward,
        base="eager",
    ),
    "backward": Step(
        passes=3,
        providers={name: backward(mask) for name, mask in SOFT_MASKS.items()},
        check=truth.check_backward,
        base="eager",
    ),
    "mask": Step(
        passes=5,
        providers={name: forward_backward(mask) for name, mask in SOFT_MASKS.items()},
        check=truth.check_forward_backward,
        base="eager",
    ),
    "step": Step(
        passes=6,
        providers={
            "eager-kthvalue": forward_backward(eager.soft_mask, SELECTIONS["eager-kthvalue"]),
            "eager-topk": forward_backward(eager.soft_mask, SELECTIONS["eager-topk"]),
            "compiled": forward_backward(eager.compiled_soft_mask, SELECTIONS["eager-kthvalue"]),
            "ours": forward_backward(our_mask, our_thresholds),
        },
        check=truth.check_forward_backward,
        base="eager-kthvalue",
    ),
    "mask-2:4": Step(5, groups.MASKS, groups.check_masks, base="eager"),
    "mask-channel": Step(6, channels.MASKS, channels.check_masks, base="eager"),
    "pack-2:4": Step(3, groups.PACKERS, groups.check_packed, base="eager"),
    "pq-index": Step(1, sparsity.PROVIDERS, sparsity.check, base="eager"),
}
