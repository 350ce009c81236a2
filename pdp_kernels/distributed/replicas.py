"""Whether ranks that should hold the same weights do."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pdp_kernels.distributed.shards import is_distributed, local_shard, sharding_dims
from pdp_kernels.ops.reference import INTEGERS


def compare_replicas(
    weights: Mapping[str, Tensor],
    thresholds: Mapping[str, Tensor],
    group: "dist.ProcessGroup | None",
) -> None:
    """Raise a RuntimeError that names what differs, and the ranks that agree.

    Compares the thresholds of all ranks, and the checksums of those that hold the same shard.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    checksums = torch.stack([_checksum(weight) for weight in weights.values()]).tolist()
    mine = {
        name: (
            _shard_index(weight),
            checksum,
            float(thresholds[name]).hex() if name in thresholds else None,
        )
        for (name, weight), checksum in zip(weights.items(), checksums, strict=True)
    }
    ranks = dist.get_process_group_ranks(group)
    seen: list[dict[str, Any]] = [{} for _ in ranks]
    dist.all_gather_object(seen, mine, group)
    by_rank = dict(zip(ranks, seen, strict=True))
    differences = []
    for name in mine:
        found = {rank: each[name] for rank, each in by_rank.items() if name in each}
        for shard in sorted({shard for shard, _, _ in found.values()}):
            groups = _agreeing({rank: each[1] for rank, each in found.items() if each[0] == shard})
            if len(groups) > 1:
                what = f"shard {shard} of {name}" if shard else name
                differences.append(f"{what} is not the same on ranks {_text(groups)}")
        groups = _agreeing({rank: each[2] for rank, each in found.items()})
        if len(groups) > 1:
            differences.append(f"the threshold of {name} differs on ranks {_text(groups)}")
    if differences:
        raise RuntimeError("replicas differ: " + "; ".join(differences))


def _checksum(weight: Tensor) -> Tensor:
    """Return the sum of a shard's bits, which changes with any one weight."""
    shard = local_shard(weight).contiguous()
    return shard.view(INTEGERS[shard.element_size()]).sum(dtype=torch.int64).cpu()


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
