"""The buckets of a model, from which its layers take their masked weights.

This works while the forward of a masked model runs in training mode. The first layer of a bucket
that runs has all of its weights masked. Before there are buckets, a forward and its backward find
out which weights are used, in which order, and which gradients come together: a bucket is one node
of the graph, and reaches all of its weights. Each bucket is small, so that in a backward pass its
gradients come soon after those of its last layer, and DDP sends them meanwhile.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pdp_kernels.distributed.shards import fsdp_modules
from pdp_kernels.pruning.bucket import Bucket, MaskedUse, Use, fill_buckets
from pdp_kernels.pruning.masks import UnstructuredMask, WeightMask


class MaskBuckets:
    """The buckets of a model, of weights in the order in which its forward uses them.

    A copy of the model starts without any. A weight whose bucket is masked in vain for it, because
    a forward leaves it out, is in no bucket again.
    """

    def __init__(self) -> None:
        self._uses: dict[int, Use] = {}  # by id of the weight
        self._buckets: dict[int, Bucket] = {}  # by id of the weight
        self._irregular: dict[int, WeightMask] = {}  # by id of the mask
        self._is_outdated = False

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskBuckets, ()

    def run(self, model: nn.Module, forward: Callable[[], Any]) -> Any:
        """Return what the model's forward returns, whose layers may call `bucketed` meanwhile.

        Where more than autograd watches the forward, or another one runs already, they get nothing.
        """
        if _running.run is not None or _is_tracing() or not _is_plain():
            return forward()
        if self._is_outdated:
            self._collect(model)
        run = _running.run = _Run(self, model)
        try:
            result = forward()
        finally:
            _running.run = None
        self._note(run)
        return result

    def bucket_of(self, weight: nn.Parameter, model: nn.Module) -> Bucket | None:
        """Return the bucket of a weight, which fits it as it is now."""
        bucket = self._buckets.get(id(weight))
        if bucket is not None and not bucket.fits():
            self._collect(model)
            bucket = self._buckets.get(id(weight))
        return bucket

    def use_of(self, weight: nn.Parameter, mask: UnstructuredMask) -> Use:
        use = self._uses.get(id(weight))
        return Use(weight, mask) if use is None or use.mask is not mask else use

    def watch(self, use: Use, w_hat: Tensor) -> None:
        """Note the backward pass that brings the gradient of a weight which is in no bucket yet."""

        def note(_: Tensor) -> None:
            use.last_pass = torch._C._current_graph_task_id()
            self._is_outdated = True

        if w_hat.requires_grad and use.last_pass is None:
            w_hat.register_hook(note)

    def _note(self, run: "_Run") -> None:
        """Note which weights a forward has used, and which it has masked in vain."""
        used = run.used
        in_vain = {key: masked for key, masked in run.masked.items() if key not in used}
        if not in_vain and [key for key in self._uses if key in used] == list(used):
            return
        for masked in in_vain.values():
            self._irregular[id(masked.use.mask)] = masked.use.mask
        masks = {id(use.mask) for use in used.values()}  # another weight has one of them no more
        rest = {key: use for key, use in self._uses.items() if id(use.mask) not in masks}
        self._uses = {**used, **rest}
        self._is_outdated = True

    def _collect(self, model: nn.Module) -> None:
        """Make the buckets, of the weights that may be in them."""
        self._is_outdated = False
        for key, bucket in self._buckets.items():
            if bucket.last_pass is not None and key in self._uses:
                self._uses[key].last_pass = bucket.last_pass
        self._buckets = {}
        if fsdp_modules(model):
            return  # it frees and gathers the weights of one group after the other
        uses = [
            use
            for use in self._uses.values()
            if id(use.mask) not in self._irregular and use.may_join()
        ]
        for bucket in fill_buckets(uses):
            self._buckets.update((id(use.weight), bucket) for use in bucket.uses)


def bucketed(weight: Tensor, mask: WeightMask) -> Tensor | None:
    """Return the softly masked weight if a forward runs that uses buckets, else None."""
    run = _running.run
    if run is None or type(weight) is not nn.Parameter or not _is_plain():
        return None
    return run.take(weight, mask)


class _Run:
    """A forward of a masked model.

    Attributes:
        used: the weights that layers have taken, in their order, by id.
        masked: the weights of all buckets that have been masked, by id.
    """

    def __init__(self, buckets: MaskBuckets, model: nn.Module) -> None:
        self.used: dict[int, Use] = {}
        self.masked: dict[int, MaskedUse] = {}
        self._buckets = buckets
        self._model = model

    def take(self, weight: nn.Parameter, mask: WeightMask) -> Tensor | None:
        """Return the masked weight from its bucket, or one of its own that is watched."""
        key = id(weight)
        masked = self.masked.get(key)
        if masked is None:
            if type(mask) is not UnstructuredMask:
                return None
            bucket = self._buckets.bucket_of(weight, self._model)
            if bucket is None:
                return self._own(weight, mask)
            self.masked.update(bucket.masked())
            masked = self.masked[key]
        w_hat = masked.w_hat_of(weight, mask)
        if w_hat is not None:
            self.used[key] = masked.use
        return w_hat

    def _own(self, weight: nn.Parameter, mask: UnstructuredMask) -> Tensor:
        use = self.used[id(weight)] = self._buckets.use_of(weight, mask)
        w_hat = mask.soft(weight)
        self._buckets.watch(use, w_hat)
        return w_hat


class _Running(threading.local):
    run: _Run | None = None


_running = _Running()


def _is_plain() -> bool:
    """Whether autograd alone watches what is computed: no transform, no hooks on saved tensors.

    Activation checkpointing has such hooks. It runs a layer again when the model's forward is over,
    and the layer must then save what it saved before.
    """
    return (
        torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )


def _is_tracing() -> bool:
    return torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
