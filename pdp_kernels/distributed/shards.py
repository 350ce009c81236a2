"""Weights that are sharded over ranks (DTensors): the part that is here, and sums over all parts.

What a selection asks of a weight is counts, which add up: no weight ever leaves its rank. Ranks
that hold replicas of one part must not count it twice, so only those add theirs that share a
replica with the first rank of the group.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_distributed(weight: Tensor) -> bool:
    """Whether it is a DTensor; asked without importing them, which takes half a second."""
    return hasattr(weight, "device_mesh")


def reshard(model: nn.Module) -> None:
    """Makes FSDP put its sharded parameters back, where a forward has left whole copies of them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def sharding_dims(weight: "DTensor") -> tuple[int, ...]:
    """The dimensions of the mesh that shard the weight."""
    mesh = weight.device_mesh
    return tuple(
        dim
        for dim, placement in enumerate(weight.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


def is_sharded(weight: Tensor) -> bool:
    """Whether this rank holds a part of the weight only."""
    return is_distributed(weight) and bool(sharding_dims(weight))


def local_shard(weight: Tensor) -> Tensor:
    """What this rank holds of a weight, detached; of one that is not distributed, all."""
    weight = weight.detach()
    return weight.to_local() if is_distributed(weight) else weight


def map_shards(function: Callable[[Tensor], Any], weight: Tensor) -> Any:
    """What a function makes of a weight element by element, distributed like the weight.

    Differentiable. Of several results those of the weight's shape are distributed.
    """
    if not is_distributed(weight):
        return function(weight)
    part = weight.to_local()
    results = function(part)
    if isinstance(results, Tensor):
        return distributed_like(weight, results)
    return tuple(
        distributed_like(weight, result) if result.shape == part.shape else result
        for result in results
    )


def distributed_like(weight: "DTensor", part: Tensor) -> "DTensor":
    """The DTensor of the weight's shape whose part on this rank is given."""
    return type(weight).from_local(
        part,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def global_indices(weight: "DTensor", dim: int) -> Tensor:
    """Which places along one dimension of the whole weight this rank's part has, int64."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = []
    for placement in weight.placements:
        if placement.is_replicate() or placement.dim % weight.dim() != dim:
            placements.append(Replicate())
        elif placement.is_shard():
            placements.append(type(placement)(0))
        else:  # strided: of FSDP over tensor parallelism
            placements.append(type(placement)(0, split_factor=placement.split_factor))
    places = torch.arange(weight.shape[dim], device=weight.device)
    places = distribute_tensor(places, weight.device_mesh, placements, src_data_rank=None)
    places = places.to_local()
    if len(places) != weight.to_local().shape[dim]:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} has a part of shape "
            f"{tuple(weight.to_local().shape)}, which its placements {weight.placements} on a mesh "
            f"of shape {tuple(weight.device_mesh.shape)} do not account for"
        )
    return places


def shard_starts(weight: "DTensor", dim: int) -> list[int]:
    """Where parts begin along one dimension of the whole weight, on whatever rank."""
    pieces = [(0, weight.shape[dim])]
    for mesh_dim in sharding_dims(weight):
        placement = weight.placements[mesh_dim]
        if placement.dim % weight.dim() != dim:
            continue
        strided = not placement.is_shard()
        if strided:
            pieces = _cut(pieces, placement.split_factor)
        pieces = _cut(pieces, weight.device_mesh.size(mesh_dim))
        if strided:
            break  # it stands for the mesh dimensions to its right too
    return [begin for begin, size in pieces if size]


def _cut(pieces: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Each (begin, size) cut as torch.chunk does it."""
    return [
        (begin + place * step, max(0, min(step, size - place * step)))
        for begin, size in pieces
        for step in [-(-size // count)]
        for place in range(count)
    ]


class _Group(NamedTuple):
    process_group: "dist.ProcessGroup"
    members: list[int]  # positions of the weights whose parts its ranks hold


class ShardedList:
    """A list of weights, any of which may be sharded, as the parts that this rank counts.

    parts: by weight, the part that this rank adds to sums: empty where another rank adds it.
    """

    def __init__(self, weights: Sequence[Tensor]):
        self.shards = [local_shard(weight) for weight in weights]
        self._groups: list[_Group] = []
        sharded = {index: weight for index, weight in enumerate(weights) if is_sharded(weight)}
        if sharded:
            self._form_groups(sharded)

    def all_reduce(self, values: Mapping[int, Tensor], minimum: bool = False) -> dict[int, Tensor]:
        """Of values of weights' parts, by position and of one dtype, the sums over all parts.

        Or the least. One collective for each group of ranks: usually one.
        """
        totals = dict(values)
        for process_group, members in self._groups:
            mine = [index for index in members if index in values]
            if not mine:
                continue
            buffer = torch.cat([values[index].flatten() for index in mine])
            op = dist.ReduceOp.MIN if minimum else dist.ReduceOp.SUM
            dist.all_reduce(buffer, op, process_group)
            pieces = buffer.split([values[index].numel() for index in mine])
            for index, piece in zip(mine, pieces, strict=True):
                totals[index] = piece.view(values[index].shape)
        return totals

    def _form_groups(self, sharded: dict[int, "DTensor"]) -> None:
        """Few groups of ranks, each of which holds all parts of its weights."""
        dims_by_mesh: dict[DeviceMesh, set[int]] = {}
        for weight in sharded.values():
            dims_by_mesh.setdefault(weight.device_mesh, set()).update(sharding_dims(weight))
        spans = [_Span(mesh, tuple(sorted(dims))) for mesh, dims in dims_by_mesh.items()]
        spans.sort(key=lambda span: -len(span.ranks))
        peers: dict[tuple, frozenset[int]] = {}
        members: dict[int, list[int]] = {}
        for index, weight in sharded.items():
            dims = sharding_dims(weight)
            key = (weight.device_mesh, dims)
            if key not in peers:
                peers[key] = _ranks_along(*key)
            place = next(place for place, span in enumerate(spans) if peers[key] <= span.ranks)
            members.setdefault(place, []).append(index)
            if min(spans[place].ranks) not in peers[key]:
                self.shards[index] = self.shards[index].flatten()[:0]
        self._groups = [
            _Group(spans[place].process_group(), indices) for place, indices in members.items()
        ]


class _Span:
    """The ranks along some dimensions of a mesh, through this rank."""

    def __init__(self, mesh: "DeviceMesh", dims: tuple[int, ...]):
        self.mesh = mesh
        self.dims = dims
        self.ranks = _ranks_along(mesh, dims)

    def process_group(self) -> "dist.ProcessGroup":
        if len(self.dims) == 1:
            return self.mesh.get_group(self.dims[0])
        if len(self.ranks) == dist.get_world_size():
            return dist.group.WORLD
        return _new_group(self.ranks)


def _ranks_along(mesh: "DeviceMesh", dims: tuple[int, ...]) -> frozenset[int]:
    where = tuple(
        slice(None) if dim in dims else place for dim, place in enumerate(mesh.get_coordinate())
    )
    return frozenset(mesh.mesh[where].flatten().tolist())


_groups_made: dict[frozenset[int], tuple["dist.ProcessGroup", "dist.ProcessGroup"]] = {}


def _new_group(ranks: frozenset[int]) -> "dist.ProcessGroup":
    """A group of these ranks, made once for as long as the default group lives."""
    world, group = _groups_made.get(ranks, (None, None))
    if world is not dist.group.WORLD:
        world = dist.group.WORLD
        group = dist.new_group(sorted(ranks), use_local_synchronization=True)
        _groups_made[ranks] = (world, group)
    return group
