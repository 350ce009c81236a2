"""Whether ranks that should hold the same weights do."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pdp_kernels.distributed.shards import (
    ShardedList,
    is_distributed,
    local_shard,
    mesh_ranks,
    sharding_dims,
)
from pdp_kernels.ops.reference import INTEGERS


class _Held(NamedTuple):
    """What one rank holds of a weight."""

    mesh: int  # the least rank of the weight's mesh; -1 for a plain tensor
    shard: tuple[int, ...]
    checksum: int
    threshold: str | None
    prune_count: int | None  # in the end


def compare_replicas(
    weights: Mapping[str, Tensor],
    thresholds: Mapping[str, Tensor],
    prune_counts: Mapping[str, int],
    group: "dist.ProcessGroup | None",
) -> None:
    """Raise a RuntimeError that names what differs, and the ranks that agree.

    Compares the thresholds and prune counts, and the checksums of ranks that hold the same shard:
    of a plain tensor those of all ranks, of a DTensor those of the ranks of its mesh.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    checksums = torch.stack(
        [_checksum(local_shard(weight)).cpu() for weight in weights.values()]
    ).tolist()
    mine = {
        name: _Held(
            min(mesh_ranks(weight), default=-1),
            _shard_index(weight),
            checksum,
            float(thresholds[name]).hex() if name in thresholds else None,
            prune_counts.get(name),
        )
        for (name, weight), checksum in zip(weights.items(), checksums, strict=True)
    }
    ranks = dist.get_process_group_ranks(group)
    seen: list[dict[str, _Held]] = [{} for _ in ranks]
    dist.all_gather_object(seen, mine, group)
    by_rank = dict(zip(ranks, seen, strict=True))
    differences = []
    for name in dict.fromkeys(name for held in seen for name in held):
        found = {rank: held[name] for rank, held in by_rank.items() if name in held}
        for mesh in sorted({each.mesh for each in found.values()}):
            on_mesh = {rank: each for rank, each in found.items() if each.mesh == mesh}
            differences += _differences(name, on_mesh)
    if differences:
        raise RuntimeError("replicas differ: " + "; ".join(differences))


def _differences(name: str, found: Mapping[int, _Held]) -> list[str]:
    """Return what differs between the ranks of one mesh."""
    differences = []
    for shard in sorted({each.shard for each in found.values()}):
        groups = _agreeing(
            {rank: each.checksum for rank, each in found.items() if each.shard == shard}
        )
        if len(groups) > 1:
            what = f"shard {shard} of {name}" if shard else name
            differences.append(f"{what} is not the same on ranks {_text(groups)}")
    for what, by_rank in (
        ("threshold", {rank: each.threshold for rank, each in found.items()}),
        ("prune count", {rank: each.prune_count for rank, each in found.items()}),
    ):
        groups = _agreeing(by_rank)
        if len(groups) > 1:
            differences.append(f"the {what} of {name} differs on ranks {_text(groups)}")
    return differences


def check_same_on_all_ranks(weights: Sequence[Tensor]) -> None:
    """Raise a ValueError if ranks that share a weight do not hold the same list of weights.

    One budget for such a list is no number that they agree on. Compares the checksums of weights
    whose meshes leave open what the other ranks hold; every rank that shares a weight with one
    that differs raises. Without such weights it takes no collective.
    """
    listed = ShardedList(weights)
    unknown = [index for index, weight in enumerate(weights) if listed.reaches_beyond(weight)]
    if not unknown:
        return
    checksums = listed.all_reduce({index: _checksum(listed.shards[index]) for index in unknown})
    values = torch.stack([checksums[index].to("cpu") for index in unknown])
    for index, same in zip(unknown, listed.agree(values).tolist(), strict=True):
        if not same:
            ranks = sorted(mesh_ranks(weights[index]))
            where = f"on the mesh of ranks {ranks}" if ranks else "as a plain tensor"
            raise ValueError(
                f"weights[{index}] of shape {tuple(weights[index].shape)} must be the same on all "
                "ranks that share one budget over layers, as the prune counts depend on it: this "
                f'rank holds it {where}, and another rank holds other values. With scope="layer" '
                "ranks may hold different weights, such as experts"
            )


def _checksum(shard: Tensor) -> Tensor:
    """Return the sum of a shard's bits, which changes with any one weight."""
    bits = shard.contiguous().view(INTEGERS[shard.element_size()])
    return bits.sum(dtype=torch.int64)


def _shard_index(weight: Tensor) -> tuple[int, ...]:
    """Return the rank's coordinates along the mesh dimensions that shard the weight."""
    if not is_distributed(weight):
        return ()
    coordinates = weight.device_mesh.get_coordinate()
    assert coordinates is not None  # check_weight: the mesh has this rank
    return tuple(coordinates[dim] for dim in sharding_dims(weight))


def _agreeing(by_rank: Mapping[int, object]) -> list[list[int]]:
    """Group the ranks by their value."""
    groups: dict[object, list[int]] = {}
    for rank, value in by_rank.items():
        groups.setdefault(value, []).append(rank)
    return list(groups.values())


def _text(groups: list[list[int]]) -> str:
    return " and ".join(str(ranks) for ranks in groups)
