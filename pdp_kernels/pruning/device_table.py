"""The constants of all masks, in few tensors, so that a step writes a whole model at once."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from pdp_kernels.functional.threshold import find_thresholds
from pdp_kernels.ops.reference import threshold_dtype
from pdp_kernels.pruning.config import LayerPlan, PDPConfig
from pdp_kernels.pruning.layers import parameter_of
from pdp_kernels.pruning.masks import GroupMask, SelectedMask, WeightMask, selection_values
from pdp_kernels.pruning.targets import Target

_Place = tuple[torch.device, torch.dtype]
_Schedule = tuple[tuple[float, float], float]  # (start, end), and the least of the gradient

# Constants are this many bytes apart. For an address that 16 does not divide Triton compiles a
# kernel again, and inductor takes the tensor for unaligned.
_SPACING = 16

_device, _dtype, _tau = attrgetter("device"), attrgetter("dtype"), attrgetter("tau")


class DeviceTables:
    """The tables of a model: one for each device and threshold dtype.

    Args:
        targets: the weights that are pruned.
        masks: the mask of each target.

    Attributes:
        tables: the tables, as of the last step.
    """

    def __init__(self, targets: list[Target], masks: list[WeightMask]) -> None:
        self.tables: list[DeviceTable] = []
        self._targets = targets
        self._masks = masks
        self._layers = [target.holders[0].layer for target in targets]
        self._names = [target.holders[0].slot.name for target in targets]
        # Of the weights and masks at the last step.
        self._places: dict[_Place, list[int]] = {}
        self._devices: list[torch.device] = []
        self._dtypes: list[torch.dtype] = []
        self._taus: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        # Pickle forgets that masks hold slices of a table: a copy makes new tables.
        return {**vars(self), "tables": [], "_taus": []}

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
        self._set_schedule(self._weights(), config, progress, final_counts)
        if final_counts is None:  # a state of the warm-up has been loaded, perhaps after its end
            for table in self.tables:
                table.forget_prune_counts()

    def step(
        self, config: PDPConfig, progress: float, final_counts: Mapping[str, int] | None
    ) -> None:
        """Set the schedule, and select its thresholds from the weights as they are now.

        Args:
            config: as for `set_schedule`.
            progress: as for `set_schedule`.
            final_counts: as for `set_schedule`.
        """
        weights = self._weights()
        self._set_schedule(weights, config, progress, final_counts)
        for table in self.tables:
            table.find_thresholds(weights)

    def _weights(self) -> list[Tensor]:
        return list(map(parameter_of, self._layers, self._names))

    def _set_schedule(
        self,
        weights: Sequence[Tensor],
        config: PDPConfig,
        progress: float,
        final_counts: Mapping[str, int] | None,
    ) -> None:
        self._follow(weights)
        ramp = config.ramp_at(progress)
        for table in self.tables:
            table.set_temperatures(config, progress)
            table.set_group_counts(ramp)
            if final_counts is not None:
                table.set_prune_counts(final_counts, ramp)

    def _follow(self, weights: Sequence[Tensor]) -> None:
        """Make new tables if weights have moved to another device or dtype since the last step.

        Also if they have moved and are back: their masks then hold tensors of their own.
        """
        devices, dtypes = list(map(_device, weights)), list(map(_dtype, weights))
        are_held = bool(self.tables) and all(map(is_, map(_tau, self._masks), self._taus))
        if are_held and devices == self._devices and dtypes == self._dtypes:
            return
        places: dict[_Place, list[int]] = {}
        for index, weight in enumerate(weights):
            places.setdefault((weight.device, threshold_dtype([weight])), []).append(index)
        if not are_held or places != self._places:
            # Backward refuses tensors of inference mode, and the training may go on after it.
            with torch.inference_mode(False):
                self.tables = [
                    DeviceTable(place, members, self._targets, self._masks)
                    for place, members in places.items()
                ]
        self._places, self._devices, self._dtypes = places, devices, dtypes
        self._taus = list(map(_tau, self._masks))


class DeviceTable:
    """Thresholds, temperatures and prune counts on one device. The masks hold slices of them.

    Masks with a threshold come first. Among them, and among the others, those of one class with the
    same `relative` are next to one another, so that an operator for a list of weights takes a slice
    of thresholds and of taus.

    Args:
        place: the device, and the dtype of the thresholds.
        members: the positions of the targets and masks that belong here.
        targets: those of the model.
        masks: those of the model.

    Attributes:
        positions: the members in the order of this table.
        targets: those here.
        masks: the mask of each target.
        thresholds: (S,), those of the first S masks; 16 bytes apart.
        taus: (M,), the temperatures of all M masks; 16 bytes apart. Masks with one schedule hold
            the first one of theirs as tau.
        gradient_taus: the same for gradients; None if none has a temperature of its own.
    """

    def __init__(
        self,
        place: _Place,
        members: list[int],
        targets: Sequence[Target],
        masks: Sequence[WeightMask],
    ) -> None:
        device, dtype = place

        def kind(index: int) -> tuple[bool, str, bool, _Schedule]:
            mask = masks[index]
            has_threshold = isinstance(mask, SelectedMask)
            plan = targets[index].plan
            return not has_threshold, type(mask).__name__, mask.relative, _schedule(plan)

        self.positions: list[int] = sorted(members, key=kind)
        self.targets: list[Target] = [targets[index] for index in self.positions]
        self.masks: list[WeightMask] = [masks[index] for index in self.positions]
        self._selected = [mask for mask in self.masks if isinstance(mask, SelectedMask)]
        size = len(self._selected)
        self._written_counts: Mapping[str, int] | None = None  # the source of _final_counts
        self._final_counts = torch.zeros(size, dtype=torch.float64, device=device)
        self._scaled_counts = torch.zeros(size, dtype=torch.float64, device=device)
        self._prune_counts = torch.zeros(size, dtype=torch.int64, device=device)
        self.thresholds: Tensor = _spaced(size, -math.inf, dtype, device)
        for index, selected in enumerate(self._selected):
            selected.hold(self.thresholds[index], self._prune_counts[index : index + 1])
        self._group_counts: dict[int, Tensor] = {}  # by the number that is pruned in the end
        for mask in self.masks:
            if isinstance(mask, GroupMask):
                count = torch.zeros((), dtype=torch.int64, device=device)
                mask.hold(self._group_counts.setdefault(mask.prunable, count))
        self.taus: Tensor = _spaced(len(members), math.nan, dtype, device)
        schedules = [_schedule(target.plan) for target in self.targets]
        self.gradient_taus: Tensor | None = None
        if any(least for _, least in schedules):
            self.gradient_taus = _spaced(len(members), math.nan, dtype, device)
        # Runs of taus with one schedule: one operation writes each.
        self._runs: list[tuple[_Schedule, Tensor, Tensor | None]] = []
        begin = 0
        for schedule, run in groupby(schedules):
            here = slice(begin, begin + len(list(run)))
            of_gradient = None if self.gradient_taus is None else self.gradient_taus[here]
            self._runs.append((schedule, self.taus[here], of_gradient))
            begin = here.stop
        held: dict[_Schedule, tuple[Tensor, Tensor | None]] = {}
        for schedule, taus, of_gradient in self._runs:
            first = None if of_gradient is None else of_gradient[0]
            held.setdefault(schedule, (taus[0], first))
        for schedule, mask in zip(schedules, self.masks, strict=True):
            mask.tau, mask.gradient_tau = held[schedule]

    def set_temperatures(self, config: PDPConfig, progress: float) -> None:
        for (temperatures, least), taus, of_gradient in self._runs:
            tau = config.temperature_at(temperatures, progress)
            taus.fill_(tau)
            if of_gradient is not None:
                of_gradient.fill_(max(tau, least))

    def set_group_counts(self, ramp: float) -> None:
        """Prune round(ramp * (M - N)) weights of each N:M group."""
        for prunable, count in self._group_counts.items():
            count.fill_(math.floor(ramp * prunable + 0.5))

    def forget_prune_counts(self) -> None:
        """Keep all weights, as before any counts are allocated."""
        self._written_counts = None
        self._prune_counts.zero_()

    def set_prune_counts(self, final_counts: Mapping[str, int], ramp: float) -> None:
        """Set each prune count to round(ramp * final count)."""
        if not self._selected:
            return
        if self._written_counts is not final_counts:
            targets = self.targets[: len(self._selected)]
            counts = [final_counts[target.name] for target in targets]
            self._final_counts.copy_(torch.tensor(counts, dtype=torch.float64, device="cpu"))
            self._written_counts = final_counts
        torch.mul(self._final_counts, ramp, out=self._scaled_counts)
        # The conversion to integers rounds down.
        self._prune_counts.copy_(self._scaled_counts.add_(0.5))

    def find_thresholds(self, weights: Sequence[Tensor]) -> None:
        """Select the thresholds in one call, unless no counts are allocated yet.

        Args:
            weights: those of the model.
        """
        if self._written_counts is not None:
            own = [weights[index] for index in self.positions[: len(self._selected)]]
            values = selection_values(self._selected, own)
            self.thresholds.copy_(find_thresholds(values, self._prune_counts))


def _schedule(plan: LayerPlan) -> _Schedule:
    return plan.temperatures, plan.gradient_tau


def _spaced(size: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (size,) constants that are 16 bytes apart, all of this value."""
    return torch.full((size, _SPACING // dtype.itemsize), value, dtype=dtype, device=device)[:, 0]
