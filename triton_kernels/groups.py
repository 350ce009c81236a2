"""N:M groups on GPUs: where a program finds them, and how their members are read, sorted, written.

A thread holds groups as M vectors: vector j has member j of each group. In a dense layout the
elements of a dimension are `stride` apart, and the dimensions below it fill [0, stride). So a
weight is made of rows of M stride elements: member j of the group in column c is at j stride + c.

A kernel has three ways to access memory, each a variant that Triton compiles on its own. Sizes,
strides and addresses make no others.

    "groups"    members are neighbours, and M is a power of two: a whole group at a time
    "columns"   members lie apart, groups are neighbours: eight groups at a time
    "elements"  whatever the sizes, strides and addresses are: element by element
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl
from pdp_kernels.triton_kernels.soft_mask import store
from torch import Tensor

SIZES = ("rows", "stride", "width", "rows_per_tile", "reciprocal_width")
WIDEST = tl.constexpr(16)  # bytes of an access
NEIGHBOURS = tl.constexpr(8)  # groups that "columns" accesses together: 16 bytes of 16-bit weights
MAX_GRID = 65535  # of the second and third dimension
# Quotients of places are exact for products of place and width below 2^20.
RECIPROCAL_BITS = tl.constexpr(20)
MAX_GROUPS = 1024


def group_kernel(*pointers: str) -> Callable[[Callable[..., None]], Any]:
    """Return a decorator of kernels that sizes and addresses make no variants of."""
    return triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=pointers)


class Tiling(NamedTuple):
    """The launch grid, and the arguments of a kernel that tell it where its groups are."""

    grid: tuple[int, int, int]
    arguments: dict[str, int | str]


def tiling(m: int, dim: int, tensors: list[Tensor], block: int, num_warps: int) -> Tiling:
    """Return the tiling of dense tensors with the same strides into blocks of some elements."""
    weight = tensors[0]
    # Groups of one may be in any order. (The stride of a dimension of size 1 is arbitrary.)
    stride = weight.stride(dim) if m > 1 else 1
    aligned = all(tensor.data_ptr() % WIDEST.value == 0 for tensor in tensors)
    # A thread has whole groups.
    groups = min(MAX_GROUPS, max(block // triton.next_power_of_2(m), 32 * num_warps))
    return _tiling(weight.numel() // (m * stride), stride, m, aligned, groups)


@functools.lru_cache(maxsize=4096)
def _tiling(rows: int, stride: int, m: int, aligned: bool, groups: int) -> Tiling:
    if aligned and stride == 1 and m == triton.next_power_of_2(m):
        access, width, rows_per_tile = "groups", 1, groups
        grid = (triton.cdiv(rows, groups), 1, 1)
    else:
        step = NEIGHBOURS.value if aligned and stride % NEIGHBOURS.value == 0 else 1
        access = "elements" if step == 1 else "columns"
        width = _tile_width(stride, groups, step)
        rows_per_tile = groups // width
        tiles = triton.cdiv(rows, rows_per_tile)
        depth = triton.cdiv(tiles, MAX_GRID)
        grid = (triton.cdiv(stride, width), triton.cdiv(tiles, depth), depth)
    arguments = {
        "rows": rows,
        "stride": stride,
        "width": width,
        "rows_per_tile": rows_per_tile,
        "reciprocal_width": triton.cdiv(1 << RECIPROCAL_BITS.value, width),
        "M": m,
        "GROUPS": groups,
        "ACCESS": access,
    }
    return Tiling(grid, arguments)


def _tile_width(stride: int, groups: int, step: int) -> int:
    """Return the number of columns, a multiple of `step`, that leaves fewest places unused.

    A tile has as many rows of this width as its places have room for.
    """
    fewest = triton.cdiv(stride, groups)  # tiles beside each other
    widths = [
        triton.cdiv(triton.cdiv(stride, tiles), step) * step for tiles in range(fewest, fewest + 8)
    ]
    return min(widths, key=lambda width: triton.cdiv(stride, width) / (groups // width))


@triton.jit
def group_places(
    rows,
    stride,
    width,
    rows_per_tile,
    reciprocal_width,
    M: tl.constexpr,
    GROUPS: tl.constexpr,
    ACCESS: tl.constexpr,
):
    """Return where the groups of this program are.

    Returns:
        The offset of the tile, the offsets of its groups from there, (GROUPS,), which of them
        exist, and the stride of their members.
    """
    place = tl.arange(0, GROUPS)
    tile = tl.program_id(0).to(tl.int64)
    if ACCESS == "groups":
        exists = place < tl.minimum(rows - tile * GROUPS, GROUPS).to(tl.int32)
        return tile * GROUPS * M, place * M, exists, stride
    else:
        first_column = tile * width
        above = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        first_row = above * rows_per_tile
        row = (place * reciprocal_width) >> RECIPROCAL_BITS  # place // width
        column = place - row * width
        exists = row < tl.minimum(rows - first_row, rows_per_tile).to(tl.int32)
        exists &= column < tl.minimum(stride - first_column, width).to(tl.int32)
        offsets = row * (stride * M) + column
        if ACCESS == "columns":
            offsets = tl.max_contiguous(tl.multiple_of(offsets, NEIGHBOURS), NEIGHBOURS)
            exists = tl.max_constancy(exists, NEIGHBOURS)
        return first_row * stride * M + first_column, offsets, exists, stride


@triton.jit
def _group_pointers(ptr, start, offsets, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Return pointers to some members of each group, (GROUPS, WIDTH)."""
    member = CHUNK * WIDTH + tl.arange(0, WIDTH)
    return tl.multiple_of(ptr + start, WIDEST) + (offsets[:, None] + member[None, :])


