"""Tiles of a weight on GPUs whose lanes keep to one channel, and sums of products over them.

In storage order a dense weight is outer x channels x inner: the dimensions with a larger stride
than the channels', the channels, and the dimensions with a smaller one.

- By row, a program walks along a run of `inner` neighbours: it has one channel.
- By column, it walks down the weight as a matrix with rows of `stride` elements, a multiple of
  channels * inner: each lane has one channel.

So a program finds channels and their masks once. It reads and writes vectors of VECTOR elements,
aligned whatever the sizes are. Elements whose vector reaches beyond the run, or the weight, are
edges: each is read alone.
"""

import triton
import triton.language as tl
from pdp_kernels.triton_kernels.soft_mask import PTX

VECTOR = tl.constexpr(8)  # 16 bytes of 16-bit elements

# Arguments that compile no kernel anew: sizes, and pointers of any alignment.
SIZES = ("channels", "inner", "numel", "stride", "steps", "terms", "divisor")
UNALIGNED = ("norms_ptr", "threshold_ptr", "tau_ptr", "grad_mask_ptr")


@triton.jit
def range_of_program(channels, inner, numel, BY_ROW: tl.constexpr):
    """Return the range [begin, end) of elements that this program's row or strip may read."""
    begin = tl.zeros((), tl.int64)
    end = numel
    if BY_ROW:
        begin += tl.program_id(0) * inner
        end = begin + inner
    return begin, end


@triton.jit
def channel_of_lanes(channels, inner, BY_ROW: tl.constexpr, TILE: tl.constexpr):
    """Return the program's channel by row, and the channel of each lane by column."""
    if BY_ROW:
        return tl.program_id(0) % channels.to(tl.int32)
    else:
        columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
        return columns // inner.to(tl.int32) % channels.to(tl.int32)


