"""The constants of all masks, in few tensors, so that a step writes a whole model at once."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pdp_kernels.functional.threshold import find_thresholds
from pdp_kernels.ops.reference import threshold_dtype
from pdp_kernels.pruning.config import PDPConfig
from pdp_kernels.pruning.masks import SelectedMask, WeightMask, selection_values
from pdp_kernels.pruning.targets import Target

_Place = tuple[torch.device, torch.dtype]


class DeviceTables:
    """The tables of a model: one for each device and threshold dtype.

    Args:
        targets: the weights that are pruned.
        masks: the mask of each target.
    """

    def __init__(self, targets: list[Target], masks: list[WeightMask]) -> None:
        self._targets = targets
        self._masks = masks
        self._tables: list[DeviceTable] = []

    def __getstate__(self) -> dict[str, Any]:
        # Pickle forgets that masks hold slices of a table: a copy makes new tables.
        return {**vars(self), "_tables": []}

    def set_schedule(
        self, config: PDPConfig, progress: float, final_counts: Mapping[str, int] | None
    ) -> None:
        """Set the prune counts and temperatures of this progress. The thresholds stay.

        Args:
            config: the schedule.
            progress: in epochs.
            final_counts: for each target, the number of units to prune in the end; None if they are
                not allocated yet, so that all weights are kept.
        """
        self._follow_weights()
        ramp = config.ramp_at(progress)
        for mask in self._masks:
            mask.set_ramp(ramp)
        for table in self._tables:
            table.set_temperatures(config, progress)
            if final_counts is not None:
                table.set_prune_counts(final_counts, ramp)

    def find_thresholds(self) -> None:
        """Select the thresholds of the current prune counts from the weights as they are now."""
        for table in self._tables:
            table.find_thresholds()

    def _follow_weights(self) -> None:
        """Make new tables if weights have moved to another device or dtype since the last step."""
        places: dict[_Place, list[int]] = {}
        for index, target in enumerate(self._targets):
            weight = target.weight
            places.setdefault((weight.device, threshold_dtype([weight])), []).append(index)
        if places != {table.place: table.members for table in self._tables}:
            self._tables = [
                DeviceTable(place, members, self._targets, self._masks)
                for place, members in places.items()
            ]


class DeviceTable:
    """Thresholds, temperatures and prune counts on one device. The masks hold slices of them.

    Attributes:
        place: the device, and the dtype of the thresholds.
        members: the positions of the targets and masks that belong here.
    """

    def __init__(
        self,
        place: _Place,
        members: list[int],
        targets: Sequence[Target],
        masks: Sequence[WeightMask],
    ) -> None:
        device, dtype = place
        self.place: _Place = place
        self.members = members
        self._taus: dict[tuple[float, float], Tensor] = {}
        self._targets: list[Target] = []  # those that have a threshold
        self._masks: list[SelectedMask] = []
        for index in members:
            target, mask = targets[index], masks[index]
            mask.tau = self._taus.setdefault(
                target.plan.temperatures, torch.empty((), dtype=dtype, device=device)
            )
            if isinstance(mask, SelectedMask):
                self._targets.append(target)
                self._masks.append(mask)
        size = len(self._masks)
        self._written_counts: Mapping[str, int] | None = None  # the source of _final_counts
        self._final_counts = torch.zeros(size, dtype=torch.float64, device=device)
        self._scaled_counts = torch.zeros(size, dtype=torch.float64, device=device)
        self._prune_counts = torch.zeros(size, dtype=torch.int64, device=device)
        self._thresholds = torch.full((size,), -math.inf, dtype=dtype, device=device)
        for index, mask in enumerate(self._masks):
            mask.hold(self._thresholds[index], self._prune_counts[index : index + 1])

    def set_temperatures(self, config: PDPConfig, progress: float) -> None:
        for temperatures, tau in self._taus.items():
            tau.fill_(config.temperature_at(temperatures, progress))

    def set_prune_counts(self, final_counts: Mapping[str, int], ramp: float) -> None:
        """Set each prune count to round(ramp * final count)."""
        if self._written_counts is not final_counts:
            counts = [final_counts[target.name] for target in self._targets]
            self._final_counts.copy_(torch.tensor(counts, dtype=torch.float64))
            self._written_counts = final_counts
        torch.mul(self._final_counts, ramp, out=self._scaled_counts)
        self._prune_counts.copy_(self._scaled_counts.add_(0.5).floor_())

    def find_thresholds(self) -> None:
        """Select the thresholds in one call, unless no counts are allocated yet."""
        if self._written_counts is not None and self._masks:
            weights = [target.weight for target in self._targets]
            values = selection_values(self._masks, weights)
            self._thresholds.copy_(find_thresholds(values, self._prune_counts))
