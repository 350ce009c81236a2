"""PDP with and without its soft mask, and the list of all methods."""

from collections.abc import Callable
from functools import partial
from typing import Any

from learned_methods import DNW, SRSTE, STR, Movement, OptG
from magnitude_methods import ACDC, GMP, GlobalGMP, GraNet
from method import Budget, Masking, Method, global_masks
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner, pdp_thresholds


class PDP(Method):
    """PDP by `PDPPruner`, with the recommended setting unless options of PDPConfig change it.

    paper: the paper's own setting instead, but for the times of the budget.
    update_interval: epochs between two calls of the pruner; 0 is each step of the optimizer.
    """

    soft = True

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        *,
        update_interval: float = 0.0,
        paper: bool = False,
        **options: Any,
    ):
        if update_interval < 0:
            raise ValueError(f"update_interval must be at least 0, got {update_interval}")
        super().__init__(model, budget)
        self.update_interval = update_interval
        sparsity = budget.sparsity if ":" not in budget.pattern else None
        times = {"warmup": budget.warmup, "ramp": budget.ramp}
        options = times | {"pattern": budget.pattern, "include": self.names} | options
        if paper:
            config = PDPConfig.paper(sparsity, **options)
        else:
            config = PDPConfig.for_epochs(sparsity, budget.epochs, **options)
        self.pruner = PDPPruner(model, config)

    def step(self, progress: float) -> None:
        if not self.update_interval or self.due(progress, self.update_interval):
            self.pruner.step(progress)

    def finalize(self) -> None:
        self.pruner.finalize()

    def sparsity(self) -> float:
        return self.pruner.report().sparsity

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"pruner": self.pruner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.pruner.load_state_dict(state["pruner"])


class HardPDP(Masking):
    """PDP without its soft mask, as in Table 12 of its paper: a hard one at every step.

    One threshold over all layers at the end of the warm-up says how much each of them loses in the
    end; ramp linear. Minsik Cho, Saurabh Adya, Devang Naik, "PDP: Parameter-free Differentiable
    Pruning is All You Need", arXiv 2305.11203, Algorithm 1.
    """

    def __init__(self, model: nn.Module, budget: Budget):
        super().__init__(model, budget)
        self.shares: list[float] | None = None

    def step(self, progress: float) -> None:
        if progress < self.budget.warmup:
            return
        weights = self.plain_weights()
        if self.shares is None:
            masks = global_masks(weights, self.budget.sparsity)
            self.shares = [1 - mask.double().mean().item() for mask in masks]
        ramp = self.budget.ramp_at(progress, "linear")
        thresholds = pdp_thresholds(weights, [ramp * share for share in self.shares])
        self.set_masks(
            [weight.detach().abs() > t for weight, t in zip(weights, thresholds, strict=True)]
        )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"shares": self.shares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.shares = state["shares"]


METHODS: dict[str, Callable[..., Method]] = {
    "dense": Method,
    "pdp": PDP,
    "pdp-paper": partial(PDP, paper=True),
    "pdp-hard": HardPDP,
    "gmp": GMP,
    "gmp-global": GlobalGMP,
    "granet": GraNet,
    "acdc": ACDC,
    "str": STR,
    "dnw": DNW,
    "optg": OptG,
    "movement": Movement,
    "sr-ste": SRSTE,
}
NM_METHODS = ("dense", "pdp", "pdp-paper", "sr-ste")


def make_method(name: str, model: nn.Module, budget: Budget, **options: Any) -> Method:
    """The method of this name on the model; before the optimizer is made."""
    grouped = ":" in budget.pattern
    if grouped and name not in NM_METHODS:
        raise ValueError(f"method with an N:M pattern must be one of {NM_METHODS}, got {name!r}")
    if name == "sr-ste" and not grouped:
        raise ValueError(f"method sr-ste must have an N:M pattern, got {budget.pattern!r}")
    if name == "dense":
        budget = budget._replace(sparsity=0.0, pattern="unstructured")
    return METHODS[name](model, budget, **options)
