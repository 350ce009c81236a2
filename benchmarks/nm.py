"""2:4 masks and packing: PyTorch's own ways, ours, and their checks.

A weight is seen as rows of 3,072, 4,096 or 64 weights, whichever its size allows first. Linear
layers of transformers have such rows. Groups lie along the rows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from benchmarks import eager, oracle
from benchmarks.batches import Batch
from benchmarks.masks import Mask
from pdp_kernels import compress_2to4, pdp_mask_nm

COLUMNS = (3072, 4096, 64)

# Packing works on blocks of this many rows.
ROWS = 32
SMALLEST = (ROWS, min(COLUMNS))  # a matrix that can be packed

Packed = tuple[Tensor, Tensor]
Gradients = tuple[Sequence[Tensor], Sequence[Tensor]]


def as_matrix(weight: Tensor) -> Tensor:
    """Return the weight as a matrix that can be packed, or else as one row.

    The result is a view, which passes gradients on, unless the weight is such a matrix itself.
    """
    if weight.dim() == 2 and weight.shape[0] % ROWS == 0 and weight.shape[1] in COLUMNS:
        return weight
    fitting = (columns for columns in COLUMNS if weight.numel() % (ROWS * columns) == 0)
    return weight.view(-1, next(fitting, weight.numel()))


def eager_mask(weight: Tensor, mask: Mask) -> Tensor:
    """Return Eq. 1 with a threshold for each group of four: reshape, topk, sigmoid."""
    return _eager_mask(weight, mask.tau, mask.relative, mask.out_dtype)


def _eager_mask(
    weight: Tensor, tau: float | Tensor, relative: bool, out_dtype: torch.dtype
) -> Tensor:
    groups = weight.float().unflatten(-1, (-1, 4))
    largest = groups.detach().abs().topk(3).values
    thresholds = (largest[..., 1:2] + largest[..., 2:3]) / 2
    return eager.masked_weight(groups, thresholds, tau, relative, out_dtype).flatten(-2)


_compiled = torch.compile(_eager_mask, dynamic=True)


def compiled_mask(weight: Tensor, mask: Mask) -> Tensor:
    """Return the same through torch.compile."""
    return _compiled(weight, mask.tau, mask.relative, mask.out_dtype)


def our_mask(weight: Tensor, mask: Mask) -> Tensor:
    """Return the masked weight by `pdp_mask_nm`."""
    return pdp_mask_nm(weight, 2, 4, **mask.arguments)


def forward_backward(
    mask: Callable[[Tensor, Batch], Tensor], view: Callable[[Tensor], Tensor] = as_matrix
) -> Callable[[Batch], Callable[[], Gradients]]:
    """Return a provider of masked weights and gradients.

    Args:
        mask: Masks a weight of the batch.
        view: The view of a weight that `mask` gets.
    """

    def prepare(batch: Batch) -> Callable[[], Gradients]:
        grads = [view(grad) for grad in batch.grads]

        def run() -> Gradients:
            masked = [mask(view(weight), batch) for weight in batch.weights]
            return masked, torch.autograd.grad(masked, batch.weights, grads)

        return run

    return prepare


def pack(convert: Callable[[Tensor], Packed]) -> Callable[[Batch], Callable[[], list[Packed]]]:
    """Return a provider of packed weights, always in bfloat16."""

    def prepare(batch: Batch) -> Callable[[], list[Packed]]:
        matrices = [as_matrix(weight.detach().bfloat16()) for weight in batch.weights]
        return lambda: [convert(matrix) for matrix in matrices]

    return prepare


def eager_pack(matrix: Tensor) -> Packed:
    """Prune to 2:4 and pack by torch's conversion, which expects a 2:4 matrix."""
    smallest = matrix.unflatten(-1, (-1, 4)).abs().topk(2, largest=False).indices
    pruned = matrix.unflatten(-1, (-1, 4)).scatter(-1, smallest, 0).flatten(-2)
    return sparse_semi_structured_from_dense_cutlass(pruned)


PACKERS = {"eager": pack(eager_pack), "ours": pack(compress_2to4)}
MASKS = {
    "eager": forward_backward(lambda weight, batch: eager_mask(weight, batch.mask)),
    "compiled": forward_backward(lambda weight, batch: compiled_mask(weight, batch.mask)),
    "ours": forward_backward(lambda weight, batch: our_mask(weight, batch.mask)),
}


def group_thresholds(w: Tensor, t: Tensor) -> Tensor:
    """Return for each weight the threshold of its group of four."""
    ordered = w.view(-1, 4).abs().sort().values
    return ((ordered[:, 1] + ordered[:, 2]) / 2).repeat_interleave(4)


def check_masks(batch: Batch, answer: Gradients) -> str | None:
    """Return what is wrong with masked weights and gradients, or None."""
    masked, gradients = answer
    masked = [w_hat.view_as(weight) for w_hat, weight in zip(masked, batch.weights, strict=True)]
    return oracle.check_forward_backward(batch, (masked, gradients), group_thresholds)


def check_packed(batch: Batch, answer: list[Packed]) -> str | None:
    """Return what is wrong with packed weights, or None.

    Unpacked by torch, weights must be in their places, the two largest of each group. Where
    magnitudes are equal, providers may keep either.
    """
    for index, (weight, packed) in enumerate(zip(batch.weights, answer, strict=True)):
        matrix = as_matrix(weight.detach().bfloat16())
        dense = sparse_semi_structured_to_dense_cutlass(*packed)
        if not ((dense == 0) | (dense == matrix)).all():
            return f"packed tensor {index} has weights in the wrong place"
        kept = dense.view(-1, 4).abs().double().sum(-1)
        largest = matrix.view(-1, 4).abs().double().topk(2).values.sum(-1)
        if not torch.equal(kept, largest):
            return f"packed tensor {index} does not keep the two largest weights of each group"
    return None
