"""What a pruner does, and when: one frozen configuration, whose schedules are pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch

from pdp_kernels.functional.soft_mask import PAPER_TAU
from pdp_kernels.functional.validation import (
    MAX_GROUP,
    NORMS,
    check_non_negative,
    check_number,
    check_positive,
    check_ratio,
    check_temperature,
)

PAPER_WARMUP = 16.0  # epochs; s of arXiv 2305.11203, Algorithm 1
PAPER_EPSILON = 0.015  # of the ramp's whole height, per epoch
RECOMMENDED_RELATIVE_TAU = (1.0, 0.02)

_SCOPES = ("global", "layer")
_SHAPES = ("linear", "cubic")
_CHANNELS = ("output", "input")
_OVERRIDABLE = ("sparsity", "pattern", "tau", "relative_tau")

Temperature = float | tuple[float, float]


class Pattern(NamedTuple):
    """A parsed pattern; n and m are those of N:M, else 0."""

    kind: str  # "unstructured", "nm" or "channel"
    n: int = 0
    m: int = 0

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.kind == "nm" else self.kind


class LayerPlan(NamedTuple):
    """What is done to one weight. sparsity None: its part of the global budget, or that of N:M."""

    pattern: Pattern
    sparsity: float | None
    relative: bool
    temperatures: tuple[float, float]  # at the end of the warm-up and of the annealing


@dataclass(frozen=True)
class PDPConfig:
    """What `PDPPruner` prunes, how far and when. Times are in epochs and may be fractions.

    With progress e, the share of the sparsity that is asked for by now is::

        x = min(1, (e - warmup) / ramp),  0 before the warm-up is over
        linear: x          (Algorithm 1, lines 10-11 of arXiv 2305.11203, epsilon = 1 / ramp)
        cubic:  1 - (1 - x)^3                             (Zhu and Gupta, arXiv 1710.01878)

    and a temperature (start, end) is start^(1-y) end^y, y = min(1, (e - warmup) / anneal).

    Arguments:
        sparsity: the share to prune, in [0, 1]; or, with scope "layer", shares by name pattern,
            of which the first that matches a layer counts. With an N:M pattern leave it out.
        scope: "global": one threshold over all layers at the end of the warm-up says how much each
            of them loses (Algorithm 1, lines 8-9), so that round(sparsity * total) are pruned;
            "layer": each layer loses that share of itself.
        pattern: "unstructured", "N:M" such as "2:4" (N kept of M consecutive inputs), or "channel",
            whose sparsity counts channels.
        tau, relative_tau: the temperature as in `pdp_mask`, a number or (start, end). Neither: the
            recommended relative temperature, (1.0, 0.02).
        anneal: how long a temperature goes from start to end; default the ramp. Until the end of
            the training is better: see `for_epochs`.
        warmup: epochs before pruning starts; s in the paper.
        ramp: how long the sparsity grows; or
        epsilon: its growth per epoch, ramp = 1 / epsilon. Default 0.015, the paper's.
        ramp_shape: "cubic" or "linear".
        reallocate: epochs after which a global budget is shared out again, until the ramp ends;
            default never: the paper shares it out once, at the end of the warm-up.
        max_layer_sparsity: no layer loses more than this share under a global budget; what it is
            spared is taken from the others, so that the total stays.
        channel_dim: which channels of a layer the pattern "channel" prunes: "output" or "input".
            Batch norm scales masked outputs up again: before it, prune the next layer's inputs.
        channel_norm: "rms" (comparable between layers) or "l2", as in `pdp_mask_channel`.
        include: what is pruned; default the weights of Linear, ConvNd, ConvTransposeNd,
            MultiheadAttention and Hugging Face's Conv1D layers. An entry is a layer type, or a
            string: the name of a type, or a glob for the name of layer or weight.
        exclude: what of that is left alone; entries as in include.
        overrides: by entry (a string), a mapping with another "sparsity", "pattern", "tau" or
            "relative_tau", or None to leave the layer alone. The first that matches counts. A layer
            with a sparsity of its own is not part of the global budget.

    Raises:
        TypeError, ValueError: naming the field, what it got and what it accepts.

    Example:
        >>> config = PDPConfig(sparsity=0.9, warmup=2, ramp=8)
        >>> config.ramp_at(6.0)
        0.875
    """

    sparsity: float | Mapping[str, float] | None = None
    scope: str = "global"
    pattern: str = "unstructured"
    tau: Temperature | None = None
    relative_tau: Temperature | None = None
    anneal: float | None = None
    warmup: float = PAPER_WARMUP
    ramp: float | None = None
    epsilon: float | None = None
    ramp_shape: str = "cubic"
    reallocate: float | None = None
    max_layer_sparsity: float = 1.0
    channel_dim: str = "output"
    channel_norm: str = "rms"
    include: Sequence[str | type] | None = None
    exclude: Sequence[str | type] = ()
    overrides: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)

    def __post_init__(self):
        _check_one_of("scope", self.scope, _SCOPES)
        _check_one_of("ramp_shape", self.ramp_shape, _SHAPES)
        _check_one_of("channel_dim", self.channel_dim, _CHANNELS)
        _check_one_of("channel_norm", self.channel_norm, NORMS)
        _check_sparsity(self.sparsity, self.scope, parse_pattern("pattern", self.pattern))
        _check_temperatures("", self.tau, self.relative_tau)
        _check_times(self)
        check_ratio("max_layer_sparsity", self.max_layer_sparsity)
        if self.include is not None:
            _check_entries("include", self.include)
        _check_entries("exclude", self.exclude)
        _check_overrides(self.overrides, self)

    @classmethod
    def paper(cls, sparsity: float, **changes: Any) -> "PDPConfig":
        """The paper's own setting: tau = 1e-4, linear ramp, s = 16, epsilon = 0.015, global."""
        return cls(**({"sparsity": sparsity, "tau": PAPER_TAU, "ramp_shape": "linear"} | changes))

    @classmethod
    def for_epochs(cls, sparsity: float | None, epochs: float, **changes: Any) -> "PDPConfig":
        """The recommended setting for a training of so many epochs.

        A warm-up of 15% of them, a ramp of 40%, the rest at the full sparsity. The temperature
        falls until the end, where the soft network has become the hard one, and a global budget is
        shared out again each twentieth of the training.
        """
        check_positive("epochs", epochs)
        warmup = changes.get("warmup", 0.15 * epochs)
        check_number("warmup", warmup)
        times = {
            "warmup": warmup,
            "anneal": max(0.0, epochs - warmup),
            "reallocate": 0.05 * epochs,
        }
        if "epsilon" not in changes:
            times["ramp"] = 0.4 * epochs
        return cls(**({"sparsity": sparsity} | times | changes))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PDPConfig":
        """The configuration that a mapping describes, such as a file of settings holds.

        Raises:
            TypeError: values is no mapping.
            ValueError: a key that is no field.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"values must be a mapping, got {type(values).__name__}")
        known = [entry.name for entry in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"values must have keys among {known}, got {unknown}")
        # A file has lists where a temperature is a pair.
        return cls(**{key: _from_plain(key, value) for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which `from_dict` makes an equal configuration; types as their names."""
        return {entry.name: _to_plain(getattr(self, entry.name)) for entry in fields(self)}

    @property
    def ramp_epochs(self) -> float:
        if self.ramp is not None:
            return self.ramp
        return 1 / (PAPER_EPSILON if self.epsilon is None else self.epsilon)

    def ramp_at(self, progress: float) -> float:
        """The share of the asked-for sparsity at this progress, in [0, 1]."""
        x = _fraction(progress - self.warmup, self.ramp_epochs)
        return x if self.ramp_shape == "linear" else 1 - (1 - x) ** 3

    def reallocates(self, before: float, progress: float) -> bool:
        """Whether a global budget is to be shared out again at this progress, after the last."""
        if self.reallocate is None or before >= self.warmup + self.ramp_epochs:
            return False
        # Progress is often a sum of fractions: its rounding must not delay a whole number.
        done, due = (
            math.floor((at - self.warmup) / self.reallocate + 1e-9) for at in (before, progress)
        )
        return due > done

    def temperature_at(self, temperatures: tuple[float, float], progress: float) -> float:
        """The temperature at this progress, between its start and its end."""
        start, end = temperatures
        y = _fraction(
            progress - self.warmup, self.ramp_epochs if self.anneal is None else self.anneal
        )
        return start if start == end else start ** (1 - y) * end**y

    def plan(self, override: Mapping[str, Any] | None = None) -> LayerPlan:
        """What is done to a layer with this override."""
        changes = override or {}
        pattern = parse_pattern("pattern", changes.get("pattern", self.pattern))
        sparsity = changes.get("sparsity")
        if sparsity is None and pattern.kind != "nm" and self.scope == "layer":
            sparsity = self.sparsity
        tau, relative_tau = self.tau, self.relative_tau
        if changes.get("tau") is not None or changes.get("relative_tau") is not None:
            tau, relative_tau = changes.get("tau"), changes.get("relative_tau")
        if tau is None and relative_tau is None:
            relative_tau = RECOMMENDED_RELATIVE_TAU
        relative = relative_tau is not None
        value = relative_tau if relative else tau
        pair = (float(value), float(value)) if not isinstance(value, tuple) else value
        return LayerPlan(pattern, sparsity, relative, pair)


