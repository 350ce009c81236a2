"""2:4 compression on GPUs: one pass prunes and packs a matrix, and moves 3.125 bytes per weight.

The layout is that of pdp_kernels/ops/reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program packs 32 rows x 64 columns: complete metadata blocks, and loads of 16 bytes. On an
# H100 10^8 weights run at 2.7 TB/s, where a copy has 3.0. Other sizes are not yet measured.
ROWS = 32
COLUMNS = 64
NUM_WARPS = 4

# The key of every NaN: the bits of infinity plus 1.
NAN = {torch.bfloat16: 0x7F81, torch.float16: 0x7C01}


@triton.jit
def _key(bits, INDEX: tl.constexpr, NAN: tl.constexpr):
    """Return the magnitude above three bits that break ties, so that the highest index is kept.

    A zero at index 2 beats one at 3: torch, too, pairs a single nonzero at 0 or 1 with index 2.
    """
    key = (tl.minimum(bits.to(tl.int32) & 0x7FFF, NAN) << 3) | INDEX
    return tl.maximum(key, 6) if INDEX == 2 else key


@triton.jit
def _compress_2to4_kernel(
    weight_ptr,
    values_ptr,
    metadata_ptr,
    rows,
    cols,
    NAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = cols // COLUMNS
    row_tile = tl.program_id(0).to(tl.int64) // tiles
    column_tile = tl.program_id(0).to(tl.int64) % tiles
    row = row_tile * ROWS + tl.arange(0, ROWS)[:, None]
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    weight = tl.load(weight_ptr + row * cols + column)

    even, odd = tl.split(tl.reshape(weight, (ROWS, COLUMNS // 4, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    a, b, c, d = _key(w0, 0, NAN), _key(w1, 1, NAN), _key(w2, 2, NAN), _key(w3, 3, NAN)
    high_ab, high_cd = tl.maximum(a, b), tl.maximum(c, d)
    largest = tl.maximum(high_ab, high_cd) & 3
    # The second largest was compared with the largest: within a pair, or between the pairs.
    losers = tl.maximum(tl.minimum(a, b), tl.minimum(c, d))
    runner_up = tl.maximum(tl.minimum(high_ab, high_cd), losers) & 3
    first, second = tl.minimum(largest, runner_up), tl.maximum(largest, runner_up)
    lower = tl.where(first == 0, w0, tl.where(first == 1, w1, w2))
    upper = tl.where(second == 1, w1, tl.where(second == 2, w2, w3))
    values = tl.reshape(tl.join(lower, upper), (ROWS, COLUMNS // 2))
    column = column_tile * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
    tl.store(values_ptr + row * (cols // 2) + column, values)

    # Rows are (half, quarter, lane). The 64 words of one pair of columns become contiguous.
    places = tl.reshape(first | (second << 2), (ROWS, COLUMNS // 16, 4))
    words = tl.sum(places << (4 * tl.arange(0, 4))[None, None, :], axis=2)
    words = tl.reshape(words, (2, 2, 8, COLUMNS // 32, 2))
    words = tl.reshape(tl.permute(words, (3, 2, 0, 4, 1)), (COLUMNS // 32, 2 * ROWS))
    pair = column_tile * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)[:, None]
    offset = pair * (2 * rows) + row_tile * (2 * ROWS) + tl.arange(0, 2 * ROWS)[None, :]
    tl.store(metadata_ptr + offset, words.to(tl.int16))


def compress_2to4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Implement pdp::compress_2to4; arguments as reference.compress_2to4."""
    weight = weight.contiguous()
    rows, cols = weight.shape
    values = weight.new_empty(rows, cols // 2)
    metadata = weight.new_empty(rows, cols // 16, dtype=torch.int16)
    with torch.cuda.device_of(weight):
        _compress_2to4_kernel[(rows // ROWS * (cols // COLUMNS),)](
            weight.view(torch.int16),
            values.view(torch.int16),
            metadata,
            rows,
            cols,
            NAN=NAN[weight.dtype],
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=NUM_WARPS,
        )
    return values, metadata
