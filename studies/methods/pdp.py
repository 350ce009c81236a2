"""PDP with and without its soft mask.

Minsik Cho, Saurabh Adya, Devang Naik, "PDP: Parameter-free Differentiable Pruning is All You Need",
arXiv 2305.11203.
"""

from typing import Any

from torch import nn

from pdp_kernels import PDPConfig, PDPPruner, pdp_thresholds
from studies.methods.base import (
    Budget,
    Masking,
    Method,
    global_masks,
    names_behind_norms,
    sparsity_of,
)


class PDP(Method):
    """PDP by `PDPPruner`, with the recommended setting.

    A batch norm scales masked outputs up again. Channels that go through one are pruned as the
    inputs of the layer behind it.

    Args:
        model: The network to prune.
        budget: What is pruned and when.
        update_interval: Epochs between two calls of the pruner; 0 is every optimizer step.
        finetuning: Whether the network is trained already: the recommended setting for that.
        paper: Whether to take the paper's setting, with warm-up and ramp of the budget.
        options: Settings of PDPConfig that replace those of the budget.
    """

    soft = True

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        *,
        update_interval: float = 0.0,
        finetuning: bool = False,
        paper: bool = False,
        **options: Any,
    ):
        if update_interval < 0:
            raise ValueError(f"update_interval must be at least 0, got {update_interval}")
        self.prunes_inputs = False
        if budget.pattern == "channel" and (behind := names_behind_norms(model, budget)):
            self.prunes_inputs = True
            budget = budget._replace(include=tuple(behind))
            options = {"channel_dim": "input"} | options
        super().__init__(model, budget)
        self.update_interval = update_interval
        sparsity = budget.sparsity if ":" not in budget.pattern else None
        times = {"warmup": budget.warmup, "ramp": budget.ramp}
        options = times | {"pattern": budget.pattern, "include": self.names} | options
        if paper:
            config = PDPConfig.paper(sparsity, **options)
        else:
            make = PDPConfig.for_finetuning if finetuning else PDPConfig.for_epochs
            config = make(sparsity, budget.epochs, **options)
        self.pruner = PDPPruner(model, config)

    def step(self, progress: float) -> None:
        if not self.update_interval or self.due(progress, self.update_interval):
            self.pruner.step(progress)

    def finalize(self) -> None:
        self.pruner.finalize()

    def sparsity(self) -> float:
        layers = self.layers
        if not self.pruner.finalized:
            pruned = self.pruner.pruned_copy()
            layers = [pruned.get_submodule(name) for name in self.names]
        weights = [layer.weight for layer in layers]
        if self.prunes_inputs:
            weights = [weight.transpose(0, 1) for weight in weights]
        return sparsity_of(weights, self.budget)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"pruner": self.pruner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.pruner.load_state_dict(state["pruner"])


class HardPDP(Masking):
    """PDP with a hard mask at every step instead of the soft one, as in the paper's Table 12.

    At the end of the warm-up one global threshold sets the final sparsity of each layer
    (Algorithm 1); the ramp is linear.
    """

    def __init__(self, model: nn.Module, budget: Budget):
        super().__init__(model, budget)
        self.sparsities: list[float] | None = None

    def step(self, progress: float) -> None:
        if progress < self.budget.warmup:
            return
        weights = self.plain_weights()
        if self.sparsities is None:
            masks = global_masks(weights, self.budget.sparsity)
            self.sparsities = [1 - mask.double().mean().item() for mask in masks]
        ramp = self.budget.ramp_at(progress, "linear")
        thresholds = pdp_thresholds(weights, [ramp * sparsity for sparsity in self.sparsities])
        self.set_masks(
            [weight.detach().abs() > t for weight, t in zip(weights, thresholds, strict=True)]
        )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"sparsities": self.sparsities}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.sparsities = state["sparsities"]
