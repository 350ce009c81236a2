"""Sums over sharded weights: the norms of channels, and the power sums of the PQ Index."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from pdp_kernels import ops  # noqa: F401  (defines torch.ops.pdp)
from pdp_kernels.distributed.shards import (
    ShardedList,
    global_indices,
    is_sharded,
    local_shard,
    shard_starts,
    sharding_dims,
)
from pdp_kernels.ops.reference import fan_in, threshold_dtype

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Weights that the CPU kernel sums as one tile (kSumTile of csrc/cpu/power_sums.cpp). A sum in
# floating point depends on its order, so tiles cut by a shard's border are put together first.
_TILE = 16384


def channel_norms(weights: Sequence[Tensor], dims: Sequence[int], rms: bool) -> list[Tensor]:
    """Return the channel norms of each global weight of a list, on every rank.

    Takes one collective for the list. Norms of channels that lie in one shard are those of the
    global weight bit for bit. Of channels cut over several shards the squares are summed in
    float64, in another order.
    """
    norms: dict[int, Tensor] = {}
    sharded: dict[int, DTensor] = {}
    for index, weight in enumerate(weights):
        if is_sharded(weight):
            sharded[index] = weight
        else:
            norms[index] = torch.ops.pdp.channel_norms(local_shard(weight), dims[index], rms)
    listed = ShardedList(list(sharded.values()))
    sums = {
        position: _channel_sums(weight, shard, dims[index], rms)
        for position, (shard, (index, weight)) in enumerate(
            zip(listed.shards, sharded.items(), strict=True)
        )
    }
    totals = listed.all_reduce(sums)
    for position, (index, weight) in enumerate(sharded.items()):
        total = totals[position]
        if _cuts_channels(weight, dims[index]):
            total = (total / fan_in(weight, dims[index]) if rms else total).sqrt()
        norms[index] = total.to(threshold_dtype([weight]))
    return [norms[index] for index in range(len(weights))]


def shard_by_channels(weight: Tensor, dim: int) -> Tensor:
    """Return the weight, resharded along dim if its channels are cut. Differentiable."""
    if not is_sharded(weight) or not _cuts_channels(weight, dim):
        return weight
    return _reshard_along(weight, dim)


def _cuts_channels(weight: "DTensor", dim: int) -> bool:
    """Whether a channel along dim lies on several ranks."""
    return any(
        cast(Any, weight.placements[mesh_dim]).dim % weight.dim() != dim
        for mesh_dim in sharding_dims(weight)
    )


def _channel_sums(weight: "DTensor", shard: Tensor, dim: int, rms: bool) -> Tensor:
    """Return the shard's summand of the norms of all channels, (C,), float64.

    The sum of the summands is the norms; where channels are cut, the squares of the l2 norms.
    """
    sums = torch.zeros(weight.shape[dim], dtype=torch.float64, device=weight.device)
    if shard.numel() == 0:
        return sums
    if _cuts_channels(weight, dim):
        values = torch.ops.pdp.power_sums([shard.transpose(0, dim)], [None], 1.0, 2.0, True)[:, 2]
    else:
        values = torch.ops.pdp.channel_norms(shard, dim, rms).double()
    sums[global_indices(weight, dim)] = values
    return sums


def power_sums(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    p: float,
    q: float,
    per_row: bool,
) -> Tensor:
    """Return the power sums of global weights on every rank, float64 (groups, 3).

    On a CPU they equal those of the full weights in row-major order, bit for bit. A weight that is
    not sharded into ranges of rows is first redistributed (DTensor.redistribute).

    Args:
        weights: any of them may be distributed.
        masks: distributed like their weights; None where nothing is pruned.
        p: the smaller exponent.
        q: the larger exponent.
        per_row: one group for each row of dimension 0, instead of one for each weight.
    """
    sharded = [index for index, weight in enumerate(weights) if is_sharded(weight)]
    sums = {
        index: torch.ops.pdp.power_sums(
            [local_shard(weight)], [_local_mask(masks[index])], p, q, per_row
        )
        for index, weight in enumerate(weights)
        if index not in sharded
    }
    rows = [_by_rows(weights[index]) for index in sharded]
    kept = [None if mask is None else _by_rows(mask) for mask in (masks[i] for i in sharded)]
    found = (_sums_of_rows if per_row else _sums_of_tensors)(rows, kept, p, q)
    sums.update(zip(sharded, found, strict=True))
    return torch.cat([sums[index] for index in range(len(weights))])


def _local_mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else local_shard(mask)


def _by_rows(weight: Tensor) -> "DTensor":
    """Return the weight, sharded into ranges of its rows in the order of the mesh."""
    return _reshard_along(cast("DTensor", weight.detach()), 0)


def _reshard_along(weight: "DTensor", dim: int) -> "DTensor":
    from torch.distributed.tensor import Replicate, Shard

    dims = sharding_dims(weight)
    mesh_dims = range(weight.device_mesh.ndim)
    return weight.redistribute(
        placements=[Shard(dim) if mesh_dim in dims else Replicate() for mesh_dim in mesh_dims]
    )


def _sums_of_rows(
    weights: Sequence["DTensor"], masks: Sequence[Tensor | None], p: float, q: float
) -> list[Tensor]:
    """Return (rows, 3) of each weight. Every row lies on one rank. Takes one collective."""
    listed = ShardedList(weights)
    sums = {}
    for index, (weight, mask, shard) in enumerate(zip(weights, masks, listed.shards, strict=True)):
        sums[index] = torch.zeros(weight.shape[0], 3, dtype=torch.float64, device=weight.device)
        if shard.numel():
            own = torch.ops.pdp.power_sums([shard], [_local_mask(mask)], p, q, True)
            sums[index][global_indices(weight, 0)] = own
    return list(listed.all_reduce(sums).values())


def _sums_of_tensors(
    weights: Sequence["DTensor"], masks: Sequence[Tensor | None], p: float, q: float
) -> list[Tensor]:
    """Return (1, 3) of each weight, from the sums of its tiles in their order.

    Takes two collectives: one for the weights in tiles that several ranks hold, one for all sums.
    """
    listed = ShardedList(weights)
    ranges = {
        index: _Range(weight, mask, shard)
        for index, (weight, mask, shard) in enumerate(
            zip(weights, masks, listed.shards, strict=True)
        )
    }
    cut = listed.all_reduce({index: each.cut_tiles() for index, each in ranges.items()})
    sums = listed.all_reduce({index: each.tile_sums(p, q) for index, each in ranges.items()})
    for index, each in ranges.items():
        sums[index][each.cut, 1:] = each.sums_of_cut_tiles(cut[index], p, q)
    # One after another, as the kernel adds them up.
    return [total.cumsum(0)[-1:] for total in sums.values()]


class _Range:
    """The range of flat indices of a global weight that this rank adds to sums.

    Attributes:
        cut: the tiles that lie on several ranks.
    """

    def __init__(self, weight: "DTensor", mask: Tensor | None, shard: Tensor) -> None:
        row_size = weight.numel() // max(1, weight.shape[0])
        self.size = weight.numel()
        self.begin = int(global_indices(weight, 0)[0]) * row_size if shard.numel() else 0
        self.end = self.begin + shard.numel()
        borders = (row * row_size for row in shard_starts(weight, 0))
        self.cut = sorted({border // _TILE for border in borders if border % _TILE})
        self.dtype = shard.dtype
        self.values = shard.flatten()
        self.count: int | Tensor = shard.numel()
        if mask is not None and shard.numel():
            kept = local_shard(mask)
            self.values = torch.where(kept, shard, 0).flatten()
            self.count = kept.sum()

    def cut_tiles(self) -> Tensor:
        """Return this rank's weights in the cut tiles, zeros elsewhere; (cut, tile), float64."""
        tiles = self.values.new_zeros(len(self.cut), min(_TILE, self.size), dtype=torch.float64)
        for row, tile in enumerate(self.cut):
            start = tile * _TILE
            first, last = max(self.begin, start), min(self.end, start + _TILE)
            if first < last:
                own = self.values[first - self.begin : last - self.begin]
                tiles[row, first - start : last - start] = own
        return tiles

    def sums_of_cut_tiles(self, tiles: Tensor, p: float, q: float) -> Tensor:
        """Return (cut, 2), from the cut tiles summed over the ranks."""
        rows = [
            row[: self.size - tile * _TILE].to(self.dtype).unsqueeze(0)
            for row, tile in zip(tiles, self.cut, strict=True)
        ]
        return _row_sums(rows, p, q)[:, 1:] if rows else tiles.new_zeros(0, 2)

    def tile_sums(self, p: float, q: float) -> Tensor:
        """Return (tiles, 3): the sums of this rank's full tiles, and its count in the first row."""
        sums = self.values.new_zeros(max(1, -(-self.size // _TILE)), 3, dtype=torch.float64)
        first, past = -(-self.begin // _TILE), self.end // _TILE
        start, stop = first * _TILE - self.begin, past * _TILE - self.begin
        if first < past:
            rows = self.values[start:stop].view(past - first, _TILE)
            sums[first:past] = _row_sums([rows], p, q)
        # The last tile of the weight may be shorter.
        if self.begin <= past * _TILE < self.end == self.size:
            sums[past:] = _row_sums([self.values[stop:].unsqueeze(0)], p, q)
        sums[:, 0] = 0
        sums[0, 0] = self.count
        return sums


def _row_sums(rows: Sequence[Tensor], p: float, q: float) -> Tensor:
    return torch.ops.pdp.power_sums(rows, [None] * len(rows), p, q, True)
