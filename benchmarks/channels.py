"""Channel masks: PyTorch's own way, ours, and what both are checked with.

Channels are those of dim 0; a weight of one dimension is taken as rows of 3,072 where its size
allows, and as one row otherwise. Providers find the threshold of the norms too.
"""

import torch
from torch import Tensor

from benchmarks.batches import Batch, prune_count
from benchmarks.eager import kthvalue_threshold
from benchmarks.groups import as_matrix, forward_backward
from benchmarks.truth import TOLERANCE
from pdp_kernels import pdp_mask_channel

# In units of the norm squared, which is near 1: of 1,000 weights of 0.03, say.
TAU = 1e-2


def with_channels(weight: Tensor) -> Tensor:
    return weight if weight.dim() > 1 else as_matrix(weight)


def norms_of(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.float(), dim=list(range(1, weight.dim())))


def threshold_of(norms: Tensor, sparsity: float) -> Tensor:
    if not 0 < prune_count(len(norms), sparsity) < len(norms):
        return norms.new_full((), float("-inf"))  # of one channel or two
    return kthvalue_threshold(norms, sparsity)


def soft_mask(weight: Tensor, norms: Tensor, threshold: Tensor) -> Tensor:
    mask = torch.sigmoid((norms - threshold) * (norms + threshold.abs()) / TAU)
    return (mask.view(-1, *[1] * (weight.dim() - 1)) * weight).to(weight.dtype)


def eager_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Eq. 1 with norms: vector_norm, kthvalue, sigmoid, multiply."""
    norms = norms_of(weight)
    return soft_mask(weight, norms, threshold_of(norms.detach(), sparsity))


# As above but for the threshold, which kthvalue finds outside.
compiled = torch.compile(lambda weight, t: soft_mask(weight, norms_of(weight), t), dynamic=True)


def compiled_mask(weight: Tensor, sparsity: float) -> Tensor:
    return compiled(weight, threshold_of(norms_of(weight.detach()), sparsity))


def our_mask(weight: Tensor, sparsity: float) -> Tensor:
    return pdp_mask_channel(weight, sparsity, tau=TAU)


MASKS = {
    "eager": forward_backward(eager_mask, with_channels),
    "compiled": forward_backward(compiled_mask, with_channels),
    "ours": forward_backward(our_mask, with_channels),
}


def check_masks(batch: Batch, answer: tuple) -> str | None:
    """Masked weights and gradients against float64, weight by weight."""
    for index, (weight, grad, w_hat, own) in enumerate(
        zip(batch.weights, batch.grads, *answer, strict=True)
    ):
        w, g = (with_channels(x.detach()).double().flatten(1) for x in (weight, grad))
        t = threshold_of(norms_of(with_channels(weight.detach())), batch.sparsity).double()
        squares = w.square().sum(1, keepdim=True)
        m = torch.sigmoid((squares - t * t.abs()) / TAU)
        pull = 2 / TAU * m * (1 - m) * (g * w).sum(1, keepdim=True)
        size = g.abs() + (pull * w).abs() + squares.sqrt()
        tolerance = TOLERANCE[weight.dtype]
        error = (w_hat.detach().double().view_as(w) - m * w).abs()
        error_grad = (own.double().view_as(w) - m * g - pull * w).abs()
        if not (error <= tolerance * squares.sqrt()).all():
            return f"w_hat of tensor {index} is off by up to {error.max().item():.3g}"
        if not (error_grad <= tolerance * size).all():
            return f"gradient of tensor {index} is off by up to {error_grad.max().item():.3g}"
    return None
