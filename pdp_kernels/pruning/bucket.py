"""A bucket: weights whose soft masks are one call of an operator, and one node of the graph."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pdp_kernels.functional.soft_mask import autocast_dtype
from pdp_kernels.ops.autograd import MaskedWeights
from pdp_kernels.pruning.masks import UnstructuredMask

# A bucket keeps the gradients of its masked weights until all are there. In bytes, as DDP's.
BUCKET_BYTES = 25 * 2**20

# Larger weights are not worth it: beside their masks the time of a call does not matter.
MAX_ELEMENTS = 8_000_000


class Use:
    """A weight that the forward of a model uses.

    Attributes:
        weight: the Parameter.
        mask: its mask.
        last_pass: the backward pass that brought its last gradient, as far as it was noted.
    """

    def __init__(self, weight: nn.Parameter, mask: UnstructuredMask) -> None:
        self.weight = weight
        self.mask = mask
        self.last_pass: int | None = None

    def may_join(self) -> bool:
        """Whether it may be in a bucket."""
        weight = self.weight
        return (
            weight.numel() < MAX_ELEMENTS
            and not weight.is_inference()
            and not _has_hooks(weight)
            and not (weight.requires_grad and self.last_pass is None)
        )

    def kind(self) -> object:
        """Return what the weights of a bucket have in common."""
        threshold, needs_gradient = self.mask.threshold, self.weight.requires_grad
        last_pass = self.last_pass if needs_gradient else None
        return threshold.device, threshold.dtype, self.mask.relative, needs_gradient, last_pass


class Bucket:
    """Weights on one device whose masked weights are computed at once.

    Attributes:
        uses: the weights. All of them require a gradient, or none.
        last_pass: the backward pass that brought its last gradients.
    """

    last_pass: int | None = None

    def __init__(self, uses: Sequence[Use]) -> None:
        self.uses: list[Use] = sorted(uses, key=lambda use: use.mask.threshold.storage_offset())
        self._weights = [use.weight for use in self.uses]
        self._requires_grad = self._weights[0].requires_grad
        self._relative = self.uses[0].mask.relative
        self._thresholds = _Vector([use.mask.threshold for use in self.uses])
        self._taus = _Vector([use.mask.tau for use in self.uses])
        self._gradient_taus = None
        if any(use.mask.gradient_tau is not None for use in self.uses):
            self._gradient_taus = _Vector([_gradient_tau(use.mask) for use in self.uses])

    def fits(self) -> bool:
        """Whether it may still be computed at once. Masks get all their constants together."""
        for use, threshold in zip(self.uses, self._thresholds.values, strict=True):
            if (
                use.mask.threshold is not threshold
                or use.weight.requires_grad is not self._requires_grad
                or _has_hooks(use.weight)
            ):
                return False
        return True

    def masked(self) -> "dict[int, MaskedUse]":
        """Compute the masked weights. Return them by the ids of the weights."""
        call = Call(self, self._weights[0])
        w_hats = MaskedWeights.apply(
            call.note_backward,
            self._thresholds.tensor(),
            self._taus.tensor(),
            None if self._gradient_taus is None else self._gradient_taus.tensor(),
            self._relative,
            autocast_dtype(self._weights[0]),
            *self._weights,
        )
        return {
            id(weight): MaskedUse(w_hat, use, weight._version, weight.data_ptr(), call)
            for w_hat, weight, use in zip(w_hats, self._weights, self.uses, strict=True)
        }


class MaskedUse(NamedTuple):
    """A masked weight of a bucket, and what it was computed from."""

    w_hat: Tensor
    use: Use
    version: int
    address: int
    call: "Call"

    def w_hat_of(self, weight: Tensor, mask: object) -> Tensor | None:
        """Return w_hat if it is what a layer would compute now, from this weight and mask."""
        is_the_same = (
            weight._version == self.version
            and weight.data_ptr() == self.address
            and weight.requires_grad is self.w_hat.requires_grad
            and mask is self.use.mask
            and self.w_hat._version == 0  # no layer has written into it
            and self.call.is_valid()
        )
        return self.w_hat if is_the_same else None


class Call:
    """A call that masks a bucket, in the autocast and on the stream of its moment."""

    def __init__(self, bucket: Bucket, weight: Tensor) -> None:
        self._bucket = bucket
        self._device = weight.device
        self._kind: str = self._device.type
        self._autocast = _autocast(self._kind)
        self._stream = torch.cuda.current_stream(self._device) if self._kind == "cuda" else None
        self._has_gradients = False

    def note_backward(self) -> None:
        self._has_gradients = True
        self._bucket.last_pass = torch._C._current_graph_task_id()

    def is_valid(self) -> bool:
        """Whether it would return the same now. After a backward an optimizer may have stepped."""
        return (
            not self._has_gradients
            and self._autocast == _autocast(self._kind)
            and (self._stream is None or self._stream == torch.cuda.current_stream(self._device))
        )


class _Vector:
    """0-d tensors as one of shape (T,): a view of them if they are evenly spaced, else a copy."""

    def __init__(self, values: list[Tensor]) -> None:
        self.values = values
        self._view: Tensor | None = None
        first, count = values[0], len(values)
        start = first.storage_offset()
        step = values[1].storage_offset() - start if count > 1 else 0
        if all(
            value.untyped_storage()._cdata == first.untyped_storage()._cdata
            and value.storage_offset() == start + index * step
            for index, value in enumerate(values)
        ):
            self._view = first.as_strided((count,), (step,))

    def tensor(self) -> Tensor:
        return torch.stack(self.values) if self._view is None else self._view


def fill_buckets(uses: Sequence[Use]) -> list[Bucket]:
    """Return buckets of what may be computed at once, each full before the next one begins."""
    full: list[list[Use]] = []
    filling: dict[object, list[Use]] = {}
    free: dict[object, int] = {}
    for use in uses:
        kind = use.kind()
        filling.setdefault(kind, []).append(use)
        free[kind] = free.get(kind, BUCKET_BYTES) - use.weight.nbytes
        if free[kind] <= 0:
            full.append(filling.pop(kind))
            del free[kind]
    return [Bucket(together) for together in (*full, *filling.values())]


def _gradient_tau(mask: UnstructuredMask) -> Tensor:
    return mask.tau if mask.gradient_tau is None else mask.gradient_tau


def _autocast(device_type: str) -> torch.dtype | None:
    is_enabled = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_enabled else None


def _has_hooks(weight: Tensor) -> bool:
    """Whether user code is called with its gradient: with None, if the weight were not used."""
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)
