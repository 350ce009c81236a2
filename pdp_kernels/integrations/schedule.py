"""What the callbacks share: a configuration that fits the training, and a pruner that resumes."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

from pdp_kernels.functional.validation import check_fraction
from pdp_kernels.pruning.checks import check_length
from pdp_kernels.pruning.config import SCHEDULE_FIELDS, PDPConfig
from pdp_kernels.pruning.pruner import PDPPruner
from pdp_kernels.pruning.user_warnings import warn_user


def check_flags(**flags: object) -> None:
    """Raise a TypeError if an argument of a callback that switches something is no bool."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def parse_config(config: PDPConfig | Mapping[str, Any] | float) -> PDPConfig | float:
    """Return what a callback was given as a configuration, or as the sparsity alone.

    Args:
        config: a PDPConfig, a mapping for `PDPConfig.from_dict`, or a sparsity in [0, 1].

    Raises:
        TypeError: config is none of these; or as `PDPConfig.from_dict`.
        ValueError: the sparsity is not in [0, 1]; or as `PDPConfig.from_dict`.
    """
    if isinstance(config, PDPConfig):
        return config
    if isinstance(config, Mapping):
        return PDPConfig.from_dict(config)
    if isinstance(config, bool) or not isinstance(config, Real):
        raise TypeError(
            "config must be a PDPConfig, a mapping of its fields, or the sparsity as a number, got "
            f"{type(config).__name__}"
        )
    check_fraction("config (the sparsity)", config)
    return float(config)


def fit_config(config: PDPConfig | float, epochs: float | None) -> PDPConfig:
    """Return the configuration for a training of this many epochs.

    Args:
        config: as `parse_config` returns it. A sparsity alone means `PDPConfig.for_epochs`.
        epochs: the length of the training; None if it is not known.

    Warns:
        UserWarning: the training is known to end before the ramp does.

    Raises:
        ValueError: a sparsity alone, for a training whose length is not known.
    """
    if isinstance(config, PDPConfig):
        if epochs is not None:
            check_length(config, epochs)
        return config
    if epochs is None:
        raise ValueError(
            f"config must be a PDPConfig in a training whose length is not known, got {config}: "
            "the recommended schedule for a sparsity depends on the number of epochs"
        )
    return PDPConfig.for_epochs(config, epochs)


def resume(pruner: PDPPruner, state_dict: Mapping[str, Any]) -> None:
    """Load a pruner's state. Another schedule than the state's goes on from where that was.

    Args:
        pruner: the pruner of the training that goes on.
        state_dict: the state that a checkpoint holds.

    Warns:
        UserWarning: the schedule is not that of the state, as where a training is extended.

    Raises:
        ValueError: as `PDPPruner.load_state_dict` with new_schedule.
    """
    pruner.load_state_dict(state_dict, new_schedule=True)
    before, now = state_dict["config"], pruner.config.to_dict()
    changed = [name for name in SCHEDULE_FIELDS if name in before and before[name] != now[name]]
    if changed:
        changes = ", ".join(f"{name} {before[name]} -> {now[name]}" for name in changed)
        warn_user(
            f"pruning goes on from progress {pruner.progress:g} with another schedule than that of "
            f"the checkpoint: {changes}"
        )
