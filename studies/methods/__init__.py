"""The pruning methods that the studies compare, by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from studies.methods.base import Budget, Method
from studies.methods.learned import DNW, SRSTE, STR, Movement, OptG
from studies.methods.magnitude import ACDC, GMP, GlobalGMP, GraNet, OneShot, Slimming
from studies.methods.pdp import PDP, HardPDP

METHODS: dict[str, Callable[..., Method]] = {
    "dense": Method,
    "pdp": PDP,
    "pdp-paper": partial(PDP, paper=True),
    "pdp-hard": HardPDP,
    "one-shot": OneShot,
    "gmp": GMP,
    "gmp-global": GlobalGMP,
    "granet": GraNet,
    "acdc": ACDC,
    "str": STR,
    "dnw": DNW,
    "optg": OptG,
    "movement": Movement,
    "sr-ste": SRSTE,
    "slimming": Slimming,
}

# The methods of each pattern. Those for unstructured sparsity are all that need no other pattern.
NM_METHODS = ("dense", "pdp", "pdp-paper", "one-shot", "sr-ste")
CHANNEL_METHODS = ("dense", "pdp", "pdp-paper", "one-shot", "slimming")
UNSTRUCTURED_METHODS: tuple[str, ...] = tuple(
    name for name in METHODS if name not in ("sr-ste", "slimming")
)


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
    pattern = budget.pattern
    kind = "an N:M" if ":" in pattern else f"the {pattern}"
    methods = {"unstructured": UNSTRUCTURED_METHODS, "channel": CHANNEL_METHODS}
    if name not in (accepted := methods.get(pattern, NM_METHODS)):
        raise ValueError(f"method with {kind} pattern must be one of {accepted}, got {name!r}")
    if name == "dense":
        budget = budget._replace(sparsity=0.0, pattern="unstructured")
    return METHODS[name](model, budget, **options)
