"""The settings that grids compare: the rows of the table of each study."""

from collections.abc import Callable
from typing import Any, NamedTuple

from studies.methods import CHANNEL_METHODS, NM_METHODS, UNSTRUCTURED_METHODS


class Setting(NamedTuple):
    """A method with its settings: a line of the table."""

    name: str
    method: str
    options: dict[str, Any]
    warmup: float | None = None  # fraction of the training; None is that of the budget
    ramp: float | None = None  # the same


def method_settings() -> list[Setting]:
    """Return all methods for unstructured sparsity."""
    return [Setting(name, name, {}) for name in UNSTRUCTURED_METHODS]


def nm_settings() -> list[Setting]:
    """Return all methods for N:M patterns."""
    return [Setting(name, name, {}) for name in NM_METHODS]


def timed_setting(
    name: str, method: str, options: dict[str, Any], warmup: float, ramp: float
) -> Setting:
    """Return a setting with its own warm-up and ramp, which its name states."""
    return Setting(f"{name}, {warmup:.0%} + {ramp:.0%}", method, options, warmup, ramp)


def softness_setting(
    start: float,
    end: float,
    least: float,
    warmup: float | None = None,
    ramp: float | None = None,
    **options: Any,
) -> Setting:
    """Return PDP with relative temperatures, and the least one of the gradient.

    The name says so, and states warm-up and ramp if they are not the recommended ones.
    """
    name = f"pdp, {start:g} to {end:g}, gradient at {least:g}"
    changes = {"relative_tau": (start, end), "gradient_tau": least} | options
    if warmup is None or ramp is None:
        return Setting(name, "pdp", changes)
    return timed_setting(name, "pdp", changes, warmup, ramp)


def group_settings() -> list[Setting]:
    """Return settings of PDP for N:M: when groups are decided, and the temperatures.

    The row "pdp" is the recommended setting.
    """
    annealed = softness_setting(1.0, 0.02, 1.0, anneal=None)
    return [
        Setting("pdp", "pdp", {}),
        softness_setting(1.0, 0.02, 0.0),
        softness_setting(1.0, 0.02, 0.3),
        softness_setting(1.0, 0.02, 1.0),
        softness_setting(1.0, 0.02, 4.0),
        annealed._replace(name=f"{annealed.name}, annealed by the end of the ramp"),
        softness_setting(1.0, 0.005, 1.0),
        softness_setting(0.3, 0.005, 0.3),
        softness_setting(0.3, 0.005, 1.0),
        softness_setting(0.3, 0.001, 0.3),
        softness_setting(0.3, 0.0001, 0.3),
        softness_setting(1.0, 0.02, 0.0, 0.15, 0.4),
        softness_setting(1.0, 0.02, 1.0, 0.15, 0.4),
        softness_setting(1.0, 0.02, 1.0, 0.45, 0.1),
    ]


def channel_settings() -> list[Setting]:
    """Return all methods that prune channels."""
    return [Setting(name, name, {}) for name in CHANNEL_METHODS]


def channel_temperatures() -> list[Setting]:
    """Return PDP for channels with other relative temperatures and times; one-shot pruning.

    The row "pdp" is the recommended setting. Names state temperatures, warm-up and ramp.
    """
    temperatures = (
        (1.0, 0.02, 0.0),
        (1.0, 0.005, 0.0),
        (1.0, 0.001, 0.0),
        (0.3, 0.001, 0.0),
        (0.3, 0.001, 0.3),
        (0.3, 0.001, 1.0),
        (0.3, 0.0003, 0.0),
        (0.3, 0.0003, 0.01),
        (0.3, 0.0003, 0.003),
        (0.3, 0.0001, 0.0),
        (0.1, 0.001, 0.0),
        (0.1, 0.0003, 0.0),
        (0.1, 0.0001, 0.3),
    )
    times = ((0.0, 0.6), (0.0, 0.3), (0.0, 0.0), (0.15, 0.4), (0.35, 0.2))
    return [
        Setting("pdp", "pdp", {}),
        *(softness_setting(*each, *time) for time in times for each in temperatures),
        Setting("pdp, uniform", "pdp", {"allocation": "uniform"}),
        Setting(
            "pdp, uniform, 0.3 to 0.001",
            "pdp",
            {"allocation": "uniform", "relative_tau": (0.3, 0.001)},
        ),
        *(
            timed_setting("one-shot", "one-shot", {}, *time)
            for time in ((0.0, 0.0), (0.0, 0.6), (0.15, 0.4))
        ),
        Setting("one-shot, by readers", "one-shot", {"by_readers": True}),
    ]


