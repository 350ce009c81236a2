"""What all ways to prune a network while it trains have in common.

A method gives every prunable weight w a transform, so that the network computes with w_hat; it
changes its masks after every step of the optimizer; and its `finalize` leaves plain weights with
exactly the asked-for number of zeros. `methods.py` lists them all.
"""

import math
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pdp_kernels import hard_mask

UPDATE_INTERVAL = 0.2  # epochs between two masks of gradual methods: 94 steps on MNIST


class Budget(NamedTuple):
    """How much of which weights is pruned, and when; the same for every method."""

    sparsity: float  # of all prunable weights together
    epochs: float
    warmup: float  # epochs without pruning
    ramp: float  # epochs in which the sparsity grows
    pattern: str = "unstructured"  # or N:M, such as "2:4", of which the sparsity is 1 - N/M
    exclude: tuple[str, ...] = ()  # globs of names of layers that stay dense

    def ramp_at(self, progress: float, shape: str = "cubic") -> float:
        """The share of the sparsity that is asked for at this progress, in epochs."""
        passed = max(0.0, progress - self.warmup)
        x = 1.0 if passed >= self.ramp else passed / self.ramp
        return 1 - (1 - x) ** 3 if shape == "cubic" else x

    def sparsity_at(self, progress: float) -> float:
        return self.sparsity * self.ramp_at(progress)


class Method:
    """Dense training, and what all methods share.

    layers: the Linear and Conv2d layers whose weights are pruned.
    soft: whether training computes with other weights than the pruned network.
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
        """What makes w_hat of w; its parameters are learned with the weights."""
        return None

    def own_parameters(self) -> list[nn.Parameter]:
        """What the method learns beside the weights."""
        return [
            parameter
            for transform in self.transforms()
            for parameter in transform.parameters(recurse=False)
        ]

    def own_weight_decay(self) -> float:
        return 0.0

    def own_rate(self, progress: float) -> float:
        """The learning rate of the own parameters, as a factor of the weights'."""
        return 1.0

    def step(self, progress: float) -> None:
        """To be called after each step of the optimizer; progress in epochs."""

    def due(self, progress: float, interval: float = UPDATE_INTERVAL) -> bool:
        """Whether another interval of so many epochs is over."""
        # Progress is a sum of fractions: let rounding not move an update to the next step.
        updates = int(progress / interval + 1e-6)
        is_due, self.updates = updates > self.updates, updates
        return is_due

    @torch.no_grad()
    def finalize(self) -> None:
        """Makes w_hat the weights, and prunes by magnitude to the exact number of zeros."""
        for layer in self.layers:
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight")
        masks = global_masks([layer.weight for layer in self.layers], self.budget.sparsity)
        for layer, mask in zip(self.layers, masks, strict=True):
            layer.weight.mul_(mask)

    @torch.no_grad()
    def sparsity(self) -> float:
        """The share of zeros among the weights that the network computes with."""
        weights = [layer.weight for layer in self.layers]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        return zeros / sum(weight.numel() for weight in weights)

    def state_dict(self) -> dict[str, Any]:
        """What is not part of the model's own state."""
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]

    def transforms(self) -> list[nn.Module]:
        return [
            layer.parametrizations.weight[0]
            for layer in self.layers
            if parametrize.is_parametrized(layer, "weight")
        ]

    def plain_weights(self) -> list[Tensor]:
        """The weights before their transforms."""
        return [layer.parametrizations.weight.original for layer in self.layers]


def prunable_names(model: nn.Module, budget: Budget) -> list[str]:
    """The Linear and Conv2d layers; with N:M those whose inputs divide into groups of M."""
    names = []
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        if any(fnmatchcase(name, glob) for glob in budget.exclude):
            continue
        if ":" not in budget.pattern or layer.weight.shape[1] % group_size(budget.pattern)[1] == 0:
            names.append(name)
    return names


def group_size(pattern: str) -> tuple[int, int]:
    """N and M of a pattern such as "2:4"."""
    n, m = pattern.split(":")
    return int(n), int(m)


def global_masks(weights: list[Tensor], sparsity: float) -> list[Tensor]:
    """All but the largest magnitudes of all layers together, exactly."""
    kept = hard_mask(flat(weights), sparsity)
    parts = kept.split([weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def flat(weights: list[Tensor]) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in weights])


def layer_counts(weights: list[Tensor], sparsity: float) -> list[int]:
    """The same share of every layer, rounded so that the sum is that of all weights together."""
    ends = [0]
    for weight in weights:
        ends.append(ends[-1] + weight.numel())
    pruned = [math.floor(sparsity * end + 0.5) for end in ends]
    return [after - before for before, after in pairwise(pruned)]


def layer_masks(weights: list[Tensor], sparsity: float) -> list[Tensor]:
    """All but the largest magnitudes of each layer, the same share of each."""
    counts = layer_counts(weights, sparsity)
    return [
        hard_mask(weight, count / weight.numel())
        for weight, count in zip(weights, counts, strict=True)
    ]


class Mask(nn.Module):
    """w_hat = mask w; the gradient reaches what is kept alone."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Masking(Method):
    """What methods share that change their masks now and then."""

    def transform(self, weight: Tensor) -> nn.Module:
        return Mask(weight)

    def set_masks(self, masks: list[Tensor]) -> None:
        for transform, mask in zip(self.transforms(), masks, strict=True):
            transform.mask.copy_(mask)
