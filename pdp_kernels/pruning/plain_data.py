"""A configuration's fields as plain data, which json and torch.load can read."""

import json
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from pdp_kernels.functional.validation import as_float

_MAPPINGS = ("sparsity", "overrides")  # the fields that may be mappings


def to_plain(value: Any) -> Any:
    """Return the value of a field as plain data. Layer types become their names."""
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, Mapping):
        return {key: to_plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(each) for each in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, Real):  # NumPy's numbers too
        return int(value) if isinstance(value, Integral) else as_float(value)
    return value


def to_leaves(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain data of a configuration as a state holds it: each mapping as a JSON text.

    torch.distributed.checkpoint takes mappings apart. It leaves out empty ones, and loads into a
    state only the entries that this state has, so that others would go unnoticed.
    """
    return {
        name: json.dumps(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
    }


def from_leaves(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain data of a configuration, given what `to_leaves` made of it."""
    return {
        name: json.loads(value) if name in _MAPPINGS and isinstance(value, str) else value
        for name, value in leaves.items()
    }


def with_empty_mappings(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state with those empty mappings that torch.distributed.checkpoint has left out."""
    empty = {key: value for key, value in own.items() if isinstance(value, Mapping) and not value}
    return empty | dict(state)


def from_plain(key: str, value: Any) -> Any:
    """Return the value of the field with this name that plain data describes."""
    if key in ("tau", "relative_tau") and isinstance(value, list):
        return tuple(value)
    if key == "overrides" and isinstance(value, Mapping):
        return {entry: _override_from_plain(changes) for entry, changes in value.items()}
    return value


def _override_from_plain(changes: Any) -> Any:
    if not isinstance(changes, Mapping):  # None, or what the check of overrides refuses
        return changes
    return {name: from_plain(name, change) for name, change in changes.items()}
