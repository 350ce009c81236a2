"""Weights that are sharded over ranks (DTensors): the local shard, and all-reduces over shards.

A selection needs counts of a weight, and counts add up: no weight ever leaves its rank. Ranks that
hold replicas of one shard must not count it twice. So only those ranks add theirs that are in one
replica with the first rank of the group. Which ranks hold replicas, only a weight's own mesh tells:
ranks outside of it may hold another weight of that name, such as another expert.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

_PLAIN_TYPES = (Tensor, nn.Parameter)


def is_distributed(weight: Tensor) -> TypeGuard["DTensor"]:
    """Whether it is a DTensor. Does not import them, which takes half a second."""
    return type(weight) not in _PLAIN_TYPES and hasattr(weight, "device_mesh")


def reshard(model: nn.Module) -> None:
    """Let FSDP put its sharded parameters back where a forward has left gathered ones."""
    for module in fsdp_modules(model):
        module.reshard()


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules of a model that `fully_shard` has sharded."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    # fully_shard gives a module a subclass of FSDPModule. Without any there is no need to look.
    if fsdp is None or not fsdp.FSDPModule.__subclasses__():
        return []
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def sharding_dims(weight: "DTensor") -> tuple[int, ...]:
    """Return the mesh dimensions that shard the weight."""
    mesh = weight.device_mesh
    return tuple(
        dim
        for dim, placement in enumerate(weight.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


def is_sharded(weight: Tensor) -> TypeGuard["DTensor"]:
    """Whether this rank holds one of several shards of the weight."""
    return is_distributed(weight) and bool(sharding_dims(weight))


def local_shard(weight: Tensor) -> Tensor:
    """Return the shard of this rank, detached; a plain tensor as a whole."""
    # In inference mode torch cannot detach a DTensor, but its shard.
    return (weight.to_local() if is_distributed(weight) else weight).detach()


def mesh_ranks(weight: Tensor) -> frozenset[int]:
    """Return the ranks that the weight's mesh places; none for a plain tensor."""
    if not is_distributed(weight):
        return frozenset()
    return frozenset(weight.device_mesh.mesh.flatten().tolist())


def map_shards(function: Callable[[Tensor], Any], weight: "DTensor") -> Any:
    """Apply an elementwise function to the shards. Differentiable.

    Returns:
        A DTensor like the weight. If the function returns several tensors, those of the shard's
        shape become DTensors, and the others stay as they are.
    """
    shard = weight.to_local()
    results = function(shard)
    if isinstance(results, Tensor):
        return distributed_like(weight, results)
    return tuple(
        distributed_like(weight, result) if result.shape == shard.shape else result
        for result in results
    )


