"""Methods that prune by magnitude and train the kept weights: one-shot, GMP, GraNet, AC/DC."""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from studies.methods.base import (
    Budget,
    Mask,
    Masking,
    channel_masks,
    global_masks,
    largest_masks,
    layer_masks,
    layers_behind,
    names_behind_norms,
)


class OneShot(Masking):
    """Dense until the end of the ramp, then pruned at once, and trained on with that mask.

    Unstructured: one threshold for all layers. N:M: the largest of each group. Channels: the same
    fraction of each layer, by their L1 norms, as Hao Li, Asim Kadav, Igor Durdanovic, Hanan Samet,
    Hans Peter Graf, "Pruning Filters for Efficient ConvNets", arXiv 1608.08710.

    Args:
        model: The network to prune.
        budget: What is pruned and when.
        by_readers: Whether to rank channels by the L1 norms of the weights that read them, behind a
            batch norm, instead of their own.
    """

    def __init__(self, model: nn.Module, budget: Budget, *, by_readers: bool = False):
        super().__init__(model, budget)
        self.readers: list[nn.Module] = []
        if by_readers:
            names = names_behind_norms(model, budget)
            if not names:
                raise ValueError("model must have a batch norm after every layer that is pruned")
            self.readers = [model.get_submodule(name) for name in names]

    def step(self, progress: float) -> None:
        # `updates` says whether the network is pruned, so that a checkpoint holds it.
        if self.updates == 0 and progress >= self.budget.warmup + self.budget.ramp - 1e-6:
            self.updates = 1
            self.set_masks(self.select(self.plain_weights()))

    def select(self, weights: list[Tensor]) -> list[Tensor]:
        """Return the masks."""
        if self.budget.pattern != "channel":
            return largest_masks(weights, self.budget)
        ranked = [reader.weight.transpose(0, 1) for reader in self.readers] or weights
        masks = []
        for weight, by in zip(weights, ranked, strict=True):
            norms = [by.detach().abs().flatten(1).sum(1)]
            masks += channel_masks(norms, [weight], self.budget)
        return masks


class Slimming(OneShot):
    """One-shot pruning of channels by the scales of their batch norms, which an L1 penalty shrinks.

    The penalty of 1e-4 ends when the network is pruned. Zhuang Liu, Jianguo Li, Zhiqiang Shen, Gao
    Huang, Shoumeng Yan, Changshui Zhang, "Learning Efficient Convolutional Networks through Network
    Slimming", arXiv 1708.06519.
    """

    penalty = 1e-4

    def __init__(self, model: nn.Module, budget: Budget):
        super().__init__(model, budget)
        self.scales: list[nn.Parameter] = []
        for layer in self.layers:
            behind = (each for _, each in layers_behind(model, layer))
            norm = next((each for each in behind if isinstance(each, nn.BatchNorm2d)), None)
            if norm is None or norm.num_features != layer.weight.shape[0]:
                raise ValueError("model must have a batch norm after every layer that is pruned")
            self.scales.append(norm.weight)
            norm.weight.register_hook(partial(self.with_penalty, norm.weight))

    def with_penalty(self, scale: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient of the loss with its penalty."""
        return gradient if self.updates else gradient + self.penalty * scale.detach().sign()

    def select(self, weights: list[Tensor]) -> list[Tensor]:
        scores = [scale.detach().abs() for scale in self.scales]
        return channel_masks(scores, weights, self.budget)


class GMP(Masking):
    """Gradual magnitude pruning: one sparsity for all layers, on a cubic ramp.

    Michael Zhu, Suyog Gupta, "To prune, or not to prune: exploring the efficacy of pruning for
    model compression", arXiv 1710.01878.
    """

    def step(self, progress: float) -> None:
        if progress >= self.budget.warmup and self.due(progress):
            self.set_masks(self.select(self.plain_weights(), self.budget.sparsity_at(progress)))

    def select(self, weights: list[Tensor], sparsity: float) -> list[Tensor]:
        """Return the masks of this sparsity."""
        return layer_masks(weights, sparsity)


class GlobalGMP(GMP):
    """GMP with one global threshold, as in AC/DC and PDP."""

    def select(self, weights: list[Tensor], sparsity: float) -> list[Tensor]:
        return global_masks(weights, sparsity)


class GraNet(Masking):
    """GMP that prunes more at each update and regrows it where gradients are largest.

    The regrown fraction of the remaining weights falls from 1/2 to 0 as a cosine. Shiwei Liu et
    al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", arXiv 2106.10404.
    The authors' code differs: the cosine ends with the training (here with the ramp), weights
    regrow layer by layer (here by one global selection), and pruned weights lose their momentum.
    """

    def transform(self, weight: Tensor) -> nn.Module:
        return MaskWithDenseGradient(weight)

    def step(self, progress: float) -> None:
        start, end = self.budget.warmup, self.budget.warmup + self.budget.ramp
        if not start <= progress or not self.due(progress):
            return
        weights, sparsity = self.plain_weights(), self.budget.sparsity_at(progress)
        regrown = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - start) / (end - start)))) / 2
        pruned = global_masks(
            [weight * transform.mask for weight, transform in self._pairs()],
            sparsity + regrown * (1 - sparsity),
        )
        with torch.no_grad():
            for weight, mask in zip(weights, pruned, strict=True):
                weight.mul_(mask)  # regrown weights start from 0
        gradients = [transform.w_hat.grad for transform in self.transforms()]
        # Weights that remain rank before all regrown ones.
        scores = [
            gradient.abs().masked_fill(mask, math.inf)
            for gradient, mask in zip(gradients, pruned, strict=True)
        ]
        self.set_masks(global_masks(scores, sparsity))

    def _pairs(self) -> Iterator[tuple[Tensor, nn.Module]]:
        """Yield each weight with its transform."""
        return zip(self.plain_weights(), self.transforms(), strict=True)


class MaskWithDenseGradient(Mask):
    """A mask that retains w_hat, whose gradient covers pruned weights too."""

    def forward(self, weight: Tensor) -> Tensor:
        w_hat = weight * self.mask
        if w_hat.requires_grad:
            w_hat.retain_grad()
            self.w_hat = w_hat
        return w_hat


class ACDC(Masking):
    """Sparse and dense phases alternate, with one global threshold.

    The phases are those of the paper's 100 epochs on ImageNet, as fractions of the training: dense
    for 10%, phases of 5%, and at the end 10% dense and 15% sparse. Alexandra Peste, Eugenia
    Iofinova, Adrian Vladu, Dan Alistarh, "AC/DC: Alternating Compressed/DeCompressed Training of
    Deep Neural Networks", arXiv 2106.12379. The authors' code resets the momentum of the optimizer
    when a phase begins, which this one does not.
    """

    def is_sparse(self, progress: float) -> bool:
        """Return whether this progress in epochs lies in a sparse phase."""
        percent = 100 * progress / self.budget.epochs + 1e-6
        if percent < 10 or 75 <= percent < 85:
            return False
        return percent >= 85 or int((percent - 10) / 5) % 2 == 0

    @torch.no_grad()
    def step(self, progress: float) -> None:
        # `updates` counts phases, so that a checkpoint holds the current one.
        sparse = self.is_sparse(progress)
        if sparse == bool(self.updates % 2):
            return
        self.updates += 1
        weights = self.plain_weights()
        if sparse:
            self.set_masks(global_masks(weights, self.budget.sparsity))
            return
        for weight, transform in zip(weights, self.transforms(), strict=True):
            weight.mul_(transform.mask)  # pruned weights start from 0
            transform.mask.fill_(1)
