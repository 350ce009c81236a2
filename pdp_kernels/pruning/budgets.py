"""Final prune counts: the sparsity of each layer, or its part of a global budget."""

import math
from collections.abc import Mapping, Sequence
from typing import cast

from pdp_kernels.functional.allocation import (
    allocate,
    check_budget,
    check_unsharded,
    largest_count,
)
from pdp_kernels.pruning.config import PDPConfig
from pdp_kernels.pruning.masks import SelectedMask, WeightMask, selection_values
from pdp_kernels.pruning.patterns import Pattern, UnstructuredPattern
from pdp_kernels.pruning.targets import Target
from pdp_kernels.pruning.user_warnings import warn_user

NEARLY_ALL = 0.99  # pruned beyond this fraction, a layer computes next to nothing


def check_budgets(targets: Sequence[Target], config: PDPConfig) -> None:
    """Raise a ValueError if a global budget cannot be allocated, whatever the weights will be."""
    for members in _budgets(targets):
        sizes = [targets[index].units for index in members]
        check_budget(sizes, _global_sparsity(config), _layer_cap(sizes, config))
        if config.allocation == "lamp":
            for target in (targets[index] for index in members):
                if isinstance(target.plan.pattern, UnstructuredPattern):
                    check_unsharded(target.weight)


def final_counts(
    targets: Sequence[Target], masks: Sequence[WeightMask], config: PDPConfig
) -> dict[str, int]:
    """Return how many units of each target are pruned in the end, from the weights as they are now.

    Args:
        targets: the weights to prune.
        masks: the mask of each target.
        config: the configuration that the targets are from.

    Returns:
        For each target's name, the number of weights or channels.
    """
    counts: dict[str, int] = {}
    for target in targets:
        if target.plan.sparsity is not None:
            counts[target.name] = math.floor(target.plan.sparsity * target.units + 0.5)
    for members in _budgets(targets):
        # A pattern that leaves the sparsity to a global budget has masks with a threshold.
        selected = [cast(SelectedMask, masks[index]) for index in members]
        weights = [targets[index].weight for index in members]
        allocated = allocate(
            selection_values(selected, weights),
            weights,
            _global_sparsity(config),
            config.allocation,
            _layer_cap([targets[index].units for index in members], config),
        )
        counts.update(zip((targets[index].name for index in members), allocated, strict=True))
    return {target.name: counts[target.name] for target in targets}


def nearly_emptied(
    targets: Sequence[Target], counts: Mapping[str, int], config: PDPConfig
) -> dict[str, float]:
    """Return the layers of which a global budget prunes far more than of the model.

    Those are layers that lose more than 99%, or all their units if the budget itself is as high.

    Returns:
        For each such target's name, the fraction that is pruned.
    """
    fractions = {
        target.name: counts[target.name] / target.units
        for target in targets
        if target.plan.sparsity is None
    }
    limit = NEARLY_ALL if not fractions or _global_sparsity(config) < NEARLY_ALL else 1.0
    return {
        name: fraction
        for name, fraction in fractions.items()
        if fraction > NEARLY_ALL and fraction >= limit
    }


def warn_of_emptied(
    targets: Sequence[Target],
    counts: Mapping[str, int],
    config: PDPConfig,
    named: set[str],
) -> None:
    """Warn of layers that a global budget nearly empties, unless all are named already.

    Args:
        targets: the weights to prune.
        counts: the final counts, by name.
        config: the configuration that they are from.
        named: the names of earlier warnings; those of this one are added.
    """
    emptied = nearly_emptied(targets, counts, config)
    if emptied.keys() <= named:
        return
    named.update(emptied)
    layers = ", ".join(f"{fraction:.1%} of {name}" for name, fraction in emptied.items())
    limit = "least_density (such as 0.5)"
    if config.max_layer_sparsity is not None:
        limit = "a lower max_layer_sparsity (such as 0.98)"
    warn_user(
        f"the global budget of {config.sparsity:.0%} prunes {layers}, whose weights are smaller "
        f"than those of other layers: set {limit} or "
        'allocation="lamp", or give them a sparsity in overrides'
    )


def _layer_cap(sizes: Sequence[int], config: PDPConfig) -> float:
    """Return the largest fraction of a layer that a budget of layers of these sizes prunes."""
    if config.max_layer_sparsity is not None:
        return config.max_layer_sparsity
    sparsity = _global_sparsity(config)
    cap = 1 - (1 - sparsity) * config.least_density
    budget = math.floor(sparsity * sum(sizes) + 0.5)
    return cap if sum(largest_count(cap, size) for size in sizes) >= budget else 1.0


def _budgets(targets: Sequence[Target]) -> list[list[int]]:
    """Return the positions of the targets of each global budget: one for each pattern."""
    budgets: dict[Pattern, list[int]] = {}
    for index, target in enumerate(targets):
        if target.plan.sparsity is None:
            budgets.setdefault(target.plan.pattern, []).append(index)
    return list(budgets.values())


def _global_sparsity(config: PDPConfig) -> float:
    """Return the sparsity of the global budgets, which is no mapping: that needs scope "layer"."""
    return cast(float, config.sparsity)
