"""What all methods that prune a network during training have in common.

A method parametrizes every prunable weight w, so that the network computes with w_hat. It updates
its masks after optimizer steps. `finalize` leaves plain weights with the exact number of zeros that
the budget asks for.
"""

import math
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pdp_kernels import hard_mask, hard_mask_nm

UPDATE_INTERVAL = 0.2  # at most, epochs between mask updates of gradual methods: 94 steps on MNIST
RAMP_UPDATES = 30  # updates in a ramp, at least, where it has so many steps


class Budget(NamedTuple):
    """How many of which weights are pruned, and when. Every method gets the same."""

    sparsity: float  # fraction of all prunable weights
    epochs: float
    warmup: float  # epochs without pruning
    ramp: float  # epochs in which the sparsity grows
    pattern: str = "unstructured"  # or N:M, such as "2:4", of which the sparsity is 1 - N/M; or
    # channel: whole output channels, of which `sparsity` is the fraction
    include: tuple[str, ...] = ("*",)  # globs of names of layers that are pruned
    exclude: tuple[str, ...] = ()  # globs of names of layers that stay dense all the same

    def ramp_at(self, progress: float, shape: str = "cubic") -> float:
        """Return the fraction of the final sparsity at this progress in epochs."""
        passed = max(0.0, progress - self.warmup)
        x = 1.0 if passed >= self.ramp else passed / self.ramp
        return 1 - (1 - x) ** 3 if shape == "cubic" else x

    def sparsity_at(self, progress: float) -> float:
        """Return the sparsity at this progress in epochs, on the cubic ramp."""
        return self.sparsity * self.ramp_at(progress)


class Method:
    """Dense training, and the base of all methods.

    Attributes:
        layers: Linear and Conv2d layers whose weights are pruned.
        soft: Whether the network in training mode has other weights than the pruned one.
    """

    soft = False

    def __init__(self, model: nn.Module, budget: Budget):
        self.budget = budget
        self.updates = 0
        self.names = prunable_names(model, budget)
        self.layers = [model.get_submodule(name) for name in self.names]
        for layer in self.layers:
            if (transform := self.transform(layer.weight)) is not None:
                parametrize.register_parametrization(layer, "weight", transform)

    def transform(self, weight: Tensor) -> nn.Module | None:
        """Return the module that maps w to w_hat; its parameters are trained with the weights."""
        return None

    def own_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the method trains besides the weights."""
        return [
            parameter
            for transform in self.transforms()
            for parameter in transform.parameters(recurse=False)
        ]

    def own_weight_decay(self) -> float:
        """Return the weight decay of the own parameters."""
        return 0.0

    def own_rate(self, progress: float) -> float:
        """Return the learning rate of the own parameters relative to that of the weights."""
        return 1.0

    def step(self, progress: float) -> None:
        """Update the masks. Call after each optimizer step, with the progress in epochs."""

    def due(self, progress: float, interval: float | None = None) -> bool:
        """Return whether an interval of so many epochs has ended since the last update.

        None is that of gradual methods.
        """
        if interval is None:
            interval = min(UPDATE_INTERVAL, self.budget.ramp / RAMP_UPDATES or UPDATE_INTERVAL)
        # Progress is a sum of fractions, and its rounding must not delay an update.
        updates = int(progress / interval + 1e-6)
        is_due, self.updates = updates > self.updates, updates
        return is_due

    @torch.no_grad()
    def finalize(self) -> None:
        """Make w_hat the weights, and prune by magnitude to the exact number of zeros."""
        for layer in self.layers:
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight")
        weights = [layer.weight for layer in self.layers]
        masks = largest_masks(weights, self.budget)
        for weight, mask in zip(weights, masks, strict=True):
            weight.mul_(mask)

    @torch.no_grad()
    def sparsity(self) -> float:
        """Return the fraction of zeros in what the network computes with: weights or channels."""
        return sparsity_of([layer.weight for layer in self.layers], self.budget)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the model's state_dict does not hold."""
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict returned."""
        self.updates = state["updates"]

    def transforms(self) -> list[nn.Module]:
        """Return the modules that map w to w_hat, in the order of `layers`."""
        return [
            layer.parametrizations.weight[0]
            for layer in self.layers
            if parametrize.is_parametrized(layer, "weight")
        ]

    def plain_weights(self) -> list[Tensor]:
        """Return the weights w, before they are transformed."""
        return [
            layer.parametrizations.weight.original
            if parametrize.is_parametrized(layer, "weight")
            else layer.weight
            for layer in self.layers
        ]


def prunable_names(model: nn.Module, budget: Budget) -> list[str]:
    """Return names of Linear and Conv2d layers; for N:M, those with a multiple of M inputs."""

    def matches(name: str, globs: tuple[str, ...]) -> bool:
        return any(fnmatchcase(name, glob) for glob in globs)

    names = []
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        if not matches(name, budget.include) or matches(name, budget.exclude):
            continue
        if ":" not in budget.pattern or layer.weight.shape[1] % group_size(budget.pattern)[1] == 0:
            names.append(name)
    return names


def layers_behind(model: nn.Module, layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the linear layers, convolutions and batch norms behind a layer, with their names.

    They are in the order in which the network has them.
    """
    kinds = (nn.Linear, nn.Conv2d, nn.BatchNorm2d)
    ordered = [(name, each) for name, each in model.named_modules() if isinstance(each, kinds)]
    place = next(place for place, (_, each) in enumerate(ordered) if each is layer)
    return ordered[place + 1 :]


