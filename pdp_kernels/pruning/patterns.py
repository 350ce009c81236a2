"""Patterns of pruning: what a sparsity counts, which weights fit, and which mask they get."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from pdp_kernels.functional.validation import cut_groups
from pdp_kernels.ops.arguments import MAX_GROUP
from pdp_kernels.pruning.layers import WeightSlot, weight_slots
from pdp_kernels.pruning.masks import ChannelMask, GroupMask, UnstructuredMask, WeightMask
from pdp_kernels.pruning.recommended import (
    CHANNEL_RELATIVE_TAU,
    FINETUNING,
    FROM_SCRATCH,
    GROUP_GRADIENT_TAU,
    GROUPS_FINETUNING,
    GROUPS_FROM_SCRATCH,
    RELATIVE_TAU,
    SPARSE_GROUPS_FINETUNING,
    SPARSE_GROUPS_FROM_SCRATCH,
    Recommended,
)


class Pattern(ABC):
    """What is pruned together. Equal patterns of a configuration share its global budget.

    Attributes:
        relative_tau: the recommended temperature, as in `PDPConfig`.
        gradient_tau: the recommended one of the gradient, relative.
    """

    relative_tau: ClassVar[tuple[float, float]] = RELATIVE_TAU
    gradient_tau: ClassVar[float] = 0.0

    @property
    def fixed_sparsity(self) -> float | None:
        """The only sparsity that the pattern has, or None if any will do."""
        return None

    def recommended(self, finetuning: bool = False) -> Recommended:
        """Return the recommended setting of a training, from scratch or of a trained network."""
        return FINETUNING if finetuning else FROM_SCRATCH

    @abstractmethod
    def units(self, weight: Tensor, slot: WeightSlot) -> int:
        """Return the number of units that a sparsity counts in a weight: weights or channels."""

    @abstractmethod
    def misfit(self, weight: Tensor, slot: WeightSlot, layers: Sequence[nn.Module]) -> str | None:
        """Return what the weight of these layers must be and is not, or None if it fits."""

    @abstractmethod
    def new_mask(self, slot: WeightSlot, relative: bool) -> WeightMask:
        """Return a mask for one weight."""


@dataclass(frozen=True)
class UnstructuredPattern(Pattern):
    """Single weights."""

    def __str__(self) -> str:
        return "unstructured"

    def units(self, weight: Tensor, slot: WeightSlot) -> int:
        return weight.numel()

    def misfit(self, weight: Tensor, slot: WeightSlot, layers: Sequence[nn.Module]) -> str | None:
        return None

    def new_mask(self, slot: WeightSlot, relative: bool) -> WeightMask:
        return UnstructuredMask(relative)


@dataclass(frozen=True)
class GroupPattern(Pattern):
    """N:M: N weights are kept of every M consecutive inputs."""

    n: int
    m: int
    gradient_tau = GROUP_GRADIENT_TAU

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def fixed_sparsity(self) -> float:
        return 1 - self.n / self.m

    def recommended(self, finetuning: bool = False) -> Recommended:
        if 2 * self.n < self.m:
            return SPARSE_GROUPS_FINETUNING if finetuning else SPARSE_GROUPS_FROM_SCRATCH
        return GROUPS_FINETUNING if finetuning else GROUPS_FROM_SCRATCH

    def units(self, weight: Tensor, slot: WeightSlot) -> int:
        return weight.numel()

    def misfit(self, weight: Tensor, slot: WeightSlot, layers: Sequence[nn.Module]) -> str | None:
        if unknown := _unknown_dimensions(weight, layers):
            return unknown
        if weight.shape[slot.inputs] % self.m:
            return (
                f"must have a number of inputs that is divisible by M = {self.m}, got shape "
                f"{tuple(weight.shape)}"
            )
        if placements := cut_groups(weight, self.m, slot.inputs):
            return (
                f"must not be sharded through groups of {self.m} inputs, got shape "
                f"{tuple(weight.shape)} with {placements}"
            )
        return None

    def new_mask(self, slot: WeightSlot, relative: bool) -> WeightMask:
        return GroupMask(relative, self.n, self.m, slot.inputs)


@dataclass(frozen=True)
class ChannelPattern(Pattern):
    """Whole channels.

    Attributes:
        channels: "output" or "input".
        norm: "rms" or "l2", by which channels are compared.
    """

    channels: str
    norm: str
    relative_tau = CHANNEL_RELATIVE_TAU

    def __str__(self) -> str:
        return "channel"

    def units(self, weight: Tensor, slot: WeightSlot) -> int:
        return weight.shape[self._dim(slot)]

    def misfit(self, weight: Tensor, slot: WeightSlot, layers: Sequence[nn.Module]) -> str | None:
        if unknown := _unknown_dimensions(weight, layers):
            return unknown
        if self._dim(slot) != 1 or all(getattr(layer, "groups", 1) == 1 for layer in layers):
            return None
        return (
            f"must not be that of a grouped convolution, whose {self.channels} channels are not "
            "along one dimension"
        )

    def new_mask(self, slot: WeightSlot, relative: bool) -> WeightMask:
        return ChannelMask(relative, self._dim(slot), self.norm == "rms")

    def _dim(self, slot: WeightSlot) -> int:
        return slot.outputs if self.channels == "output" else slot.inputs


def _unknown_dimensions(weight: Tensor, layers: Sequence[nn.Module]) -> str | None:
    """Return that nothing tells which dimensions are inputs and outputs, or None if it is known."""
    if weight.dim() < 3 or weight_slots(layers[0]):
        return None
    return (
        f'must have the pattern "unstructured", as nothing tells which of its dimensions are '
        f"inputs and outputs, got shape {tuple(weight.shape)} in a {type(layers[0]).__name__}"
    )


def parse_pattern(name: str, pattern: str, channels: str, norm: str) -> Pattern:
    """Return the pattern that a configuration spells "unstructured", "channel" or "N:M".

    Args:
        name: of the value, for the error.
        pattern: the spelling.
        channels: which channels "channel" prunes, "output" or "input".
        norm: by which "channel" compares them, "rms" or "l2".

    Raises:
        ValueError: another spelling.
    """
    if pattern == "unstructured":
        return UnstructuredPattern()
    if pattern == "channel":
        return ChannelPattern(channels, norm)
    n, colon, m = pattern.partition(":") if isinstance(pattern, str) else ("", "", "")
    if colon and n.isdecimal() and m.isdecimal() and 1 <= int(n) < int(m) <= MAX_GROUP:
        return GroupPattern(int(n), int(m))
    raise ValueError(
        f'{name} must be "unstructured", "channel" or "N:M" with 1 <= N < M <= {MAX_GROUP}, '
        f"got {pattern!r}"
    )
