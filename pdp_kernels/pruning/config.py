"""The configuration of a pruner: what it prunes, how far and when."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, get_args

from pdp_kernels.functional.allocation import Allocation
from pdp_kernels.functional.soft_mask import PAPER_TAU
from pdp_kernels.functional.soft_mask_channel import Norm
from pdp_kernels.functional.validation import (
    NORMS,
    check_fraction,
    check_non_negative,
    check_one_of,
    check_positive,
)
from pdp_kernels.pruning.config_checks import (
    check_entries,
    check_overrides,
    check_sparsity,
    check_temperatures,
    check_times,
)
from pdp_kernels.pruning.patterns import Pattern, parse_pattern
from pdp_kernels.pruning.plain_data import from_plain, to_plain
from pdp_kernels.pruning.recommended import FINETUNING_LEAST_DENSITY, LEAST_DENSITY

PAPER_WARMUP = 16.0  # epochs; s of arXiv 2305.11203, Algorithm 1
PAPER_EPSILON = 0.015  # fraction of the ramp per epoch
_ROUNDING = 1e-9  # epochs that sums of times may be off

Temperature = float | tuple[float, float] | list[float]
Scope = Literal["global", "layer"]
RampShape = Literal["linear", "cubic"]
Channels = Literal["output", "input"]


class LayerPlan(NamedTuple):
    """How one weight is pruned.

    Attributes:
        pattern: what is pruned together.
        sparsity: the fraction of the weight's units to prune; None if the global budget decides.
        relative: whether the temperatures are relative to the squared threshold.
        temperatures: at the end of the warm-up, and at the end of the annealing.
        gradient_tau: the least temperature of the gradient.
    """

    pattern: Pattern
    sparsity: float | None
    relative: bool
    temperatures: tuple[float, float]
    gradient_tau: float


# The fields that say when and how softly weights are pruned, but not which or how many.
SCHEDULE_FIELDS = (
    "tau",
    "relative_tau",
    "gradient_tau",
    "anneal",
    "warmup",
    "ramp",
    "epsilon",
    "ramp_shape",
    "reallocate",
)

# The fields that may hold numbers, or pairs or mappings of them.
_NUMBERS = (*SCHEDULE_FIELDS, "sparsity", "least_density", "max_layer_sparsity")


@dataclass(frozen=True)
class PDPConfig:
    """What `PDPPruner` prunes, how far and when. Times are in epochs, fractions included.

    `for_epochs` and `for_finetuning` fit the times to a training. The default ones are the paper's,
    for a hundred epochs.

    At progress e the pruner asks for this fraction of the sparsity:

        x = min(1, (e - warmup) / ramp),  0 during the warm-up
        linear: x          (Algorithm 1, lines 10-11 of arXiv 2305.11203, epsilon = 1 / ramp)
        cubic:  1 - (1 - x)^3                             (Zhu and Gupta, arXiv 1710.01878)

    A temperature (start, end) is start^(1-y) end^y with y = min(1, (e - warmup) / anneal).

    Args:
        sparsity: the fraction to prune, in [0, 1]. With scope "layer" it may be a mapping from
            strings, as in include, to fractions; the first that matches a layer counts. Leave it
            out with an N:M pattern.
        scope: "global" finds one threshold over all layers at the end of the warm-up, which decides
            how many weights each layer prunes (Algorithm 1, lines 8-9), round(sparsity * total) in
            all. "layer" prunes the same fraction of each layer.
        pattern: "unstructured", "channel" (the sparsity then counts channels), or "N:M" such as
            "2:4", which keeps N of every M consecutive inputs.
        tau: the temperature as in `pdp_mask`, a number or (start, end).
        relative_tau: the same, relative to the squared threshold. If neither is given, the
            recommended (1.0, 0.02), or (0.3, 0.0001) for the pattern "channel".
        gradient_tau: the least temperature of the gradient: Eq. 2 takes max(temperature,
            gradient_tau), in the same units, and the mask the temperature alone. 0 is Eq. 2 of the
            mask itself. Default 0, but 1.0 for N:M patterns with a relative temperature: there
            half of all weights lie next to a threshold, and pruned ones must go on learning.
        anneal: how long a temperature takes from start to end; default the ramp. It is better to
            anneal until the end of the training: see `for_epochs` and `for_finetuning`.
        warmup: epochs before pruning starts; s in the paper. Default 16, the paper's.
        ramp: how long the sparsity grows. Default 1 / epsilon.
        epsilon: the growth per epoch, instead of ramp. Default 0.015, the paper's: 67 epochs.
        ramp_shape: "cubic" or "linear".
        reallocate: epochs after which the pruner allocates a global budget again, until the ramp
            ends. Default never: the paper allocates it once, at the end of the warm-up.
        allocation: how the layers share a global budget: "magnitude" (the paper's single
            threshold), "lamp", "erk" or "uniform", as in `global_prune_counts`. Only "magnitude"
            depends on the scale of the layers. "lamp" needs weights that are not sharded, unless it
            allocates channels.
        least_density: the least density of a layer under a global budget, as a fraction of the
            average density 1 - sparsity, in [0, 1), and at least one weight (channel). The other
            layers prune the rest, so that the total stays. Default a tenth; 0 lets a budget empty a
            layer, as the paper does. Where layers are so small that the total could not be met, no
            layer has a limit.
        max_layer_sparsity: the largest fraction of a layer that a global budget may prune, in
            place of least_density.
        channel_dim: which channels the pattern "channel" prunes, "output" or "input". Batch norm
            rescales masked outputs: before one, prune the inputs of the next layer instead. Exclude
            the head, whose outputs are the model's, or the first layer, whose inputs are the data.
        channel_norm: "rms" (comparable between layers) or "l2", as in `pdp_mask_channel`.
        include: what to prune. Default: the weights of Linear, ConvNd, ConvTransposeNd,
            MultiheadAttention and Hugging Face's Conv1D layers. An entry is a layer type, the name
            of a type, or a glob for the name of a layer or weight. It means PEFT's adapters only if
            it does not match the layer that they adapt, as ``"*lora_A*"``.
        exclude: what to leave alone; entries as in include. Only a type may match nothing.
        overrides: for an entry (a string), a mapping with another "sparsity", "pattern", "tau",
            "relative_tau" or "gradient_tau", or None to leave the layer alone. The first that
            matches counts. What it leaves out, or gives as None, is that of the other layers; a
            gradient_tau only beside a temperature of the same units. A layer with its own sparsity
            is not part of the global budget.

    Raises:
        TypeError: a field of another type; the error names the field, its value and what it
            accepts.
        ValueError: a value out of range, or fields that contradict each other.

    Examples:
        >>> config = PDPConfig(sparsity=0.9, warmup=2, ramp=8)
        >>> config.ramp_at(6.0)
        0.875
    """

    sparsity: float | Mapping[str, float] | None = None
    scope: Scope = "global"
    pattern: str = "unstructured"
    tau: Temperature | None = None
    relative_tau: Temperature | None = None
    gradient_tau: float | None = None
    anneal: float | None = None
    warmup: float = PAPER_WARMUP
    ramp: float | None = None
    epsilon: float | None = None
    ramp_shape: RampShape = "cubic"
    reallocate: float | None = None
    allocation: Allocation = "magnitude"
    least_density: float = LEAST_DENSITY
    max_layer_sparsity: float | None = None
    channel_dim: Channels = "output"
    channel_norm: Norm = "rms"
    include: Sequence[str | type] | None = None
    exclude: Sequence[str | type] = ()
    overrides: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _NUMBERS:  # NumPy's compute in a precision of their own
            object.__setattr__(self, name, from_plain(name, to_plain(getattr(self, name))))
        check_one_of("scope", self.scope, get_args(Scope))
        check_one_of("ramp_shape", self.ramp_shape, get_args(RampShape))
        check_one_of("allocation", self.allocation, get_args(Allocation))
        if self.scope == "layer" and self.allocation != "magnitude":
            raise ValueError(
                f'allocation must be left out with scope "layer", which has no global budget, got '
                f"{self.allocation!r}"
            )
        check_one_of("channel_dim", self.channel_dim, get_args(Channels))
        check_one_of("channel_norm", self.channel_norm, NORMS)
        check_sparsity(self.sparsity, self.scope, self._parsed("pattern", self.pattern))
        check_temperatures("", self.tau, self.relative_tau)
        if self.gradient_tau is not None:
            check_non_negative("gradient_tau", self.gradient_tau)
        check_times(self.warmup, self.ramp, self.epsilon, self.anneal, self.reallocate)
        check_fraction("least_density", self.least_density)
        if self.least_density == 1:
            raise ValueError(
                f'least_density must be in [0, 1), got {self.least_density}: allocation="uniform" '
                "gives all layers the same density"
            )
        if self.max_layer_sparsity is not None:
            check_fraction("max_layer_sparsity", self.max_layer_sparsity)
        for name in ("include", "exclude"):
            entries = getattr(self, name)
            if name == "exclude" or entries is not None:
                check_entries(name, entries)
                object.__setattr__(self, name, tuple(entries))
        check_overrides(self.overrides, self.sparsity, self.pattern, self._parsed)
        object.__setattr__(self, "overrides", from_plain("overrides", to_plain(self.overrides)))

    @classmethod
    def paper(cls, sparsity: float, **changes: Any) -> "PDPConfig":
        """Return the paper's setting: tau = 1e-4, linear ramp, s = 16, epsilon = 0.015.

        A global budget may empty a layer (least_density 0).

        Args:
            sparsity: the fraction to prune, in [0, 1].
            **changes: other fields.

        Returns:
            The configuration.

        Raises:
            TypeError: as `PDPConfig`.
            ValueError: as `PDPConfig`.

        Examples:
            >>> config = PDPConfig.paper(0.9)
            >>> config.tau, config.warmup, round(config.ramp_end, 1)
            (0.0001, 16.0, 82.7)
        """
        values: dict[str, Any] = {
            "sparsity": sparsity,
            "tau": PAPER_TAU,
            "ramp_shape": "linear",
            "least_density": 0.0,
        }
        return cls(**(values | changes))

    @classmethod
    def for_epochs(
        cls, sparsity: float | Mapping[str, float] | None, epochs: float, **changes: Any
    ) -> "PDPConfig":
        """Return the recommended setting for a training of this many epochs.

        The warm-up takes 15% of them and the ramp 40% (N:M patterns: 35% and 20%); the rest trains
        at the full sparsity. The temperature falls until the end, when the soft network has become
        the hard one. A global budget is allocated again after each twentieth of the training.
        Patterns with N < M / 2, such as 1:4, have sharper masks: relative_tau (0.3, 0.005), and
        gradient_tau 0.3. An override with a pattern of its own has the temperatures that are
        recommended for that pattern, unless it or changes name others.

        Args:
            sparsity: as in `PDPConfig`; None with an N:M pattern.
            epochs: the length of the training.
            **changes: other fields.

        Returns:
            The configuration.

        Raises:
            TypeError: as `PDPConfig`; epochs is no number.
            ValueError: as `PDPConfig`; epochs is not positive and finite.

        Examples:
            >>> config = PDPConfig.for_epochs(0.9, epochs=20)
            >>> config.warmup, config.ramp_end
            (3.0, 11.0)
        """
        return cls._for_training(sparsity, epochs, False, changes)

    @classmethod
    def for_finetuning(
        cls, sparsity: float | Mapping[str, float] | None, epochs: float, **changes: Any
    ) -> "PDPConfig":
        """Return the recommended setting for these further epochs of a trained network.

        As `for_epochs`, but pruning starts at once, the ramp takes 60% of the epochs, and each
        layer keeps at least half of the average density under a global budget (least_density
        0.5): the scales of the layers have settled, and the time is too short for a layer that
        loses most of its weights.

        N:M patterns have no ramp: all groups are pruned after the first step, by sharper masks,
        with relative_tau (0.3, 0.005) and gradient_tau 0, or 0.3 for N < M / 2.

        Args:
            sparsity: as in `PDPConfig`; None with an N:M pattern.
            epochs: the length of the fine-tuning.
            **changes: other fields.

        Returns:
            The configuration.

        Raises:
            TypeError: as `PDPConfig`; epochs is no number.
            ValueError: as `PDPConfig`; epochs is not positive and finite.

        Examples:
            >>> config = PDPConfig.for_finetuning(0.9, epochs=5)
            >>> config.warmup, config.ramp_end, config.least_density
            (0.0, 3.0, 0.5)
        """
        changes = {"least_density": FINETUNING_LEAST_DENSITY} | changes
        return cls._for_training(sparsity, epochs, True, changes)

    @classmethod
    def _for_training(
        cls, sparsity: Any, epochs: float, finetuning: bool, changes: dict[str, Any]
    ) -> "PDPConfig":
        check_positive("epochs", epochs)
        epochs = float(epochs)
        pattern = parse_pattern("pattern", changes.get("pattern", cls.pattern), "output", "rms")
        setting = pattern.recommended(finetuning)
        warmup = changes.get("warmup", setting.warmup * epochs)
        check_non_negative("warmup", warmup)
        warmup = float(warmup)
        values: dict[str, Any] = {
            "sparsity": sparsity,
            "warmup": warmup,
            "anneal": max(0.0, epochs - warmup),
            "reallocate": 0.05 * epochs,
        }
        if "epsilon" not in changes:
            values["ramp"] = setting.ramp * epochs
        if changes.get("tau") is None:
            values["relative_tau"] = setting.relative_tau
            values["gradient_tau"] = setting.gradient_tau
        values |= changes
        overrides = changes.get("overrides")
        are_given = any(changes.get(name) is not None for name in ("tau", "relative_tau"))
        if isinstance(overrides, Mapping) and not are_given:
            values["overrides"] = {
                entry: _with_temperatures(entry, override, finetuning, changes)
                for entry, override in overrides.items()
            }
        return cls(**values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PDPConfig":
        """Return the configuration that a mapping describes, as read from a file of settings.

        Args:
            values: fields by name. A temperature (start, end) may be a list.

        Returns:
            The configuration.

        Raises:
            TypeError: values is no mapping; or as `PDPConfig`.
            ValueError: a key that is no field; or as `PDPConfig`.

        Examples:
            >>> settings = {"sparsity": 0.9, "relative_tau": [1.0, 0.02], "exclude": ["head"]}
            >>> PDPConfig.from_dict(settings).relative_tau
            (1.0, 0.02)
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"values must be a mapping, got {type(values).__name__}")
        known = [each.name for each in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"values must have keys among {known}, got {unknown}")
        return cls(**{key: from_plain(key, value) for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return plain data from which `from_dict` makes such a configuration.

        Returns:
            A dict of all fields, which json can write. Layer types become their names. As a name,
            an excluded type that matches nothing is an error.
        """
        return {each.name: to_plain(getattr(self, each.name)) for each in fields(self)}

    @property
    def ramp_epochs(self) -> float:
        """The length of the ramp: ramp, or 1 / epsilon."""
        if self.ramp is not None:
            return self.ramp
        return 1 / (PAPER_EPSILON if self.epsilon is None else self.epsilon)

    @property
    def ramp_end(self) -> float:
        """The progress at which the ramp ends."""
        return self.warmup + self.ramp_epochs

    def ramp_at(self, progress: float) -> float:
        """Return the fraction of the sparsity that is asked for at this progress.

        Args:
            progress: where the training is, in epochs, fractions included.

        Returns:
            A number in [0, 1], by the equation of `PDPConfig`.
        """
        x = _fraction(progress - self.warmup, self.ramp_epochs)
        return x if self.ramp_shape == "linear" else 1 - (1 - x) ** 3

    def reallocates(self, before: float, progress: float) -> bool:
        """Return whether a step from one progress to another allocates a global budget again.

        Args:
            before: the progress of the last step, in epochs.
            progress: the progress of this step, in epochs.

        Returns:
            True if a multiple of `reallocate` after the warm-up lies between them, and the ramp had
            not ended before.
        """
        if self.reallocate is None or before >= self.ramp_end:
            return False
        # Progress is often a sum of fractions: its rounding must not delay a whole number.
        interval = max(self.reallocate, _ROUNDING)  # the quotients stay finite
        done, due = (
            math.floor((at - self.warmup) / interval + _ROUNDING) for at in (before, progress)
        )
        return due > done

    def temperature_at(self, temperatures: tuple[float, float], progress: float) -> float:
        """Return the temperature between (start, end) at this progress.

        Args:
            temperatures: at the end of the warm-up, and at the end of the annealing.
            progress: where the training is, in epochs, fractions included.

        Returns:
            start^(1-y) end^y, as `PDPConfig` defines y.
        """
        start, end = temperatures
        anneal = self.ramp_epochs if self.anneal is None else self.anneal
        y = _fraction(progress - self.warmup, anneal)
        return start if start == end else float(start ** (1 - y) * end**y)

    def plan(
        self, override: Mapping[str, Any] | None = None, fraction: float | None = None
    ) -> LayerPlan:
        """Return how a layer is pruned.

        Args:
            override: the layer's entry in overrides.
            fraction: the layer's fraction, if sparsity is a mapping.

        Returns:
            The pattern, the sparsity (None if the global budget decides), whether temperatures are
            relative, the temperatures (start, end), and the least one of the gradient.
        """
        changes = override or {}
        pattern = self._parsed("pattern", changes.get("pattern", self.pattern))
        sparsity = pattern.fixed_sparsity
        if sparsity is None:
            sparsity = changes.get("sparsity")
        if sparsity is None and self.scope == "layer":
            sparsity = fraction if isinstance(self.sparsity, Mapping) else self.sparsity
        tau, relative_tau, least = self.tau, self.relative_tau, self.gradient_tau
        if changes.get("tau") is not None or changes.get("relative_tau") is not None:
            if (tau is None) != (changes.get("tau") is None):
                least = None  # in the units of the other temperature
            tau, relative_tau = changes.get("tau"), changes.get("relative_tau")
        if changes.get("gradient_tau") is not None:
            least = changes["gradient_tau"]
        if tau is not None:
            return LayerPlan(pattern, sparsity, False, _start_and_end(tau), least or 0.0)
        if relative_tau is None:
            relative_tau = pattern.relative_tau
        if least is None:
            least = pattern.gradient_tau
        return LayerPlan(pattern, sparsity, True, _start_and_end(relative_tau), float(least))

    def _parsed(self, name: str, pattern: str) -> Pattern:
        return parse_pattern(name, pattern, self.channel_dim, self.channel_norm)


def _with_temperatures(
    entry: Any, override: Any, finetuning: bool, changes: Mapping[str, Any]
) -> Any:
    """Return an override, with what is recommended for its pattern if it has one of its own.

    Args:
        entry: the layers that it is for.
        override: the override as given, which nothing has checked yet.
        finetuning: whether the training starts from a trained network.
        changes: fields that are given for all layers.
    """
    named = ("tau", "relative_tau", "gradient_tau")
    if not isinstance(override, Mapping) or "pattern" not in override:
        return override
    if any(override.get(name) is not None for name in named):
        return override
    name = f"overrides[{entry!r}]: pattern"
    pattern = parse_pattern(name, override["pattern"], "output", "rms")
    setting = pattern.recommended(finetuning)
    least = setting.gradient_tau if setting.gradient_tau is not None else pattern.gradient_tau
    return {
        **override,
        "relative_tau": setting.relative_tau or pattern.relative_tau,
        "gradient_tau": changes.get("gradient_tau", least),
    }


def _fraction(passed: float, length: float) -> float:
    """Return the fraction of a length that has passed, in [0, 1]; 1 for a length of 0."""
    if passed < 0:
        return 0.0
    # Warm-up, ramp and progress are sums of fractions: their rounding must not leave a last step.
    return 1.0 if passed >= length - _ROUNDING else passed / length


def _start_and_end(temperature: Temperature) -> tuple[float, float]:
    if isinstance(temperature, (tuple, list)):
        start, end = temperature
        return float(start), float(end)
    return float(temperature), float(temperature)
