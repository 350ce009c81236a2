"""A progress that counts optimizer steps, where the schedule is in epochs."""

from collections.abc import Iterable

from torch import Tensor

from pdp_kernels.pruning.config import PDPConfig
from pdp_kernels.pruning.user_warnings import warn_user

_SHORT_RAMP = 40  # optimizer steps; no gradual pruning of a network takes so few
_LONG_TRAINING = 1000
_MAX_CHANGES = 2  # in-place operations on a weight in one step of an optimizer


class StepCounter:
    """Warns, once, if the progress seems to count optimizer steps.

    1000 calls in a row then have whole numbers as progress, each one higher than the last, with one
    update of the weights between them, and the ramp took fewer than 40 of them. A training that
    steps once for each epoch has several updates between two calls. One of a single batch per epoch
    has not, but its ramp takes longer. Updates that torch does not count as changes in place (those
    of fused optimizers, and of weights that are replaced) give no warning.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._last: tuple[float, int] | None = None
        self._has_warned = False

    def note(self, config: PDPConfig, progress: float, weights: Iterable[Tensor]) -> None:
        """Note a step to this progress, before which the weights have changed or not."""
        if self._has_warned or not 0 < config.ramp_epochs < _SHORT_RAMP:
            return
        version = _version(weights)
        if self._last is not None:
            is_next = progress == self._last[0] + 1 and progress == int(progress)
            is_update = 1 <= version - self._last[1] <= _MAX_CHANGES
            self._calls = self._calls + 1 if is_next and is_update else 0
        self._last = (progress, version)
        if self._calls >= _LONG_TRAINING and progress - self._calls < config.ramp_end:
            self._has_warned = True
            warn_user(
                f"the ramp took {config.ramp_epochs:g} of the {progress:g} optimizer steps so far, "
                "as the progress grew by 1 with each. Progress is in epochs, fractions included: "
                "pass step / steps_per_epoch, or set warmup and ramp in steps"
            )


def _version(weights: Iterable[Tensor]) -> int:
    """Return how often the first weight that trains has been changed in place."""
    trained = (weight for weight in weights if weight.requires_grad and not weight.is_inference())
    weight = next(trained, None)
    return 0 if weight is None else weight._version
