"""Compression to 2:4 for sparse tensor cores."""

import torch
from torch import Tensor

from pdp_kernels.functional.validation import check_plain_weight
from pdp_kernels.ops.arguments import COMPRESSED_COLUMNS, COMPRESSED_ROWS

COMPRESSED_DTYPES = (torch.bfloat16, torch.float16)


def compress_2to4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Prune a matrix to its hard 2:4 form and pack it for sparse tensor cores, in one pass.

    Of every 4 consecutive weights of a row the 2 of largest magnitude are kept. Of equal ones the
    lowest index is pruned first, and NaN counts as the largest, as in `hard_mask`. The result
    equals that of PyTorch's CUTLASS backend for this matrix, bit for bit
    (torch/sparse/_semi_structured_conversions.py):

        values[r, 2 g], values[r, 2 g + 1]  = weight[r, 4 g + i], weight[r, 4 g + j],   i < j
        i | j << 2                          is 4 of the 16 bits of a metadata word

    i and j are the positions of the kept weights. A kept zero does not count: a group with one
    nonzero, at position p, has (0, 2), (1, 2), (2, 3) or (2, 3) for p = 0, 1, 2, 3, and a group of
    zeros (2, 3). A zero among the values has the sign of the weight at its position, as after
    weight * mask. A NaN keeps its payload, which PyTorch's conversion may rewrite.

    Args:
        weight: (rows, cols), bfloat16 or float16; rows a multiple of 32, cols of 64. Layouts other
            than row-major are copied once. Sparse tensor cores hold float32 as 1:2, not 2:4, so
            float32 is refused.

    Returns:
        The pair (values, metadata), of shapes (rows, cols / 2) and (rows, cols / 16). Values have
        the weight's dtype. Metadata is int16, in the order in which CUTLASS reads it: the words of
        32 rows x 2 columns lie together. They are the `packed` and `meta` of
        torch.sparse.SparseSemiStructuredTensorCUTLASS. No gradient flows through them.

    Raises:
        TypeError: weight is no dense tensor of bfloat16 or float16, or a DTensor.
        ValueError: weight has another shape.

    Examples:
        >>> weight = torch.tensor([1.0, -4.0, 3.0, 2.0]).half().tile(32, 16)
        >>> values, metadata = compress_2to4(weight)
        >>> values[0, :4]
        tensor([-4.,  3., -4.,  3.], dtype=torch.float16)
        >>> hex(metadata[0, 0] & 0xF)  # positions 1 and 2
        '0x9'
    """
    check_plain_weight("weight", weight)
    if weight.dtype not in COMPRESSED_DTYPES:
        raise TypeError(
            f"weight must have dtype torch.bfloat16 or torch.float16, got {weight.dtype}"
        )
    if not has_compressed_shape(weight):
        raise ValueError(
            "weight must have shape (rows, cols), rows a positive multiple of "
            f"{COMPRESSED_ROWS} and cols of {COMPRESSED_COLUMNS}, got {tuple(weight.shape)}"
        )
    return torch.ops.pdp.compress_2to4(weight.detach())


def has_compressed_shape(weight: Tensor) -> bool:
    """Whether `compress_2to4` takes a weight of this shape."""
    if weight.dim() != 2 or weight.numel() == 0:
        return False
    rows, cols = weight.shape
    return rows % COMPRESSED_ROWS == 0 and cols % COMPRESSED_COLUMNS == 0
