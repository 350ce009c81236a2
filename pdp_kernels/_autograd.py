"""The soft masks as differentiable functions: dispatcher operators with Eq. 2 as their backward."""

import inspect

import torch

from pdp_kernels import _ops


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
        twice = torch.is_grad_enabled()  # somebody may differentiate this backward
        backward = _MaskedWeightBackward.apply if twice else _MaskedWeightBackward.forward
        grad = backward(grad_w_hat, grad_mask, weight, threshold, tau, ctx.group, ctx.relative)
        return grad, None, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return _ops.map_over_batch(MaskedWeight.apply, info.batch_size, in_dims, args)


class _MaskedWeightBackward(torch.autograd.Function):
    """Eq. 2 as a function of its own, so that differentiating it again is an error, not a zero."""

    @staticmethod
    def forward(grad_w_hat, grad_mask, weight, threshold, tau, group, relative):
        if group is None:
            return torch.ops.pdp.soft_mask_backward(
                grad_w_hat, grad_mask, weight, threshold, tau, relative
            )
        return torch.ops.pdp.soft_mask_nm_backward(
            grad_w_hat, grad_mask, weight, tau, *group, relative
        )

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
        return _ops.map_over_batch(_MaskedWeightBackward.apply, info.batch_size, in_dims, args)


# Function.apply asks inspect.signature on every call; to have it at hand saves 13 of 38 us.
MaskedWeight.forward.__signature__ = inspect.signature(MaskedWeight.forward)
