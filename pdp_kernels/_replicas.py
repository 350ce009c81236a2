"""Whether ranks that should hold the same weights do."""

import torch
import torch.distributed as dist
from torch import Tensor

from pdp_kernels._selection import Selected
from pdp_kernels._sharding import is_distributed, local_part, sharding_dims
from pdp_kernels.reference import INTEGERS


def compare_replicas(
    entries: list[Selected],
    thresholds: list[Tensor | None],
    group: "dist.ProcessGroup | None",
) -> None:
    """Raises a RuntimeError that names the weights, and the ranks which agree, if not all do."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    sums = torch.stack([_checksum(entry.weight) for entry in entries]).tolist()
    mine = {
        entry.name: (_part(entry.weight), checksum, None if t is None else t.item().hex())
        for entry, checksum, t in zip(entries, sums, thresholds, strict=True)
    }
    ranks = dist.get_process_group_ranks(group)
    seen = [None] * len(ranks)
    dist.all_gather_object(seen, mine, group)
    by_rank = dict(zip(ranks, seen, strict=True))
    differences = []
    for name in mine:
        found = {rank: each[name] for rank, each in by_rank.items() if name in each}
        for part in sorted({part for part, _, _ in found.values()}):
            agreeing = _agreeing({rank: each[1] for rank, each in found.items() if each[0] == part})
            if len(agreeing) > 1:
                where = f"part {part} of {name}" if part else name
                differences.append(f"{where} is not the same on ranks {_text(agreeing)}")
        agreeing = _agreeing({rank: each[2] for rank, each in found.items()})
        if len(agreeing) > 1:
            differences.append(f"the threshold of {name} differs on ranks {_text(agreeing)}")
    if differences:
        raise RuntimeError("replicas differ: " + "; ".join(differences))


def _checksum(weight: Tensor) -> Tensor:
    """The sum of a part's bits: any one weight that drifts changes it."""
    part = local_part(weight).contiguous()
    return part.view(INTEGERS[part.element_size()]).sum(dtype=torch.int64).cpu()


def _part(weight: Tensor) -> tuple[int, ...]:
    """Which part of the weight this rank has: its place along the mesh dimensions that shard."""
    if not is_distributed(weight):
        return ()
    place = weight.device_mesh.get_coordinate()
    return tuple(place[dim] for dim in sharding_dims(weight))


def _agreeing(by_rank: dict[int, object]) -> list[list[int]]:
    """The ranks, grouped by what they have."""
    groups: dict[object, list[int]] = {}
    for rank, value in by_rank.items():
        groups.setdefault(value, []).append(rank)
    return list(groups.values())


def _text(agreeing: list[list[int]]) -> str:
    return " and ".join(str(ranks) for ranks in agreeing)
