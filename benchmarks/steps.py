"""The steps to time, with their providers and checks.

A provider takes a batch, makes the preparations that are not timed, and returns the function to
time. To add a step, write its providers and its check, and enter them in STEPS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import channels, eager, nm, oracle, pq_index
from benchmarks.batches import Batch
from benchmarks.masks import Mask
from pdp_kernels import pdp_mask, pdp_threshold, pdp_thresholds

Tensors = Sequence[Tensor]
Provider = Callable[[Batch], Callable[[], Any]]
SoftMask = Callable[[Tensor, Tensor, Mask], Tensor]


@dataclass(frozen=True)
class Step:
    """A step with its providers and its check."""

    moved: Callable[[int, int], float]
    """Maps the bytes of a weight and of an element of w_hat to the bytes per weight that the best
    implementation reads and writes."""
    providers: dict[str, Provider]
    check: Callable[[Batch, Any], str | None]
    """Returns what is wrong with a provider's answer, or None."""
    base: str | None = None
    """The provider to which ratios are taken."""
    masked: bool = False
    """Whether the step depends on the batch's mask."""
    tiny: tuple[int, ...] = (64,)
    """Shape of the weights on which the time of the host is measured."""


def all_timed(run: Callable[[Batch], Any]) -> Provider:
    """Return the provider without preparations."""
    return lambda batch: partial(run, batch)


def select(threshold: Callable[[Tensor, float], Tensor]) -> Callable[[Batch], Tensors]:
    """Return the selection that finds thresholds weight by weight."""
    return lambda batch: [threshold(weight, batch.sparsity) for weight in batch.weights]


def our_thresholds(batch: Batch) -> Tensors:
    """Return thresholds by one call of `pdp_thresholds`, or of `pdp_threshold` for one weight."""
    if len(batch.weights) == 1:
        return [pdp_threshold(batch.weights[0], batch.sparsity)]
    return pdp_thresholds(batch.weights, batch.sparsity).unbind()


def our_mask(weight: Tensor, threshold: Tensor, mask: Mask) -> Tensor:
    """Return the masked weight by `pdp_mask` at a given threshold."""
    return pdp_mask(weight, threshold=threshold, **mask.arguments)


def masked_weights(soft_mask: SoftMask, batch: Batch, thresholds: Tensors) -> Tensors:
    """Return all masked weights of a batch."""
    return [
        soft_mask(weight, threshold, batch.mask)
        for weight, threshold in zip(batch.weights, thresholds, strict=True)
    ]


def forward(soft_mask: SoftMask) -> Provider:
    """Provide masked weights at given thresholds, with the tensors that autograd saves."""
    return all_timed(lambda batch: masked_weights(soft_mask, batch, batch.thresholds))


def backward(soft_mask: SoftMask) -> Provider:
    """Provide gradients of the weights, after a forward that is not timed.

    Small weights are still in the cache then, unlike in the other steps.
    """

    def prepare(batch: Batch) -> Callable[[], Tensors]:
        masked = masked_weights(soft_mask, batch, batch.thresholds)
        return partial(torch.autograd.grad, masked, batch.weights, batch.grads)

    return prepare


def forward_backward(
    soft_mask: SoftMask, thresholds: Callable[[Batch], Tensors] | None = None
) -> Provider:
    """Provide masked weights and gradients, at given thresholds or after a selection."""

    def run(batch: Batch) -> tuple[Tensors, Tensors]:
        selected = thresholds(batch) if thresholds else batch.thresholds
        masked = masked_weights(soft_mask, batch, selected)
        return masked, torch.autograd.grad(masked, batch.weights, batch.grads)

    return all_timed(run)


def copy(batch: Batch) -> Callable[[], Tensors]:
    """Provide the roof: a copy into memory that has been allocated and touched."""
    weights = [weight.detach() for weight in batch.weights]
    copies = list(map(torch.ones_like, weights))
    return lambda: list(map(Tensor.copy_, copies, weights))


def sums(batch: Batch) -> Tensors:
    """Return sums of the weights, the roof of operators that only read."""
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
    "copy": Step(lambda w, h: 2 * w, {"copy": copy}, oracle.check_copy),
    "sum": Step(lambda w, h: w, {"sum": all_timed(sums)}, oracle.check_sums),
    "threshold": Step(
        lambda w, h: w,
        {name: all_timed(selection) for name, selection in SELECTIONS.items()},
        oracle.check_thresholds,
        base="eager-kthvalue",
    ),
    "forward": Step(
        lambda w, h: w + h,
        {name: forward(mask) for name, mask in SOFT_MASKS.items()},
        oracle.check_forward,
        base="eager",
        masked=True,
    ),
    "backward": Step(
        lambda w, h: 2 * w + h,
        {name: backward(mask) for name, mask in SOFT_MASKS.items()},
        oracle.check_backward,
        base="eager",
        masked=True,
    ),
    "mask": Step(
        lambda w, h: 3 * w + 2 * h,
        {name: forward_backward(mask) for name, mask in SOFT_MASKS.items()},
        oracle.check_forward_backward,
        base="eager",
        masked=True,
    ),
    "step": Step(
        lambda w, h: 4 * w + 2 * h,
        {
            "eager-kthvalue": forward_backward(eager.soft_mask, SELECTIONS["eager-kthvalue"]),
            "eager-topk": forward_backward(eager.soft_mask, SELECTIONS["eager-topk"]),
            "compiled-kthvalue": forward_backward(
                eager.compiled_soft_mask, SELECTIONS["eager-kthvalue"]
            ),
            "compiled-sort": forward_backward(eager.compiled_soft_mask, SELECTIONS["sort"]),
            "ours": forward_backward(our_mask, our_thresholds),
        },
        oracle.check_forward_backward,
        base="eager-kthvalue",
        masked=True,
    ),
    "mask-2:4": Step(
        lambda w, h: 3 * w + 2 * h,
        nm.MASKS,
        nm.check_masks,
        base="eager",
        masked=True,
        tiny=nm.SMALLEST,
    ),
    "mask-channel": Step(
        lambda w, h: 4 * w + 2 * h,
        channels.MASKS,
        channels.check_masks,
        base="eager",
        masked=True,
        tiny=nm.SMALLEST,
    ),
    # Always in bfloat16: reads each weight, and writes half of it and one bit.
    "pack-2:4": Step(
        lambda w, h: 2 + 1 + 1 / 8, nm.PACKERS, nm.check_packed, base="eager", tiny=nm.SMALLEST
    ),
    "pq-index": Step(lambda w, h: w, pq_index.PROVIDERS, pq_index.check, base="eager"),
}
