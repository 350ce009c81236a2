"""Triton kernels of N:M groups have one place for each group, and address it in int64."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from pdp_kernels.triton_kernels.groups import group_kernel, group_places, tiling  # noqa: E402

BLOCK, WARPS = 2048, 4


@group_kernel("starts_ptr", "written_ptr")
def _store_starts(
    starts_ptr,
    written_ptr,
    rows: tl.int64,
    stride,
    width,
    rows_per_tile,
    reciprocal_width,
    M: tl.constexpr,  # noqa: N803
    GROUPS: tl.constexpr,  # noqa: N803
    ACCESS: tl.constexpr,  # noqa: N803
):
    """Store where each group of a program begins."""
    start, offsets, exists, _ = group_places(
        rows, stride, width, rows_per_tile, reciprocal_width, M, GROUPS, ACCESS
    )
    above = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    place = (above * tl.num_programs(0) + tl.program_id(0)) * GROUPS + tl.arange(0, GROUPS)
    tl.store(starts_ptr + place, start + offsets)
    tl.store(written_ptr + place, exists)


def starts_of_groups(tiles):
    """Return where the groups of all programs begin, sorted."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    places = torch.Size(tiles.grid).numel() * tiles.arguments["GROUPS"]
    starts = torch.full((places,), -1, device=device)
    exists = torch.zeros(places, dtype=torch.bool, device=device)
    _store_starts[tiles.grid](starts, exists, **tiles.arguments)
    return starts[exists].sort().values.cpu()


def expected_starts(rows, stride, m):
    return (torch.arange(rows).unsqueeze(1) * stride * m + torch.arange(stride)).flatten()


SHAPES = {  # rows, stride, M: the access
    "members are neighbours": ((1100, 1, 4), "groups"),
    "members of odd groups are neighbours": ((1100, 1, 5), "elements"),
    "short rows": ((200, 9, 4), "elements"),
    "rows of half a tile": ((7, 300, 4), "elements"),
    "rows of several tiles": ((3, 1300, 4), "elements"),
    "aligned rows": ((30, 48, 4), "columns"),
    "aligned rows of several tiles": ((3, 2304, 4), "columns"),
    "aligned rows that end inside of a tile": ((2, 1032, 4), "columns"),
    "groups of 32": ((5, 33, 32), "elements"),
    "groups of 1": ((3, 2047, 1), "groups"),
    "groups of 2": ((2, 1023, 2), "elements"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_group_has_one_place(quick_interpreter, name):
    (rows, stride, m), access = SHAPES[name]
    tiles = tiling(m, 1, [torch.empty(rows, m, stride)], BLOCK, WARPS)
    assert tiles.arguments["ACCESS"] == access
    assert torch.equal(starts_of_groups(tiles), expected_starts(rows, stride, m))


@pytest.mark.parametrize("aligned", [False, True])
def test_few_places_are_left_unused(aligned):
    rows, used = 5040, []
    for stride in range(8, 3000, 8) if aligned else range(1, 3000, 2):
        weight = torch.empty(rows, 4, stride, device="meta")
        tiles = tiling(4, 1, [weight], BLOCK, WARPS)
        places = torch.Size(tiles.grid).numel() * tiles.arguments["GROUPS"]
        used.append(rows * stride / places)
    assert min(used) > 0.85
    assert sum(used) / len(used) > 0.95


def test_weights_that_do_not_begin_at_a_multiple_of_16_bytes_are_read_by_elements():
    weight = torch.empty(64 * 64 + 1)[1:].view(64, 64)
    for dim in (0, 1):
        assert (
            tiling(4, dim, [torch.empty(64, 64), weight], BLOCK, WARPS).arguments["ACCESS"]
            == "elements"
        )


def test_the_stride_of_a_dimension_of_size_1_does_not_matter():
    weight = torch.empty(12).as_strided((3, 1, 4), (4, 7, 1))
    assert tiling(1, 1, [weight], BLOCK, WARPS).arguments["rows"] == 12


def test_rows_may_be_more_than_2_to_31_elements_long(quick_interpreter):
    stride = 800_000_000
    tiles = tiling(4, 0, [torch.empty(8, stride, device="meta")], BLOCK, WARPS)
    width = tiles.arguments["width"]
    first = tiles._replace(grid=(1, *tiles.grid[1:]))
    starts = starts_of_groups(first)
    assert torch.equal(starts, torch.cat([torch.arange(width), 4 * stride + torch.arange(width)]))


def test_a_grid_is_no_larger_than_a_gpu_allows():
    for shape in ((2**24, 4, 9), (2**22, 4, 64), (2, 4, 2**30)):
        grid = tiling(4, 1, [torch.empty(shape, device="meta")], BLOCK, WARPS).grid
        assert grid[0] < 2**31 and grid[1] < 2**16 and grid[2] < 2**16
