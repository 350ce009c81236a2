"""The masks and dtypes to measure.

"relative": a temperature relative to the squared threshold, as a tensor on the device. This is what
`PDPPruner` computes as recommended. "paper": Eq. 1 as printed, with tau = 1e-4 as a number.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TAU = 1e-4
RELATIVE_TAU = 0.1

NAMES = ("relative", "paper")


class Dtypes(NamedTuple):
    """Dtypes of a weight, which its gradient shares, and of w_hat."""

    weight: torch.dtype
    w_hat: torch.dtype

    @property
    def name(self) -> str:
        """The name in results: one dtype if both are the same."""
        names = [str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(self)]
        return "/".join(names)


# float32/bfloat16: float32 weights in training under autocast.
DTYPES = {
    dtypes.name: dtypes
    for dtypes in (
        Dtypes(torch.float32, torch.float32),
        Dtypes(torch.bfloat16, torch.bfloat16),
        Dtypes(torch.float32, torch.bfloat16),
    )
}


@dataclass(frozen=True)
class Mask:
    """Arguments of a mask.

    Attributes:
        name: One of NAMES.
        tau: Temperature.
        relative: Whether tau is in units of the squared threshold.
        out_dtype: Dtype of w_hat.
    """

    name: str
    tau: float | Tensor
    relative: bool
    out_dtype: torch.dtype

    @classmethod
    def of(cls, name: str, out_dtype: torch.dtype, device: torch.device) -> "Mask":
        """Return the mask of a name, with w_hat in a dtype."""
        if name == "paper":
            return cls(name, TAU, relative=False, out_dtype=out_dtype)
        tau = torch.tensor(RELATIVE_TAU, device=device)
        return cls(name, tau, relative=True, out_dtype=out_dtype)

    @property
    def arguments(self) -> dict[str, object]:
        """Arguments of pdp_mask and the other masks."""
        name = "relative_tau" if self.relative else "tau"
        return {name: self.tau, "out_dtype": self.out_dtype}

    def temperature(self, threshold: Tensor) -> float | Tensor:
        """Return tau of Eq. 1 in the threshold's dtype."""
        if self.relative:
            return self.tau.to(threshold.dtype) * threshold * threshold
        return self.tau