def tau_settings() -> list[Setting]:
    """Return settings of PDP: temperatures, ramps, and the ends of annealing and allocation.

    The last one is the recommended setting. The others differ from it in what they name.
    """
    constant = {
        **{f"tau {tau}": {"tau": float(tau)} for tau in ("1e-5", "1e-4", "1e-3", "1e-2")},
        **{f"relative {tau}": {"relative_tau": tau} for tau in (0.1, 0.3, 1.0)},
    }
    once = {"reallocate": None}
    linear = {"ramp_shape": "linear"} | once
    settings = [
        Setting(f"{name}, linear, allocated once", "pdp", temperature | linear)
        for name, temperature in constant.items()
    ]
    others = {
        "tau 1e-4, linear, allocated once, thresholds by epoch": {"tau": 1e-4}
        | linear
        | {"update_interval": 1.0},
        "tau 1e-3": {"tau": 1e-3},
        "tau 1e-2 to 1e-4": {"tau": (1e-2, 1e-4)},
        "relative 0.3": {"relative_tau": 0.3},
        "relative 0.3 to 0.02": {"relative_tau": (0.3, 0.02)},
        "relative 1 to 0.05": {"relative_tau": (1.0, 0.05)},
        "relative 1 to 0.02, linear": {"ramp_shape": "linear"},
        "relative 1 to 0.02, annealed by the end of the ramp": {"anneal": None},
        "relative 1 to 0.02, allocated once": once,
        "relative 1 to 0.02, gradient at 0.1 or more": {"gradient_tau": 0.1},
        "relative 1 to 0.02, gradient at 0.3 or more": {"gradient_tau": 0.3},
        "relative 1 to 0.02, gradient at 1": {"gradient_tau": 1.0},
        "relative 1 to 0.02": {},
    }
    return settings + [Setting(name, "pdp", options) for name, options in others.items()]


def allocation_settings() -> list[Setting]:
    """Return how the layers share a budget: by one threshold with or without a cap, or not."""
    settings = {
        "dense": ("dense", {}),
        "magnitude without a cap": ("pdp", {"max_layer_sparsity": 1.0}),
        "magnitude": ("pdp", {}),
        **{name: ("pdp", {"allocation": name}) for name in ("lamp", "erk", "uniform")},
    }
    return [Setting(name, *setting) for name, setting in settings.items()]


def schedule_settings() -> list[Setting]:
    """Return when PDP and global GMP prune in a training from scratch, and how far PDP each layer.

    The rows "pdp" and "gmp-global" have the recommended times, 15% and 40%.
    """
    times = ((0.0, 0.4), (0.0, 0.6), (0.0, 0.8), (0.15, 0.6), (0.15, 0.8), (0.3, 0.4))
    return [
        Setting("pdp", "pdp", {}),
        Setting("gmp-global", "gmp-global", {}),
        *(timed_setting(name, name, {}, *time) for name in ("pdp", "gmp-global") for time in times),
        Setting("pdp, half", "pdp", {"least_density": 0.5}),
    ]


