"""2:4 groups: PyTorch's own ways to mask and to pack them, ours, and what both are checked with.

A weight is taken as rows of 3,072 or 4,096, as the linear layers of a transformer have them, or of
64, whichever its size allows first; groups lie along the rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from benchmarks.batches import Batch
from benchmarks.masks import Mask
from benchmarks.truth import CHUNK, TOLERANCE
from pdp_kernels import compress_2to4, pdp_mask_nm

COLUMNS = (3072, 4096, 64)

# Packing works on blocks of this many rows.
ROWS = 32

Packed = tuple[Tensor, Tensor]


def as_matrix(weight: Tensor) -> Tensor:
    """The weight as a matrix that can be packed, or else as one row: a view, through which
    gradients flow back."""
    fitting = (columns for columns in COLUMNS if weight.numel() % (ROWS * columns) == 0)
    return weight.view(-1, next(fitting, weight.numel()))


def eager_mask(weight: Tensor, mask: Mask) -> Tensor:
    """Eq. 1 with a threshold in each group of four: reshape, topk, sigmoid."""
    return _eager_mask(weight, mask.tau, mask.relative, mask.out_dtype)


def _eager_mask(
    weight: Tensor, tau: float | Tensor, relative: bool, out_dtype: torch.dtype
) -> Tensor:
    groups = weight.float().unflatten(-1, (-1, 4))
    largest = groups.detach().abs().topk(3).values
    t = (largest[..., 1:2] + largest[..., 2:3]) / 2
    if relative:
        tau = tau * t * t
    mask = torch.sigmoid((groups * groups - t * t) / tau)
    return (mask * groups).flatten(-2).to(out_dtype)


_compiled = torch.compile(_eager_mask, dynamic=True)


def compiled_mask(weight: Tensor, mask: Mask) -> Tensor:
    return _compiled(weight, mask.tau, mask.relative, mask.out_dtype)


def our_mask(weight: Tensor, mask: Mask) -> Tensor:
    return pdp_mask_nm(weight, 2, 4, **mask.arguments)


def forward_backward(
    mask: Callable[[Tensor, Batch], Tensor], view: Callable[[Tensor], Tensor] = as_matrix
):
    """Provider of (masked weights, gradients): mask(weight, batch), with weights seen through
    `view`."""

    def prepare(batch: Batch):
        grads = [view(grad) for grad in batch.grads]

        def run():
            masked = [mask(view(weight), batch) for weight in batch.weights]
            return masked, torch.autograd.grad(masked, batch.weights, grads)

        return run

    return prepare


def pack(convert: Callable[[Tensor], Packed]):
    """Provider of packed weights, in bfloat16 whatever the batch is in."""

    def prepare(batch: Batch):
        matrices = [as_matrix(weight.detach().bfloat16()) for weight in batch.weights]
        return lambda: [convert(matrix) for matrix in matrices]

    return prepare


def eager_pack(matrix: Tensor) -> Packed:
    """torch's conversion, which takes a matrix that is 2:4 already."""
    smallest = matrix.unflatten(-1, (-1, 4)).abs().topk(2, largest=False).indices
    pruned = matrix.unflatten(-1, (-1, 4)).scatter(-1, smallest, 0).flatten(-2)
    return sparse_semi_structured_from_dense_cutlass(pruned)


PACKERS = {"eager": pack(eager_pack), "ours": pack(compress_2to4)}
MASKS = {
    "eager": forward_backward(lambda weight, batch: eager_mask(weight, batch.mask)),
    "compiled": forward_backward(lambda weight, batch: compiled_mask(weight, batch.mask)),
    "ours": forward_backward(lambda weight, batch: our_mask(weight, batch.mask)),
}


def check_masks(batch: Batch, answer: tuple) -> str | None:
    """Masked weights and gradients against float64, chunk by chunk."""
    for index, (weight, grad, w_hat, own) in enumerate(
        zip(batch.weights, batch.grads, *answer, strict=True)
    ):
        chunk = CHUNK[weight.device.type]
        flat = (x.detach().reshape(-1).split(chunk) for x in (weight, grad, w_hat, own))
        for w, g, got, got_grad in zip(*flat, strict=True):
            groups = w.double().view(-1, 4)
            ordered = groups.abs().sort().values
            t = (ordered[:, 1:2] + ordered[:, 2:3]) / 2
            tau = batch.mask.temperature(t)
            m = torch.sigmoid((groups * groups - t * t) / tau)
            factor = m + 2 * groups * groups / tau * m * (1 - m)
            error = (got.double().view(-1, 4) - m * groups).abs()
            error_grad = (got_grad.double().view(-1, 4) - g.double().view(-1, 4) * factor).abs()
            size = g.double().view(-1, 4).abs() * (1 + factor)
            if not (error <= TOLERANCE[w_hat.dtype] * groups.abs()).all():
                return f"w_hat of tensor {index} is off by up to {error.max().item():.3g}"
            if not (error_grad <= TOLERANCE[weight.dtype] * size).all():
                return f"gradient of tensor {index} is off by up to {error_grad.max().item():.3g}"
    return None


def check_packed(batch: Batch, answer: list[Packed]) -> str | None:
    """Unpacked by torch: weights at their own places, in each group the two largest (of equal ones
    providers may keep either)."""
    for index, (weight, packed) in enumerate(zip(batch.weights, answer, strict=True)):
        matrix = as_matrix(weight.detach().bfloat16())
        dense = sparse_semi_structured_to_dense_cutlass(*packed)
        if not ((dense == 0) | (dense == matrix)).all():
            return f"packed tensor {index} has weights that do not stand there"
        kept = dense.view(-1, 4).abs().double().sum(-1)
        largest = matrix.view(-1, 4).abs().double().topk(2).values.sum(-1)
        if not torch.equal(kept, largest):
            return f"packed tensor {index} keeps other weights than the two largest"
    return None
