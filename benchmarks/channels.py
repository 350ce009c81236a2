"""Channel masks: PyTorch's own way, ours, and their check.

Channels are those of dim 0. A weight of one dimension is seen as a matrix (`nm.as_matrix`).
Providers also find the threshold of the norms.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.batches import Batch, prune_count
from benchmarks.eager import kthvalue_threshold
from benchmarks.masks import Mask
from benchmarks.nm import as_matrix, forward_backward
from benchmarks.oracle import TOLERANCE
from pdp_kernels import pdp_mask_channel

# An absolute temperature in units of the squared norm, which is near 1: 1,000 weights of 0.03.
TAU = 1e-2


def mask_of(batch: Batch) -> Mask:
    """Return the batch's mask with a temperature that suits norms."""
    return batch.mask if batch.mask.relative else replace(batch.mask, tau=TAU)


def with_channels(weight: Tensor) -> Tensor:
    """Return the weight, or a matrix of it if it has one dimension."""
    return weight if weight.dim() > 1 else as_matrix(weight)


def norms_of(weight: Tensor) -> Tensor:
    """Return the l2 norm of each channel in float32."""
    return torch.linalg.vector_norm(weight.float(), dim=list(range(1, weight.dim())))


def threshold_of(norms: Tensor, sparsity: float) -> Tensor:
    """Return the threshold of the norms, -inf if no channel is pruned."""
    if not 0 < prune_count(len(norms), sparsity) < len(norms):
        return norms.new_full((), float("-inf"))  # one channel or two
    return kthvalue_threshold(norms, sparsity)


def soft_mask(weight: Tensor, norms: Tensor, threshold: Tensor, mask: Mask) -> Tensor:
    """Return Eq. 1 with norms, for a weight in float32."""
    m = torch.sigmoid((norms - threshold) * (norms + threshold.abs()) / mask.temperature(threshold))
    return (m.view(-1, *[1] * (weight.dim() - 1)) * weight).to(mask.out_dtype)


def eager_mask(weight: Tensor, batch: Batch) -> Tensor:
    """Return the masked weight: vector_norm, kthvalue, sigmoid, multiply.

    Computed in float32: in bfloat16 the gradients through the weight and through its norm would be
    rounded before they are added.
    """
    weight = weight.float()
    norms = norms_of(weight)
    threshold = threshold_of(norms.detach(), batch.sparsity)
    return soft_mask(weight, norms, threshold, mask_of(batch))


@partial(torch.compile, dynamic=True)
def _compiled(
    weight: Tensor, threshold: Tensor, tau: float | Tensor, relative: bool, dtype: torch.dtype
) -> Tensor:
    weight = weight.float()
    return soft_mask(weight, norms_of(weight), threshold, Mask("", tau, relative, dtype))


def compiled_mask(weight: Tensor, batch: Batch) -> Tensor:
    """Return the same through torch.compile, except for the threshold, which kthvalue finds."""
    threshold = threshold_of(norms_of(weight.detach()), batch.sparsity)
    mask = mask_of(batch)
    return _compiled(weight, threshold, mask.tau, mask.relative, mask.out_dtype)


def our_mask(weight: Tensor, batch: Batch) -> Tensor:
    """Return the masked weight by `pdp_mask_channel`."""
    return pdp_mask_channel(weight, batch.sparsity, **mask_of(batch).arguments)


MASKS = {
    "eager": forward_backward(eager_mask, with_channels),
    "compiled": forward_backward(compiled_mask, with_channels),
    "ours": forward_backward(our_mask, with_channels),
}


def check_masks(batch: Batch, answer: tuple) -> str | None:
    """Return what is wrong with masked weights and gradients against float64, or None."""
    for index, (weight, grad, w_hat, own) in enumerate(
        zip(batch.weights, batch.grads, *answer, strict=True)
    ):
        w, g = (with_channels(x.detach()).double().flatten(1) for x in (weight, grad))
        t = threshold_of(norms_of(with_channels(weight.detach())), batch.sparsity).double()
        tau = mask_of(batch).temperature(t)
        squares = w.square().sum(1, keepdim=True)
        m = torch.sigmoid((squares - t * t.abs()) / tau)
        pull = 2 / tau * m * (1 - m) * (g * w).sum(1, keepdim=True)
        scale = g.abs() + (pull * w).abs() + squares.sqrt()
        error = (w_hat.detach().double().view_as(w) - m * w).abs()
        error_grad = (own.double().view_as(w) - m * g - pull * w).abs()
        if not (error <= TOLERANCE[w_hat.dtype] * squares.sqrt()).all():
            return f"w_hat of tensor {index} is off by up to {error.max().item():.3g}"
        if not (error_grad <= TOLERANCE[weight.dtype] * scale).all():
            return f"gradient of tensor {index} is off by up to {error_grad.max().item():.3g}"
    return None