def finetuned_schedule_settings() -> list[Setting]:
    """Return when PDP and global GMP prune, and how softly and how far PDP prunes each layer.

    The row "pdp" is the recommended setting for fine-tuning. The others differ from it in what they
    name: the least density of a layer as a fraction of the average one, warm-up and ramp, and what
    is varied beside those of a training from scratch.
    """
    scratch = (0.15, 0.4)
    tenth = {"least_density": 0.1}  # as from scratch
    schedules = [
        timed_setting(name, method, options, *time)
        for name, method, options in (
            ("pdp, a tenth", "pdp", tenth),
            ("gmp-global", "gmp-global", {}),
        )
        for time in (scratch, (0.0, 0.4), (0.05, 0.6), (0.05, 0.8), (0.15, 0.6))
    ]
    options = {
        "relative 0.3 to 0.02": {"relative_tau": (0.3, 0.02)},
        "relative 1 to 0.1": {"relative_tau": (1.0, 0.1)},
        "annealed by the end of the ramp": {"anneal": None},
        "gradient at 0.1 or more": {"gradient_tau": 0.1},
        "gradient at 0.3 or more": {"gradient_tau": 0.3},
        "lamp": {"allocation": "lamp"},
    }
    return [
        Setting("pdp", "pdp", {}),
        Setting("gmp-global", "gmp-global", {}),
        *schedules,
        timed_setting("pdp", "pdp", {}, *scratch),
        Setting("pdp, a tenth", "pdp", tenth),
        Setting("pdp, a quarter", "pdp", {"least_density": 0.25}),
        Setting("pdp, three quarters", "pdp", {"least_density": 0.75}),
        Setting("pdp, relative 1 to 0.005", "pdp", {"relative_tau": (1.0, 0.005)}),
        *(
            Setting(f"pdp, a tenth, 15% + 40%, {name}", "pdp", tenth | changes, *scratch)
            for name, changes in options.items()
        ),
    ]


def finetuned_group_settings() -> list[Setting]:
    """Return when and how softly PDP decides the groups of a trained network, and one-shot pruning.

    The row "pdp" is the recommended setting. All prune before the second step unless they say
    otherwise. "gradient at 0.3" is the least temperature of the gradient.
    """
    temperatures = [
        (1.0, 0.02, 0.0),
        (1.0, 0.02, 0.3),
        (1.0, 0.02, 1.0),
        (1.0, 0.02, 4.0),
        (1.0, 0.02, 100.0),
        (1.0, 0.005, 1.0),
        (1.0, 0.001, 1.0),
        (0.3, 0.02, 0.0),
        (0.3, 0.02, 1.0),
        (0.3, 0.005, 0.0),
        (0.3, 0.005, 0.05),
        (0.3, 0.005, 0.3),
        (0.3, 0.005, 1.0),
        (0.1, 0.005, 0.0),
        (0.1, 0.005, 0.3),
        (0.1, 0.001, 1.0),
    ]
    times = ((0.0, 0.2), (0.0, 0.4), (0.0, 0.6), (0.2, 0.2))
    return [
        Setting("pdp", "pdp", {}),
        Setting("one-shot", "one-shot", {}),
        Setting("sr-ste", "sr-ste", {}),
        timed_setting("one-shot", "one-shot", {}, 0.0, 0.6),
        *(softness_setting(*each) for each in temperatures),
        *(softness_setting(1.0, 0.02, 1.0, *each) for each in times),
    ]


class Study(NamedTuple):
    """What a grid compares.

    Attributes:
        settings: Returns the rows of its table.
        prunes: What the columns of the table are: sparsities of weights or channels, or N:M
            patterns of groups.
        finetunes: Whether trainings start from a trained network.
        by_sparsity: Whether its plot is the score against the remaining weights.
        reference: The setting that the others are compared with.
    """

    settings: Callable[[], list[Setting]]
    prunes: str = "weights"  # or groups, or channels
    finetunes: bool = False
    by_sparsity: bool = False
    reference: str = "pdp"


STUDIES = {
    "methods": Study(method_settings, by_sparsity=True),
    "finetune": Study(method_settings, finetunes=True, by_sparsity=True),
    "schedules": Study(schedule_settings),
    "finetune-schedules": Study(finetuned_schedule_settings, finetunes=True),
    "nm": Study(nm_settings, "groups"),
    "nm-settings": Study(group_settings, "groups"),
    "finetune-nm": Study(nm_settings, "groups", finetunes=True),
    "finetune-nm-settings": Study(finetuned_group_settings, "groups", finetunes=True),
    "channels": Study(channel_settings, "channels"),
    "channels-settings": Study(channel_temperatures, "channels"),
    "finetune-channels": Study(channel_settings, "channels", finetunes=True),
    "finetune-channels-settings": Study(channel_temperatures, "channels", finetunes=True),
    "tau": Study(tau_settings),
    "allocation": Study(allocation_settings, by_sparsity=True, reference="magnitude"),
    "finetune-allocation": Study(
        allocation_settings, finetunes=True, by_sparsity=True, reference="magnitude"
    ),
}
