"""The two masks to measure.

"paper": tau = 1e-4 as a number, and w_hat in the weight's dtype. "pruner": a relative temperature
on the device, and w_hat in bfloat16, as in `PDPPruner` under autocast.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TAU = 1e-4
RELATIVE_TAU = 0.1

NAMES = ("paper", "pruner")


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
    def of(cls, name: str, dtype: torch.dtype, device: torch.device) -> "Mask":
        """Return the mask of a name, for weights of a dtype."""
        if name == "paper":
            return cls(name, TAU, relative=False, out_dtype=dtype)
        tau = torch.tensor(RELATIVE_TAU, device=device)
        return cls(name, tau, relative=True, out_dtype=torch.bfloat16)

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