@triton.jit
def walk_of_program(
    begin, end, stride, BY_ROW: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr
):
    """Return (begin, stride, lanes, since, until), by which `tile_at` finds a program's tiles.

    Places count them from the one at begin, by row, or in row 0, by column. The lanes are offsets
    from a tile's first element; of lanes (GROUPS, TILE), each group is one place ahead of the group
    before. At place p a lane's vector is inside the range if since <= p < until.
    """
    width: tl.constexpr = TILE // VECTOR
    lanes = tl.arange(0, TILE)
    if GROUPS > 1:
        lanes = lanes[None, :]
    vectors = lanes // VECTOR
    if BY_ROW:
        count = end // VECTOR - begin // VECTOR
        since = ((vectors == 0) & (begin % VECTOR != 0)).to(tl.int32)
        until = (count // width).to(tl.int32) + (vectors < count % width).to(tl.int32)
    else:
        columns = tl.program_id(0) * width + vectors
        count, row = end // VECTOR, stride // VECTOR
        since = tl.zeros_like(vectors)
        until = (count // row).to(tl.int32) + (columns < count % row).to(tl.int32)
        until = tl.where(columns < row.to(tl.int32), until, 0)
    if GROUPS > 1:
        group = tl.arange(0, GROUPS)[:, None]
        lanes = group * (stride // VECTOR * VECTOR) + lanes
        since, until = since - group, until - group
    return begin, stride, lanes, since, until


@triton.jit
def tile_at(walk, place, BY_ROW: tl.constexpr, TILE: tl.constexpr):
    """Return the offsets of a walk's lanes at a place, and which are inside its range."""
    begin, stride, lanes, since, until = walk
    if BY_ROW:
        first = begin // VECTOR + place * (TILE // VECTOR)
    else:
        first = place * (stride // VECTOR) + tl.program_id(0) * (TILE // VECTOR)
    return first * VECTOR + lanes, (since <= place) & (place < until)


@triton.jit
def read_pair(left_ptr, right_ptr, offsets, inside, BOTH: tl.constexpr):
    """Return elements of two tensors, 0 where they are not inside. Unless BOTH, the right twice."""
    right = tl.load(right_ptr + offsets, mask=inside, other=0)
    if BOTH:
        return tl.load(left_ptr + offsets, mask=inside, other=0), right
    else:
        return right, right


@triton.jit
def read_tiles(
    left_ptr,
    right_ptr,
    walk,
    place,
    BY_ROW: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNT: tl.constexpr,
    BOTH: tl.constexpr,
):
    """Return COUNT pairs of tiles from a place on. All their loads come before the first store."""
    tiles = ()
    for i in tl.static_range(COUNT):
        offsets, inside = tile_at(walk, place + i * GROUPS, BY_ROW, TILE)
        tiles += (read_pair(left_ptr, right_ptr, offsets, inside, BOTH),)
    return tiles


@triton.jit
def edges_of(begin, end):
    """Return the offsets in the vectors at begin and end, and which are edges.

    Edges are the elements of [begin, end) whose vectors reach beyond.
    """
    index = tl.arange(0, 2 * VECTOR)
    first = begin // VECTOR * VECTOR
    last = end // VECTOR * VECTOR
    offsets = tl.where(index < VECTOR, first, last - VECTOR) + index
    inside = (offsets >= begin) & (offsets < end)
    at_end = (last != first) | (begin == first)
    return offsets, inside & tl.where(index < VECTOR, begin != first, at_end)


@triton.jit
def edges_of_last_row(end, stride, rows, TILE: tl.constexpr, GROUPS: tl.constexpr):
    """Return the lanes' offsets in the weight's last row, by column, and which are edges.

    Only the first group of the piece that reads the last row, of pieces of so many rows, has edges.
    """
    last = end // VECTOR * VECTOR
    row = last // stride
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
    offsets = row * stride + columns
    inside = (offsets >= last) & (offsets < end) & (columns < stride)
    inside &= tl.arange(0, GROUPS)[:, None] == 0
    return offsets, inside & (row // rows == tl.program_id(1))


@triton.jit
def _add(sums, errors, values):
    """Return (sums, errors) with the values added to their sum, by Knuth's exact sum of two."""
    if sums.dtype == tl.float64:
        return sums + values, errors
    else:
        total = sums + values
        added = total - sums
        return total, errors + ((sums - (total - added)) + (values - added))


@triton.jit
def _exact_product(left, right):
    """Return left * right in float32, and what rounding loses of it.

    The product is rounded before anything is added to it. A compiler may fuse a plain one with the
    sums of `_add`, so that what it loses is in their errors already.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            """
            {
              .reg .f32 negative;
              mul.rn.f32 $0, $2, $3;
              neg.f32 negative, $0;
              fma.rn.f32 $1, $2, $3, negative;
            }
            """,
            "=&f,=&f,f,f",
            [left, right],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:  # the interpreter's fma rounds twice; no compiler fuses a conversion with a sum
        exact = left.to(tl.float64) * right.to(tl.float64)
        product = exact.to(tl.float32)
        return product, (exact - product).to(tl.float32)


@triton.jit
def _product(errors, left, right, scale):
    """Return left * right * scale, and the errors with the rounding error of the product."""
    if errors.dtype == tl.float64:
        return left.to(tl.float64) * right.to(tl.float64), errors
    else:
        product, lost = _exact_product(left.to(tl.float32), right.to(tl.float32) * scale)
        return product, errors + lost


@triton.jit
def add_products(sums, errors, tiles, scale):
    """Return (sums, errors) with left * right * scale of pairs of tiles added to their sum.

    Weights of 16 bits have gradients of 16 bits, for which a chain of a few products in float32 is
    exact enough.
    """
    if sums.dtype == tl.float32 and tiles[0][1].dtype.primitive_bitwidth == 16:
        chain = tl.zeros_like(sums)
        for i in tl.static_range(len(tiles)):
            chain += tiles[i][0].to(tl.float32) * (tiles[i][1].to(tl.float32) * scale)
        sums, errors = _add(sums, errors, chain)
    else:
        for i in tl.static_range(len(tiles)):
            product, errors = _product(errors, tiles[i][0], tiles[i][1], scale)
            sums, errors = _add(sums, errors, product)
    return sums, errors