@triton.jit
def _member_pointers(ptr, start, offsets, stride, MEMBER: tl.constexpr, ACCESS: tl.constexpr):
    """Return pointers to one member of each group, (GROUPS,)."""
    # int64, because the last member may be more than 2^31 elements behind the first.
    first = ptr + (start + MEMBER * stride.to(tl.int64))
    if ACCESS == "columns":
        BYTES: tl.constexpr = max(1, ptr.dtype.element_ty.primitive_bitwidth // 8)
        first = tl.multiple_of(first, min(WIDEST, NEIGHBOURS * BYTES))
    return first + offsets


@triton.jit
def load_members(ptr, places, DTYPE: tl.constexpr, M: tl.constexpr, ACCESS: tl.constexpr):
    """Return the members of each group in a dtype: M vectors (GROUPS,)."""
    start, offsets, exists, stride = places
    members = ()
    if ACCESS == "groups":
        WIDTH: tl.constexpr = min(M, WIDEST * 8 // max(8, ptr.dtype.element_ty.primitive_bitwidth))
        for chunk in tl.static_range(M // WIDTH):
            pointers = _group_pointers(ptr, start, offsets, chunk, WIDTH)
            matrix = tl.load(pointers, mask=exists[:, None])
            members = members + _columns(matrix.to(DTYPE))
    else:
        for j in tl.static_range(M):
            pointers = _member_pointers(ptr, start, offsets, stride, j, ACCESS)
            members = members + (tl.load(pointers, mask=exists).to(DTYPE),)
    return members


@triton.jit
def store_members(ptr, values, places, ACCESS: tl.constexpr):
    """Store a value for each member of each group: M vectors (GROUPS,)."""
    start, offsets, exists, stride = places
    M: tl.constexpr = len(values)
    if ACCESS == "groups":
        WIDTH: tl.constexpr = min(M, WIDEST * 8 // max(8, ptr.dtype.element_ty.primitive_bitwidth))
        for chunk in tl.static_range(M // WIDTH):
            pointers = _group_pointers(ptr, start, offsets, chunk, WIDTH)
            matrix = _matrix(values[chunk * WIDTH : (chunk + 1) * WIDTH])
            store(pointers, matrix, exists[:, None])
    else:
        for j in tl.static_range(M):
            pointers = _member_pointers(ptr, start, offsets, stride, j, ACCESS)
            store(pointers, values[j], exists)


@triton.jit
def _columns(matrix):
    """Return the columns of a matrix whose rows are in one thread each."""
    if matrix.shape[1] == 1:
        return (tl.reshape(matrix, (matrix.shape[0],)),)
    else:
        halves = tl.reshape(matrix, (matrix.shape[0], 2, matrix.shape[1] // 2))
        left, right = tl.split(tl.trans(halves, (0, 2, 1)))
        return _columns(left) + _columns(right)


@triton.jit
def _matrix(columns):
    """Return the matrix that has these columns."""
    if len(columns) == 1:
        return tl.expand_dims(columns[0], 1)
    else:
        left = _matrix(columns[: len(columns) // 2])
        right = _matrix(columns[len(columns) // 2 :])
        halves = tl.trans(tl.join(left, right), (0, 2, 1))
        return tl.reshape(halves, (halves.shape[0], len(columns)))


@triton.jit
def sort_members(keys, M: tl.constexpr):
    """Return M vectors of integers sorted against each other, the smallest first.

    The comparators are those of Batcher's merge exchange: Knuth, TAOCP 3, 5.2.2, Algorithm M.
    """
    LEVELS: tl.constexpr = (M - 1).bit_length()
    TOP: tl.constexpr = (1 << LEVELS) // 2
    for level in tl.static_range(LEVELS):
        keys = _compare(keys, TOP >> level, 0, TOP >> level)
        for step in tl.static_range(level):
            keys = _compare(keys, TOP >> level, TOP >> level, (TOP >> step) - (TOP >> level))
    return keys


@triton.jit
def _compare(keys, BIT: tl.constexpr, SET: tl.constexpr, DISTANCE: tl.constexpr):
    """Sort keys i and i + DISTANCE against each other, for all i with i & BIT = SET."""
    for i in tl.static_range(len(keys) - DISTANCE):
        if (i & BIT) == SET:
            low = tl.minimum(keys[i], keys[i + DISTANCE])
            high = tl.maximum(keys[i], keys[i + DISTANCE])
            between = keys[i + 1 : i + DISTANCE]
            keys = keys[:i] + (low,) + between + (high,) + keys[i + DISTANCE + 1 :]
    return keys
