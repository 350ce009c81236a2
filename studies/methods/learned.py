"""Methods that go on training pruned weights, or that train scores or thresholds."""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from pdp_kernels import hard_mask, hard_mask_nm, pdp_threshold
from studies.methods.base import (
    Budget,
    Mask,
    Masking,
    Method,
    flat,
    global_masks,
    group_size,
    layer_counts,
)


class StraightThrough(torch.autograd.Function):
    """w_hat = mask w. All weights receive the gradient; `decay` pulls pruned ones towards 0."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.decay = decay
        if decay:
            ctx.save_for_backward(weight * ~mask)
        return weight * mask

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.decay:
            gradient = gradient + ctx.decay * ctx.saved_tensors[0]
        return gradient, None, None


class DNW(Method):
    """The largest magnitudes of each layer are kept, with one sparsity from the first step on.

    Mitchell Wortsman, Ali Farhadi, Mohammad Rastegari, "Discovering Neural Wirings", arXiv
    1906.00586: pruned weights receive the gradient as if they were used.
    """

    def __init__(self, model: nn.Module, budget: Budget):
        super().__init__(model, budget)
        weights = [layer.parametrizations.weight.original for layer in self.layers]
        counts = layer_counts(weights, budget.sparsity)
        for transform, weight, count in zip(self.transforms(), weights, counts, strict=True):
            transform.sparsity = count / weight.numel()

    def transform(self, weight: Tensor) -> nn.Module:
        return LargestMagnitudes()


class LargestMagnitudes(nn.Module):
    """Keeps the largest magnitudes, with a straight-through gradient."""

    sparsity = 0.0

    def forward(self, weight: Tensor) -> Tensor:
        return StraightThrough.apply(weight, hard_mask(weight, self.sparsity), 0.0)


class SRSTE(Method):
    """N:M from the first step on, with the decay lambda_W = 2e-4.

    Aojun Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
    arXiv 2102.04010; PDP's paper calls it LNM.
    """

    def transform(self, weight: Tensor) -> nn.Module:
        return LargestOfGroup(*group_size(self.budget.pattern))


class LargestOfGroup(nn.Module):
    """Keeps the N largest magnitudes of every M inputs, with a straight-through gradient."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.n, self.m = n, m

    def forward(self, weight: Tensor) -> Tensor:
        return StraightThrough.apply(weight, hard_mask_nm(weight, self.n, self.m, dim=1), 2e-4)


class STR(Method):
    """A learned threshold for each layer: w_hat = sign(w) max(0, |w| - sigmoid(s)).

    s starts where nothing is pruned. Weight decay raises it, the loss lowers it. The final sparsity
    cannot be set: on MNIST the MLP ended at 80.5, 91.5 and 97.5% with decays of 0.001, 0.003 and
    0.01, from which the default follows.
    Aditya Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity",
    arXiv 2002.03231.
    """

    start = -8.0  # a threshold of 0.0003

    def __init__(self, model: nn.Module, budget: Budget, decay: float | None = None):
        super().__init__(model, budget)
        self.decay = 2.5e-4 / (1 - budget.sparsity) if decay is None else decay

    def transform(self, weight: Tensor) -> nn.Module:
        return SoftThreshold(weight.new_tensor(self.start))

    def own_weight_decay(self) -> float:
        return self.decay

    @torch.no_grad()
    def finalize(self) -> None:
        """Prune to the exact sparsity by |w| - sigmoid(s) over all layers.

        Where STR pruned too many weights, those nearest to their thresholds return, as if all
        thresholds were lower by the amount that lets enough of them pass. The others stay as they
        were trained: lower thresholds would change them all, which costs 0.8 points of accuracy at
        99% on MNIST.
        """
        margins = [
            (weight.abs() - torch.sigmoid(transform.s)).double()
            for weight, transform in zip(self.plain_weights(), self.transforms(), strict=True)
        ]
        # Thresholds are less than 1, so margins plus 1 are positive and rank like magnitudes.
        shifted = [margin + 1 for margin in margins]
        masks = global_masks(shifted, self.budget.sparsity)
        together = flat(shifted)
        # Halfway between pruned and kept ones, or where there are no pruned ones the least of all.
        passing = pdp_threshold(together, self.budget.sparsity).maximum(together.min()) - 1
        for weight, margin, mask in zip(self.plain_weights(), margins, masks, strict=True):
            size = torch.where(margin > 0, margin, margin - passing)
            weight.copy_(weight.sign() * size * mask)
        for transform in self.transforms():
            transform.s.fill_(-math.inf)
        super().finalize()


class SoftThreshold(nn.Module):
    """Shrinks weights by sigmoid(s), which is learned."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.s = nn.Parameter(start)

    def forward(self, weight: Tensor) -> Tensor:
        return Shrink.apply(weight, torch.sigmoid(self.s))


class Shrink(torch.autograd.Function):
    """sign(w) max(0, |w| - t), three times as fast as autograd through its operations."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, threshold: Tensor) -> Tensor:
        signs = weight.sign() * (weight.abs() > threshold)  # 0 where pruned
        ctx.save_for_backward(signs)
        return weight * signs.abs() - threshold * signs

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (signs,) = ctx.saved_tensors
        return gradient * signs.abs(), -(gradient * signs).sum()


class Movement(Masking):
    """Each weight has a learned score, and the largest scores are kept, on a cubic ramp.

    Scores receive the gradient as if all weights were used, so that a score sums up how far its
    weight moved away from 0. The threshold is global. Victor Sanh, Thomas Wolf, Alexander M.
    Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", arXiv 2005.07683.
    """

    def transform(self, weight: Tensor) -> nn.Module:
        return ScoredMask(weight)

    def step(self, progress: float) -> None:
        if progress >= self.budget.warmup and self.due(progress):
            self.keep_best(self.budget.sparsity_at(progress))

    @torch.no_grad()
    def keep_best(self, sparsity: float) -> None:
        """Set masks that keep the largest scores over all layers."""
        scores = [transform.scores for transform in self.transforms()]
        least = torch.stack([score.min() for score in scores]).min()
        # Shifted so that the least is 0, scores rank like magnitudes.
        self.set_masks(global_masks([score - least for score in scores], sparsity))

    def finalize(self) -> None:
        self.keep_best(self.budget.sparsity)
        super().finalize()


class ScoredMask(Mask):
    """w_hat = mask w. All scores receive a gradient, and the weights that are kept."""

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.scores = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.mask + (self.scores - self.scores.detach()))


class OptG(Movement):
    """Movement pruning that updates masks once an epoch, on a ramp of its own.

    Sparsity and the learning rate of the scores rise as sigmoid(e - E / 2) in epoch e of E.
    Yuxin Zhang et al., "OptG: Optimizing Gradient-driven Criteria in Network Sparsity",
    arXiv 2201.12826.
    """

    def own_rate(self, progress: float) -> float:
        return 1 / (1 + math.exp(self.budget.epochs / 2 - int(progress)))

    def step(self, progress: float) -> None:
        if self.due(progress, 1.0):
            self.keep_best(self.budget.sparsity * self.own_rate(progress))
