"""Checks of a configuration's fields. Each error names the field, its value and what it accepts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pdp_kernels.functional.validation import (
    check_fraction,
    check_non_negative,
    check_number,
    check_positive,
    check_temperature,
)
from pdp_kernels.pruning.patterns import Pattern

_OVERRIDABLE = ("sparsity", "pattern", "tau", "relative_tau", "gradient_tau")


def check_sparsity(sparsity: Any, scope: str, pattern: Pattern) -> None:
    """Accept a fraction, or for each layer one, that the pattern leaves open."""
    if isinstance(sparsity, Mapping):
        _check_fractions(sparsity, scope)
    elif sparsity is not None:
        accepted = 'a number in [0, 1], or with scope "layer" a mapping from strings to them'
        check_fraction("sparsity", sparsity, accepted)
    fixed = pattern.fixed_sparsity
    if fixed is None:
        if sparsity is None:
            raise ValueError(f"sparsity must be given with pattern {str(pattern)!r}, got None")
    elif sparsity is not None and sparsity != fixed:
        raise ValueError(
            f"sparsity must be left out with pattern {pattern}, whose sparsity is {fixed}, "
            f"got {sparsity}"
        )


def _check_fractions(fractions: Mapping[Any, Any], scope: str) -> None:
    if scope != "layer":
        raise ValueError(
            f'scope must be "layer" where sparsity gives fractions by layer, got {scope!r}'
        )
    if not fractions:
        raise ValueError("sparsity must hold at least one fraction, got an empty mapping")
    for key, fraction in fractions.items():
        check_fraction(f"sparsity[{key!r}]", fraction)


def check_temperatures(prefix: str, tau: Any, relative_tau: Any) -> None:
    """Accept at most one temperature: a number or (start, end)."""
    if tau is not None and relative_tau is not None:
        raise ValueError(f"at most one of {prefix}tau and {prefix}relative_tau, got both")
    for name, value in ((f"{prefix}tau", tau), (f"{prefix}relative_tau", relative_tau)):
        if value is None:
            continue
        ends = value if isinstance(value, (tuple, list)) else (value,)
        if isinstance(value, (tuple, list)) and len(value) != 2:
            raise ValueError(f"{name} must be a number or (start, end), got {value}")
        for end in ends:
            check_number(name, end)
            check_temperature(name, end, torch.float32, torch.device("cpu"))


def check_times(warmup: Any, ramp: Any, epsilon: Any, anneal: Any, reallocate: Any) -> None:
    """Accept lengths of the schedule; ramp and epsilon are two ways to say the same."""
    if ramp is not None and epsilon is not None:
        raise ValueError("at most one of ramp and epsilon must be given, got both")
    for name, value in (("epsilon", epsilon), ("reallocate", reallocate)):
        if value is not None:
            check_positive(name, value)
    check_non_negative("warmup", warmup)
    for name, value in (("ramp", ramp), ("anneal", anneal)):
        if value is not None:
            check_non_negative(name, value)


def check_entries(name: str, entries: Any) -> None:
    """Accept a sequence of globs and layer types."""
    if isinstance(entries, (str, type)) or not isinstance(entries, Sequence):
        raise TypeError(f"{name} must be a sequence of globs and types, got {entries!r}")
    for index, entry in enumerate(entries):
        if not isinstance(entry, (str, type)):
            raise TypeError(
                f"{name}[{index}] must be a glob or a layer type, got {type(entry).__name__}"
            )


def check_overrides(
    overrides: Any, sparsity: Any, pattern: str, parsed: Callable[[str, str], Pattern]
) -> None:
    """Accept settings of single layers.

    Args:
        overrides: what to check.
        sparsity: that of the configuration.
        pattern: the same.
        parsed: returns the pattern of a name and a spelling.
    """
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must be a mapping, got {type(overrides).__name__}")
    for entry, changes in overrides.items():
        name = f"overrides[{entry!r}]"
        if not isinstance(entry, str):
            raise TypeError(f"overrides must have strings as keys, got {entry!r}")
        if changes is None:
            continue
        if not isinstance(changes, Mapping):
            raise TypeError(f"{name} must be None or a mapping, got {type(changes).__name__}")
        _check_override(name, changes)
        own = parsed(f"{name}: pattern", changes.get("pattern", pattern))
        if own.fixed_sparsity is None:
            if changes.get("sparsity") is None and sparsity is None:
                raise ValueError(f"{name}: sparsity must be given, as the configuration has none")
        elif changes.get("sparsity") is not None:
            raise ValueError(
                f"{name}: sparsity must be left out with pattern {own}, got {changes['sparsity']}"
            )


def _check_override(name: str, changes: Mapping[str, Any]) -> None:
    """Accept the values of an override, each for itself."""
    unknown = [key for key in changes if key not in _OVERRIDABLE]
    if unknown:
        raise ValueError(f"{name} must have keys among {list(_OVERRIDABLE)}, got {unknown}")
    check_temperatures(f"{name}: ", changes.get("tau"), changes.get("relative_tau"))
    if changes.get("gradient_tau") is not None:
        check_non_negative(f"{name}: gradient_tau", changes["gradient_tau"])
    if changes.get("sparsity") is not None:
        check_fraction(f"{name}: sparsity", changes["sparsity"])
