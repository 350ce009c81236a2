"""The pruning methods that the studies compare, by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from studies.methods.base import Budget, Method
from studies.methods.learned import DNW, SRSTE, STR, Movement, OptG
from studies.methods.magnitude import ACDC, GMP, GlobalGMP, GraNet
from studies.methods.pdp import PDP, HardPDP

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
    """Apply the method of this name to the model and return it. Call before the optimizer is made.

    Args:
        name: A key of METHODS.
        model: The network; its prunable layers change.
        budget: What is pruned and when.
        options: Settings of the method.

    Raises:
        ValueError: The method cannot prune the budget's pattern.
    """
    grouped = ":" in budget.pattern
    if grouped and name not in NM_METHODS:
        raise ValueError(f"method with an N:M pattern must be one of {NM_METHODS}, got {name!r}")
    if name == "sr-ste" and not grouped:
        raise ValueError(f"method sr-ste must have an N:M pattern, got {budget.pattern!r}")
    if name == "dense":
        budget = budget._replace(sparsity=0.0, pattern="unstructured")
    return METHODS[name](model, budget, **options)