def names_behind_norms(model: nn.Module, budget: Budget) -> list[str]:
    """Return the layers behind those of the budget, if a batch norm lies behind each of these.

    Otherwise return an empty list.
    """
    names = []
    for name in prunable_names(model, budget):
        behind = layers_behind(model, model.get_submodule(name))
        if len(behind) < 2 or not isinstance(behind[0][1], nn.BatchNorm2d):
            return []
        names.append(behind[1][0])
    return names


def group_size(pattern: str) -> tuple[int, int]:
    """Return N and M of a pattern such as "2:4"."""
    n, m = pattern.split(":")
    return int(n), int(m)


def largest_masks(weights: list[Tensor], budget: Budget) -> list[Tensor]:
    """Return masks that keep the largest magnitudes, as many as the budget's pattern keeps.

    Unstructured masks have one threshold for all layers. Masks of channels keep those of the
    largest L2 norms over sqrt(fan-in), with one threshold for all layers too.
    """
    if budget.pattern == "unstructured":
        return global_masks(weights, budget.sparsity)
    if budget.pattern == "channel":
        return channel_masks([channel_norms(weight) for weight in weights], weights, budget)
    return [hard_mask_nm(weight, *group_size(budget.pattern), dim=1) for weight in weights]


def sparsity_of(weights: list[Tensor], budget: Budget) -> float:
    """Return the fraction of zeros among all weights, or among all channels."""
    if budget.pattern == "channel":
        weights = [channel_norms(weight) for weight in weights]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


def channel_norms(weight: Tensor) -> Tensor:
    """Return the L2 norm of each output channel over sqrt(fan-in), (channels,)."""
    rows = weight.detach().flatten(1)
    return rows.norm(dim=1) / rows.shape[1] ** 0.5


def channel_masks(scores: list[Tensor], weights: list[Tensor], budget: Budget) -> list[Tensor]:
    """Return masks of the weights that keep the channels with the largest scores over all layers.

    Scores of a layer: (channels,), none negative.
    """
    masks = []
    for kept, weight in zip(global_masks(scores, budget.sparsity), weights, strict=True):
        masks.append(kept.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight))
    return masks


def global_masks(weights: list[Tensor], sparsity: float) -> list[Tensor]:
    """Return masks that keep the largest magnitudes over all layers; the total is exact."""
    kept = hard_mask(flat(weights), sparsity).split([weight.numel() for weight in weights])
    return [mask.view(weight.shape) for mask, weight in zip(kept, weights, strict=True)]


def flat(weights: list[Tensor]) -> Tensor:
    """Return all weights in one vector."""
    return torch.cat([weight.detach().flatten() for weight in weights])


def layer_counts(weights: list[Tensor], sparsity: float) -> list[int]:
    """Return how many weights to prune in each layer: the same fraction, and exact in total."""
    ends = [0]
    for weight in weights:
        ends.append(ends[-1] + weight.numel())
    pruned = [math.floor(sparsity * end + 0.5) for end in ends]
    return [after - before for before, after in pairwise(pruned)]


def layer_masks(weights: list[Tensor], sparsity: float) -> list[Tensor]:
    """Return masks that keep the largest magnitudes of each layer, with one sparsity for all."""
    counts = layer_counts(weights, sparsity)
    return [
        hard_mask(weight, count / weight.numel())
        for weight, count in zip(weights, counts, strict=True)
    ]


class Mask(nn.Module):
    """w_hat = mask w. Only kept weights receive a gradient."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Masking(Method):
    """Base of the methods that update a mask at intervals."""

    def transform(self, weight: Tensor) -> nn.Module:
        return Mask(weight)

    def set_masks(self, masks: list[Tensor]) -> None:
        """Replace the masks, given in the order of `layers`."""
        for transform, mask in zip(self.transforms(), masks, strict=True):
            transform.mask.copy_(mask)