def parse_pattern(name: str, pattern: str) -> Pattern:
    if pattern in ("unstructured", "channel"):
        return Pattern(pattern)
    n, colon, m = pattern.partition(":") if isinstance(pattern, str) else ("", "", "")
    if colon and n.isdecimal() and m.isdecimal() and 1 <= int(n) < int(m) <= MAX_GROUP:
        return Pattern("nm", int(n), int(m))
    raise ValueError(
        f'{name} must be "unstructured", "channel" or "N:M" with 1 <= N < M <= {MAX_GROUP}, '
        f"got {pattern!r}"
    )


def _fraction(passed: float, length: float) -> float:
    """How much of a length has passed, in [0, 1]; a length of 0 has passed at once."""
    if passed < 0:
        return 0.0
    return 1.0 if passed >= length else passed / length


def _check_one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be {' or '.join(map(repr, accepted))}, got {value!r}")


def _check_sparsity(sparsity: Any, scope: str, pattern: Pattern) -> None:
    if isinstance(sparsity, Mapping):
        if scope != "layer":
            raise ValueError(
                f'scope must be "layer" where sparsity gives shares by layer, got {scope!r}'
            )
        if not sparsity:
            raise ValueError("sparsity must hold at least one share, got an empty mapping")
        for key, share in sparsity.items():
            check_ratio(f"sparsity[{key!r}]", share)
    elif sparsity is not None:
        check_ratio("sparsity", sparsity)
    if pattern.kind == "nm":
        if sparsity is not None and sparsity != 1 - pattern.n / pattern.m:
            raise ValueError(
                f"sparsity must be left out with pattern {pattern.n}:{pattern.m}, which is one of "
                f"{1 - pattern.n / pattern.m}, got {sparsity}"
            )
    elif sparsity is None:
        raise ValueError(f"sparsity must be given with pattern {pattern.kind!r}, got None")


