"""The soft masks as differentiable functions: dispatcher operators with Eq. 2 as their backward."""

import inspect

import torch

from pdp_kernels.ops.vmap import map_over_batch


class MaskedWeight(torch.autograd.Function):
    """(w_hat, mask) of a weight. Saves the weight and its scalars; the mask is computed again.

    group: None for one threshold, or (m, pruned, dim) for a threshold in each N:M group.
    """

    @staticmethod
    def forward(weight, threshold, tau, group, relative, out_dtype, return_mask):
        if group is None:
            return torch.ops.pdp.soft_mask(weight, threshold, tau, relative, out_dtype, return_mask)
        return torch.ops.pdp.soft_mask_nm(weight, tau, *group, relative, out_dtype, return_mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, threshold, tau, ctx.group, ctx.relative, _, ctx.return_mask = inputs
        ctx.save_for_backward(weight, threshold, tau)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_w_hat, grad_mask):
        if not ctx.return_mask:
            grad_mask = None  # a compiled backward fills in zeros for the empty placeholder
        if grad_w_hat is None and grad_mask is None:
            return (None,) * 7
        weight, threshold, tau = ctx.saved_tensors
        grads = (grad_w_hat, grad_mask, weight)
        if ctx.group is None:
            grad = _backward("soft_mask_backward", *grads, threshold, tau, ctx.relative)
        else:
            grad = _backward("soft_mask_nm_backward", *grads, tau, *ctx.group, ctx.relative)
        return grad, None, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return map_over_batch(MaskedWeight.apply, info.batch_size, in_dims, args)


class MaskedChannels(torch.autograd.Function):
    """(w_hat, mask) of a weight and the norms of its channels along dim, which it saves.

    The norms are the weight's own: the gradient through them is part of the weight's.
    """

    @staticmethod
    def forward(weight, norms, threshold, tau, dim, relative, rms, out_dtype):
        return torch.ops.pdp.soft_mask_channel(
            weight, norms, threshold, tau, dim, relative, out_dtype
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, norms, threshold, tau, ctx.dim, ctx.relative, ctx.rms, _ = inputs
        ctx.save_for_backward(weight, norms, threshold, tau)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_w_hat, grad_mask):
        if grad_w_hat is None and grad_mask is None:
            return (None,) * 8
        grad = _backward(
            "soft_mask_channel_backward",
            grad_w_hat,
            grad_mask,
            *ctx.saved_tensors,
            ctx.dim,
            ctx.relative,
            ctx.rms,
        )
        return grad, None, None, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return map_over_batch(MaskedChannels.apply, info.batch_size, in_dims, args)


def _backward(name, *arguments):
    """A backward operator. Where somebody may differentiate it again, that is made an error."""
    if torch.is_grad_enabled():
        return _BackwardOnce.apply(name, *arguments)
    return getattr(torch.ops.pdp, name)(*arguments)


class _BackwardOnce(torch.autograd.Function):
    """A backward operator as a function of its own, whose derivative is an error, not a zero."""

    @staticmethod
    def forward(name, *arguments):
        return getattr(torch.ops.pdp, name)(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "a masked weight cannot be differentiated twice: its backward is the paper's Eq. 2, a "
            "given estimate of the gradient"
        )

    @staticmethod
    def vmap(info, in_dims, *args):
        return map_over_batch(_BackwardOnce.apply, info.batch_size, in_dims, args)


class _BoundAsGiven(inspect.BoundArguments):
    """All arguments of a call, which were given in their order: nothing is left to find out."""

    args = property(lambda self: tuple(self.arguments.values()))
    kwargs = property(lambda self: {})

    def apply_defaults(self):
        pass


class _AsGiven(inspect.Signature):
    """The signature of a forward that is always called with all of its arguments, in order."""

    def bind(self, *args):
        return _BoundAsGiven(self, dict(zip(self.parameters, args, strict=True)))


# Function.apply asks for the signature and binds to it on every call: this saves 20 of 38 us.
for _function in (MaskedWeight, MaskedChannels):
    _function.forward.__signature__ = _AsGiven.from_callable(_function.forward)