def distributed_like(weight: "DTensor", shard: Tensor) -> "DTensor":
    """Return the DTensor of the weight's shape and placements that has this shard here."""
    return type(weight).from_local(
        shard,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def global_indices(weight: "DTensor", dim: int) -> Tensor:
    """Return the global indices along one dimension that the local shard holds, int64."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements: list[Any] = []
    placement: Any
    for placement in weight.placements:
        if placement.is_replicate() or placement.dim % weight.dim() != dim:
            placements.append(Replicate())
        elif placement.is_shard():
            placements.append(type(placement)(0))
        else:  # strided: FSDP over tensor parallelism
            placements.append(type(placement)(0, split_factor=placement.split_factor))
    indices = torch.arange(weight.shape[dim], device=weight.device)
    indices = distribute_tensor(indices, weight.device_mesh, placements, src_data_rank=None)
    indices = indices.to_local()
    if len(indices) != weight.to_local().shape[dim]:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} has a shard of shape "
            f"{tuple(weight.to_local().shape)}, which its placements {weight.placements} on a mesh "
            f"of shape {tuple(weight.device_mesh.shape)} do not account for"
        )
    return indices


def shard_starts(weight: "DTensor", dim: int) -> list[int]:
    """Return the global index along one dimension at which each shard begins, over all ranks."""
    pieces = [(0, weight.shape[dim])]
    for mesh_dim in sharding_dims(weight):
        placement: Any = weight.placements[mesh_dim]
        if placement.dim % weight.dim() != dim:
            continue
        strided = not placement.is_shard()
        if strided:
            pieces = _chunk(pieces, placement.split_factor)
        pieces = _chunk(pieces, weight.device_mesh.size(mesh_dim))
        if strided:
            break  # a strided shard stands for the mesh dimensions to its right too
    return [begin for begin, size in pieces if size]


def _chunk(pieces: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Cut each piece (begin, size) as torch.chunk does."""
    return [
        (begin + index * step, max(0, min(step, size - index * step)))
        for begin, size in pieces
        for step in [-(-size // count)]
        for index in range(count)
    ]


class _Group(NamedTuple):
    process_group: "dist.ProcessGroup"
    ranks: frozenset[int]
    members: list[int]  # positions of the weights whose shards its ranks hold


class ShardedList:
    """A list of weights, any of which may be sharded, as the shards that this rank counts.

    Attributes:
        shards: for each weight, the shard that this rank adds to sums. It is empty where another
            rank adds the same shard.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.shards: list[Tensor] = [local_shard(weight) for weight in weights]
        self._groups: list[_Group] = []
        sharded = {index: weight for index, weight in enumerate(weights) if is_sharded(weight)}
        if sharded:
            self._form_groups(sharded)

    def all_reduce(self, values: Mapping[int, Tensor], minimum: bool = False) -> dict[int, Tensor]:
        """All-reduce values of weights by sum or by minimum, with one collective for each group.

        Usually there is one group.

        Args:
            values: one tensor for each position in the list, all of one dtype.
            minimum: take the minimum instead of the sum.
        """
        totals = dict(values)
        for process_group, _, members in self._groups:
            present = [index for index in members if index in values]
            if not present:
                continue
            buffer = torch.cat([values[index].flatten() for index in present])
            op = dist.ReduceOp.MIN if minimum else dist.ReduceOp.SUM
            dist.all_reduce(buffer, op, process_group)
            pieces = buffer.split([values[index].numel() for index in present])
            for index, piece in zip(present, pieces, strict=True):
                totals[index] = piece.view(values[index].shape)
        return totals

    def reaches_beyond(self, weight: Tensor) -> bool:
        """Whether a group has ranks that the weight's mesh does not place."""
        placed = mesh_ranks(weight)
        return any(not group.ranks <= placed for group in self._groups)

    def agree(self, values: Tensor) -> Tensor:
        """Return for each value whether it is the same on all ranks that groups connect, bool."""
        least = torch.cat([values, -values]).to(self._device())
        for group in self._groups:
            dist.all_reduce(least, dist.ReduceOp.MIN, group.process_group)
        least, negated_largest = least.chunk(2)
        return least == -negated_largest

    def _device(self) -> torch.device:
        """Return the device of the sharded weights, on which collectives run."""
        return self.shards[self._groups[0].members[0]].device

    def _form_groups(self, sharded: Mapping[int, "DTensor"]) -> None:
        """Form few groups of ranks, each of which holds all shards of its weights.

        A weight takes the group of another one if that is made of replicas by its own mesh.
        """
        dims_by_mesh: dict[DeviceMesh, set[int]] = {}
        for weight in sharded.values():
            dims_by_mesh.setdefault(weight.device_mesh, set()).update(sharding_dims(weight))
        spans = [_Span(mesh, tuple(sorted(dims))) for mesh, dims in dims_by_mesh.items()]
        spans.sort(key=lambda span: -len(span.ranks))
        replicas: dict[tuple[DeviceMesh, tuple[int, ...]], list[frozenset[int]]] = {}
        members: dict[int, list[int]] = {}
        for index, weight in sharded.items():
            key = (weight.device_mesh, sharding_dims(weight))
            if key not in replicas:
                replicas[key] = _replicas(*key)
            chosen = next(i for i, span in enumerate(spans) if span.is_made_of(replicas[key]))
            members.setdefault(chosen, []).append(index)
            if min(spans[chosen].ranks) not in _ranks_along(*key):
                self.shards[index] = self.shards[index].flatten()[:0]
        self._groups = [
            _Group(spans[chosen].process_group(), spans[chosen].ranks, indices)
            for chosen, indices in members.items()
        ]


class _Span:
    """The ranks along some dimensions of a mesh, through this rank."""

    def __init__(self, mesh: "DeviceMesh", dims: tuple[int, ...]) -> None:
        self.mesh = mesh
        self.dims = dims
        self.ranks = _ranks_along(mesh, dims)

    def is_made_of(self, replicas: list[frozenset[int]]) -> bool:
        """Whether its ranks are those of one or more of the replicas."""
        inside = [ranks for ranks in replicas if not ranks.isdisjoint(self.ranks)]
        return frozenset[int]().union(*inside) == self.ranks

    def process_group(self) -> "dist.ProcessGroup":
        if len(self.dims) == 1:
            return self.mesh.get_group(self.dims[0])
        if len(self.ranks) == dist.get_world_size():
            return _world()
        return _new_group(self.ranks)


def _ranks_along(mesh: "DeviceMesh", dims: tuple[int, ...]) -> frozenset[int]:
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # check_weight: the mesh has this rank
    where = tuple(slice(None) if dim in dims else index for dim, index in enumerate(coordinate))
    return frozenset(mesh.mesh[where].flatten().tolist())


def _replicas(mesh: "DeviceMesh", dims: tuple[int, ...]) -> list[frozenset[int]]:
    """Return the ranks of each replica of a weight that these dimensions of its mesh shard."""
    last = tuple(range(-len(dims), 0))
    shards = math.prod(mesh.size(dim) for dim in dims)
    rows = mesh.mesh.movedim(dims, last).reshape(-1, shards)
    return [frozenset(ranks) for ranks in rows.tolist()]


def _world() -> "dist.ProcessGroup":
    world = dist.group.WORLD
    assert world is not None  # a device mesh initializes it
    return world


_groups_made: dict[frozenset[int], tuple["dist.ProcessGroup", "dist.ProcessGroup"]] = {}


def _new_group(ranks: frozenset[int]) -> "dist.ProcessGroup":
    """Return a group of these ranks, made once for as long as the default group lives."""
    world = _world()
    made = _groups_made.get(ranks)
    if made is None or made[0] is not world:
        made = (world, dist.new_group(sorted(ranks), use_local_synchronization=True))
        _groups_made[ranks] = made
    return made[1]
