"""Triton kernels address elements in int64."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from pdp_kernels.triton_kernels.soft_mask_nm import _offsets  # noqa: E402


@triton.jit
def _store_offsets(
    offsets_ptr, stride, m: tl.constexpr, padded: tl.constexpr, groups: tl.constexpr
):
    offsets, is_member = _offsets(stride, m, padded, groups)
    place = tl.arange(0, groups)[:, None] * padded + tl.arange(0, padded)[None, :]
    tl.store(offsets_ptr + place, offsets, mask=is_member)


@pytest.mark.parametrize("stride", [1, 3, 800_000_000])
@pytest.mark.parametrize("m", [4, 5])
def test_members_of_a_group_may_lie_more_than_2_to_31_elements_apart(stride, m):
    """Groups 0 to 3 of m rows, each `stride` long, begin in columns 0 to 3."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    offsets = torch.full((4, 8), -1, device=device)
    _store_offsets[(1,)](offsets, stride, m=m, padded=8, groups=4)
    group = torch.arange(4).unsqueeze(1)
    row, column = group // stride, group % stride
    expected = row * stride * m + column + torch.arange(m) * stride
    assert torch.equal(offsets[:, :m].cpu(), expected)
    assert (offsets[:, m:] == -1).all()
