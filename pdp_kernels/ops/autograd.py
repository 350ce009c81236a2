"""Differentiable soft masks: dispatcher operators whose backward is Eq. 2 of the paper."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from pdp_kernels.ops.vmap import map_over_batch

pdp: Any = torch.ops.pdp


class Function(torch.autograd.Function):
    """An autograd.Function that is called with every argument by position.

    `torch.autograd.Function.apply` binds the arguments to the signature of `forward` on every call,
    and takes a third of the time of a small mask for it.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        alive = [unwrap_if_dead(arg) if isinstance(arg, Tensor) else arg for arg in args]
        return super(torch.autograd.Function, cls).apply(*alive)  # type: ignore[misc]


class MaskedWeight(Function):
    """Return (w_hat, mask) of a weight. Backward recomputes the mask from the weight and scalars.

    boundary: the threshold; for N:M groups, which find their own, the number pruned in each.
    gradient_tau: the temperature of Eq. 2; None for tau. (The same tensor twice is more than
        torch.compile traces.) It and boundary are saved as they are: autograd refuses a backward
        after either was written in place.
    group: None for one threshold, or (m, dim) for a threshold per N:M group.
    """

    @staticmethod
    def forward(
        weight: Tensor,
        boundary: Tensor,
        tau: Tensor,
        gradient_tau: Tensor | None,
        group: tuple[int, int] | None,
        relative: bool,
        out_dtype: torch.dtype | None,
        return_mask: bool,
    ) -> tuple[Tensor, Tensor]:
        if group is None:
            return pdp.soft_mask.default(weight, boundary, tau, relative, out_dtype, return_mask)
        m, dim = group
        rest = (relative, out_dtype, return_mask)
        return pdp.soft_mask_nm.default(weight, tau, m, boundary, dim, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        weight, boundary, tau, gradient_tau, ctx.group, ctx.relative, _, ctx.return_mask = inputs
        ctx.save_for_backward(weight, boundary, tau if gradient_tau is None else gradient_tau)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_w_hat: Tensor | None, grad_mask: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if not ctx.return_mask:
            grad_mask = None  # a compiled backward passes zeros for the empty mask
        if grad_w_hat is None and grad_mask is None:
            return (None,) * 8
        weight, boundary, tau = ctx.saved_tensors
        grads = (grad_w_hat, grad_mask, weight)
        if ctx.group is None:
            grad = _backward(pdp.soft_mask_backward.default, *grads, boundary, tau, ctx.relative)
        else:
            m, dim = ctx.group
            rest = (tau, m, boundary, dim, ctx.relative)
            grad = _backward(pdp.soft_mask_nm_backward.default, *grads, *rest)
        return grad, None, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return map_over_batch(MaskedWeight.apply, info.batch_size, in_dims, args)


# Under torch.func, Dynamo inlines the forward of a Function and drops its backward, so that
# compiled gradients would be 0 (pytorch issue 193279). A call left in its graph keeps both.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def mask_weight(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return `MaskedWeight` of its arguments."""
    return MaskedWeight.apply(*arguments)


class MaskedChannels(Function):
    """Return (w_hat, mask) of a weight, given the norms of its channels along dim.

    The weight's gradient includes the gradient through the norms, which are functions of it.
    """

    @staticmethod
    def forward(
        weight: Tensor,
        norms: Tensor,
        threshold: Tensor,
        tau: Tensor,
        gradient_tau: Tensor | None,
        dim: int,
        relative: bool,
        rms: bool,
        out_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        return pdp.soft_mask_channel.default(
            weight, norms, threshold, tau, dim, relative, out_dtype
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        weight, norms, threshold, tau, gradient_tau, ctx.dim, ctx.relative, ctx.rms, _ = inputs
        tau = tau if gradient_tau is None else gradient_tau
        ctx.save_for_backward(weight, norms, threshold, tau)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_w_hat: Tensor | None, grad_mask: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_w_hat is None and grad_mask is None:
            return (None,) * 9
        grad = _backward(
            pdp.soft_mask_channel_backward.default,
            grad_w_hat,
            grad_mask,
            *ctx.saved_tensors,
            ctx.dim,
            ctx.relative,
            ctx.rms,
        )
        return grad, None, None, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return map_over_batch(MaskedChannels.apply, info.batch_size, in_dims, args)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def mask_channels(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return `MaskedChannels` of its arguments."""
    return MaskedChannels.apply(*arguments)


class MaskedWeights(torch.autograd.Function):
    """Return the w_hat of each weight of a list, in one call: no transforms, no compilation.

    The node remembers the weights without saving them: several backward passes may each reach some
    of the w_hat, and none may end the node for the others. It checks their versions itself.

    on_backward: called when a backward pass reaches the node.
    """

    @staticmethod
    def forward(
        ctx: Any,
        on_backward: Callable[[], None],
        thresholds: Tensor,
        taus: Tensor,
        gradient_taus: Tensor | None,
        relative: bool,
        out_dtype: torch.dtype | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.on_backward = on_backward
        ctx.weights, ctx.relative = weights, relative
        ctx.constants = (thresholds, taus if gradient_taus is None else gradient_taus)
        ctx.versions = [each._version for each in (*weights, *ctx.constants)]
        return tuple(pdp.soft_mask_list.default(weights, thresholds, taus, relative, out_dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.on_backward()
        weights, constants = ctx.weights, ctx.constants
        is_used = [*(grad is not None for grad in grads), True, True]
        _check_versions((*weights, *constants), ctx.versions, is_used)

        def operator(*tensors: Any) -> tuple[Tensor, ...]:
            lists = tensors[: len(weights)], tensors[len(weights) :]
            return tuple(pdp.soft_mask_list_backward.default(*lists, *constants, ctx.relative))

        results = _backward(operator, *grads, *weights)
        return (None,) * 6 + tuple(
            None if grad is None else result for grad, result in zip(grads, results, strict=True)
        )


def _check_versions(
    tensors: Sequence[Tensor], versions: Sequence[int], is_used: Sequence[bool]
) -> None:
    for tensor, version, used in zip(tensors, versions, is_used, strict=True):
        if used and tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a masked weight or its constant, shape {tuple(tensor.shape)}, "
                f"is at version {tensor._version}; expected version {version} instead"
            )


def _backward(operator: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a backward operator, whose second derivative is an error."""
    if torch.is_grad_enabled():
        return _BackwardOnce.apply(operator, *arguments)
    return operator(*arguments)


class _BackwardOnce(Function):
    """Call a backward operator. Its own derivative is an error instead of zero."""

    @staticmethod
    def forward(operator: Callable[..., Any], *arguments: Any) -> Any:
        return operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "a masked weight cannot be differentiated twice: its backward is the paper's Eq. 2, a "
            "given estimate of the gradient. (torch.compile differentiates the gradients of "
            "torch.func again where their inputs require gradients: detach these)"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return map_over_batch(_BackwardOnce.apply, info.batch_size, in_dims, args)
