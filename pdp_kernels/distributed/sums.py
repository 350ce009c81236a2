"""Sums over weights whose parts are on several ranks: norms of channels, and the PQ Index's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pdp_kernels import ops  # noqa: F401
from pdp_kernels.distributed.shards import (
    ShardedList,
    global_indices,
    is_sharded,
    local_shard,
    shard_starts,
    sharding_dims,
)
from pdp_kernels.ops.reference import fan_in, threshold_dtype

# Weights that the CPU kernel adds up in one go (kSumTile of csrc/cpu/power_sums.cpp). Sums in
# floating point depend on their order: tiles cut by a border between ranks are put together first.
_TILE = 16384


def channel_norms(weights: Sequence[Tensor], dims: Sequence[int], rms: bool) -> list[Tensor]:
    """The operator `channel_norms` of each weight of a list: the whole norms, on every rank.

    One collective for the list. Norms of channels that are not cut are those of the whole weight
    bit for bit; of those that are, squares are summed in float64 in another order.
    """
    sharded = [index for index, weight in enumerate(weights) if is_sharded(weight)]
    norms = {
        index: torch.ops.pdp.channel_norms(local_shard(weights[index]), dims[index], rms)
        for index in range(len(weights))
        if index not in sharded
    }
    if sharded:
        listed = ShardedList([weights[index] for index in sharded])
        sums = {
            place: _channel_sums(weights[index], listed.shards[place], dims[index], rms)
            for place, index in enumerate(sharded)
        }
        for place, total in listed.all_reduce(sums).items():
            weight, dim = weights[sharded[place]], dims[sharded[place]]
            if _cuts_channels(weight, dim):
                total = (total / fan_in(weight, dim) if rms else total).sqrt()
            norms[sharded[place]] = total.to(threshold_dtype([weight]))
    return [norms[index] for index in range(len(weights))]


def _cuts_channels(weight: Tensor, dim: int) -> bool:
    """Whether parts of one channel are on several ranks."""
    return any(weight.placements[i].dim % weight.dim() != dim for i in sharding_dims(weight))


def shard_by_channels(weight: Tensor, dim: int) -> Tensor:
    """The weight, sharded along dim instead where its channels are cut. Differentiable."""
    if not is_sharded(weight) or not _cuts_channels(weight, dim):
        return weight
    return _sharded_along(weight, dim)


def _channel_sums(weight: Tensor, part: Tensor, dim: int, rms: bool) -> Tensor:
    """What a part adds to the norms of all channels, (C,); to their squares where they are cut."""
    sums = torch.zeros(weight.shape[dim], dtype=torch.float64, device=weight.device)
    if part.numel() == 0:
        return sums
    if _cuts_channels(weight, dim):
        values = torch.ops.pdp.power_sums([part.transpose(0, dim)], [None], 1.0, 2.0, True)[:, 2]
    else:
        values = torch.ops.pdp.channel_norms(part, dim, rms).double()
    sums[global_indices(weight, dim)] = values
    return sums


def power_sums(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    p: float,
    q: float,
    per_row: bool,
) -> Tensor:
    """The operator `power_sums` of weights, and masks distributed like them, on every rank.

    On a CPU bit for bit that of the whole weights in row-major order. A part that is no range of
    rows is first exchanged for one, by whatever means DTensor.redistribute has for it.
    """
    sharded = [index for index, weight in enumerate(weights) if is_sharded(weight)]
    if not sharded:
        masks = [None if mask is None else local_shard(mask) for mask in masks]
        return torch.ops.pdp.power_sums(list(map(local_shard, weights)), masks, p, q, per_row)
    sums = {
        index: power_sums([weight], [masks[index]], p, q, per_row)
        for index, weight in enumerate(weights)
        if index not in sharded
    }
    rows = [_by_rows(weights[index]) for index in sharded]
    kept = [None if masks[index] is None else _by_rows(masks[index]) for index in sharded]
    found = (_sums_of_rows if per_row else _sums_of_tensors)(rows, kept, p, q)
    sums |= zip(sharded, found, strict=True)
    return torch.cat([sums[index] for index in range(len(weights))])


def _by_rows(weight: Tensor) -> Tensor:
    """The weight, sharded into ranges of its rows in the order of the mesh."""
    return _sharded_along(weight.detach(), 0)


def _sharded_along(weight: Tensor, dim: int) -> Tensor:
    from torch.distributed.tensor import Replicate, Shard

    dims = sharding_dims(weight)
    mesh_dims = range(weight.device_mesh.ndim)
    return weight.redistribute(
        placements=[Shard(dim) if mesh_dim in dims else Replicate() for mesh_dim in mesh_dims]
    )


def _sums_of_rows(
    weights: list[Tensor], masks: list[Tensor | None], p: float, q: float
) -> list[Tensor]:
    """(rows, 3) of each weight: every row is whole on some rank. One collective."""
    sharded = ShardedList(weights)
    sums = {}
    for index, (weight, mask, part) in enumerate(zip(weights, masks, sharded.shards, strict=True)):
        sums[index] = torch.zeros(weight.shape[0], 3, dtype=torch.float64, device=weight.device)
        if part.numel():
            kept = None if mask is None else local_shard(mask)
            own = torch.ops.pdp.power_sums([part], [kept], p, q, True)
            sums[index][global_indices(weight, 0)] = own
    return list(sharded.all_reduce(sums).values())


def _sums_of_tensors(
    weights: list[Tensor], masks: list[Tensor | None], p: float, q: float
) -> list[Tensor]:
    """(1, 3) of each weight, from the sums of its tiles in their order.

    Two collectives: one for the weights in tiles that lie on several ranks, one for all sums.
    """
    sharded = ShardedList(weights)
    ranges = {
        index: _Range(weight, mask, part)
        for index, (weight, mask, part) in enumerate(
            zip(weights, masks, sharded.shards, strict=True)
        )
    }
    cut = sharded.all_reduce({index: each.cut_tiles() for index, each in ranges.items()})
    sums = sharded.all_reduce({index: each.tile_sums(p, q) for index, each in ranges.items()})
    for index, each in ranges.items():
        sums[index][each.cut, 1:] = each.sums_of_cut_tiles(cut[index], p, q)
    # One after another, as the kernel adds them up.
    return [total.cumsum(0)[-1:] for total in sums.values()]


class _Range:
    """The range of a weight's flat indices that this rank adds to sums.

    cut: the tiles that lie on several ranks.
    """

    def __init__(self, weight: Tensor, mask: Tensor | None, part: Tensor):
        row_size = weight.numel() // max(1, weight.shape[0])
        self.size = weight.numel()
        self.begin = int(global_indices(weight, 0)[0]) * row_size if part.numel() else 0
        self.end = self.begin + part.numel()
        borders = (row * row_size for row in shard_starts(weight, 0))
        self.cut = sorted({border // _TILE for border in borders if border % _TILE})
        self.dtype = part.dtype
        self.values = part.flatten()
        self.count = part.numel()
        if mask is not None and part.numel():
            kept = local_shard(mask)
            self.values = torch.where(kept, part, 0).flatten()
            self.count = kept.sum()

    def cut_tiles(self) -> Tensor:
        """What this rank has of the tiles that are cut, among zeros; (cut, tile), float64."""
        tiles = self.values.new_zeros(len(self.cut), min(_TILE, self.size), dtype=torch.float64)
        for row, tile in enumerate(self.cut):
            start = tile * _TILE
            first, last = max(self.begin, start), min(self.end, start + _TILE)
            if first < last:
                own = self.values[first - self.begin : last - self.begin]
                tiles[row, first - start : last - start] = own
        return tiles

    def sums_of_cut_tiles(self, tiles: Tensor, p: float, q: float) -> Tensor:
        """(cut, 2), from all that ranks have of them."""
        rows = [
            row[: self.size - tile * _TILE].to(self.dtype).unsqueeze(0)
            for row, tile in zip(tiles, self.cut, strict=True)
        ]
        return _row_sums(rows, p, q)[:, 1:] if rows else tiles.new_zeros(0, 2)

    def tile_sums(self, p: float, q: float) -> Tensor:
        """(tiles, 3): sums of those tiles this rank has whole; its count stands in the first."""
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


def _row_sums(rows: list[Tensor], p: float, q: float) -> Tensor:
    return torch.ops.pdp.power_sums(rows, [None] * len(rows), p, q, True)
