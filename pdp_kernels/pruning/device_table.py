"""The constants of all masks on one device, written a whole model at a time."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pdp_kernels.distributed.order_statistics import thresholds
from pdp_kernels.distributed.sums import channel_norms
from pdp_kernels.pruning.config import PDPConfig
from pdp_kernels.pruning.masked_layer import ChannelWeightMask, GroupWeightMask, WeightMask
from pdp_kernels.pruning.targets import Target


class DeviceTable:
    """Thresholds, temperatures and counts of the masks on one device, as slices of few tensors.

    place: the device, and the dtype of thresholds there.
    members: the positions of the weights and masks that belong there.
    """

    def __init__(
        self,
        place: tuple[torch.device, torch.dtype],
        members: list[int],
        weights: list[Target],
        masks: list[WeightMask],
    ):
        device, dtype = self.place = place
        self.members = members
        self.taus: dict[tuple[float, float], Tensor] = {}
        for index in members:
            masks[index].tau = self.taus.setdefault(
                weights[index].plan.temperatures, torch.empty((), dtype=dtype, device=device)
            )
        selected = [index for index in members if not isinstance(masks[index], GroupWeightMask)]
        self.weights = [weights[index] for index in selected]
        self.masks = [masks[index] for index in selected]
        size = len(selected)
        self.known_counts: Mapping[str, int] | None = None  # what final_counts was filled from
        self.final_counts = torch.zeros(size, dtype=torch.float64, device=device)
        self.scaled_counts = torch.zeros(size, dtype=torch.float64, device=device)
        self.prune_counts = torch.zeros(size, dtype=torch.int64, device=device)
        self.thresholds = torch.full((size,), -math.inf, dtype=dtype, device=device)
        for index, mask in enumerate(self.masks):
            mask.threshold = self.thresholds[index]
            mask.prune_count = self.prune_counts[index : index + 1]

    def set_schedule(
        self, config: PDPConfig, progress: float, final_counts: Mapping[str, int] | None
    ) -> None:
        for temperatures, tau in self.taus.items():
            tau.fill_(config.temperature_at(temperatures, progress))
        if final_counts is None:
            return  # all kept: nothing was allocated yet
        if self.known_counts is not final_counts:
            counts = [final_counts[entry.name] for entry in self.weights]
            self.final_counts.copy_(torch.tensor(counts, dtype=torch.float64))
            self.known_counts = final_counts
        torch.mul(self.final_counts, config.ramp_at(progress), out=self.scaled_counts)
        self.prune_counts.copy_(self.scaled_counts.add_(0.5).floor_())

    def find_thresholds(self) -> None:
        if self.known_counts is not None and self.masks:
            self.thresholds.copy_(thresholds(self._selected_from(), self.prune_counts))

    def _selected_from(self) -> list[Tensor]:
        """What each threshold lies among: weights, or the norms of channels."""
        values = [entry.weight.detach() for entry in self.weights]
        of_channels = [
            index for index, mask in enumerate(self.masks) if isinstance(mask, ChannelWeightMask)
        ]
        if of_channels:
            norms = channel_norms(
                [values[index] for index in of_channels],
                [self.masks[index].dim for index in of_channels],
                self.masks[of_channels[0]].rms,  # one setting of the whole configuration
            )
            for index, of_weight in zip(of_channels, norms, strict=True):
                values[index] = of_weight
        return values