def _check_temperatures(prefix: str, tau: Any, relative_tau: Any) -> None:
    if tau is not None and relative_tau is not None:
        raise ValueError(f"at most one of {prefix}tau and {prefix}relative_tau, got both")
    for name, value in ((f"{prefix}tau", tau), (f"{prefix}relative_tau", relative_tau)):
        if value is None:
            continue
        ends = value if isinstance(value, tuple) else (value,)
        if isinstance(value, tuple) and len(value) != 2:
            raise ValueError(f"{name} must be a number or (start, end), got {value}")
        for end in ends:
            check_number(name, end)
            check_temperature(name, end, torch.float32, torch.device("cpu"))


def _check_times(config: PDPConfig) -> None:
    if config.ramp is not None and config.epsilon is not None:
        raise ValueError("at most one of ramp and epsilon must be given, got both")
    for name, value in (("epsilon", config.epsilon), ("reallocate", config.reallocate)):
        if value is not None:
            check_positive(name, value)
    for name in ("warmup", "ramp", "anneal"):
        value = getattr(config, name)
        if value is not None or name == "warmup":
            check_non_negative(name, value)


def _check_entries(name: str, entries: Any) -> None:
    if isinstance(entries, (str, type)) or not isinstance(entries, Sequence):
        raise TypeError(f"{name} must be a sequence of globs and types, got {entries!r}")
    for index, entry in enumerate(entries):
        if not isinstance(entry, (str, type)):
            raise TypeError(
                f"{name}[{index}] must be a glob or a layer type, got {type(entry).__name__}"
            )


def _check_overrides(overrides: Any, config: PDPConfig) -> None:
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
        unknown = [key for key in changes if key not in _OVERRIDABLE]
        if unknown:
            raise ValueError(f"{name} must have keys among {list(_OVERRIDABLE)}, got {unknown}")
        _check_temperatures(f"{name}: ", changes.get("tau"), changes.get("relative_tau"))
        pattern = parse_pattern(f"{name}: pattern", changes.get("pattern", config.pattern))
        sparsity = changes.get("sparsity")
        if sparsity is not None:
            check_ratio(f"{name}: sparsity", sparsity)
            if pattern.kind == "nm":
                raise ValueError(f"{name}: sparsity must be left out with N:M, got {sparsity}")
        elif pattern.kind != "nm" and config.sparsity is None:
            raise ValueError(f"{name}: sparsity must be given, as the configuration has none")


def _to_plain(value: Any) -> Any:
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, Mapping):
        return {key: _to_plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(entry) for entry in value]
    return value


def _from_plain(key: str, value: Any) -> Any:
    if key in ("tau", "relative_tau") and isinstance(value, list):
        return tuple(value)
    if key == "overrides" and isinstance(value, Mapping):
        return {
            entry: changes and {name: _from_plain(name, change) for name, change in changes.items()}
            for entry, changes in value.items()
        }
    return value
