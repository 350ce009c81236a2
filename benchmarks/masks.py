"""The two ways to mask that are measured: as the paper prints it, and as a pruner calls it.

"paper": tau = 1e-4, a number, and w_hat in the weight's dtype. "pruner": a relative temperature
that lies on the device, and w_hat in bfloat16, as `PDPPruner` has them under autocast.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TAU = 1e-4
RELATIVE_TAU = 0.1

NAMES = ("paper", "pruner")


@dataclass(frozen=True)
class Mask:
    """out_dtype: that of w_hat."""

    name: str
    tau: float | Tensor
    relative: bool
    out_dtype: torch.dtype

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, device: torch.device) -> "Mask":
        """One of NAMES, for weights of a dtype."""
        if name == "paper":
            return cls(name, TAU, relative=False, out_dtype=dtype)
        tau = torch.tensor(RELATIVE_TAU, device=device)
        return cls(name, tau, relative=True, out_dtype=torch.bfloat16)

    @property
    def arguments(self) -> dict[str, object]:
        """What pdp_mask and its like take."""
        name = "relative_tau" if self.relative else "tau"
        return {name: self.tau, "out_dtype": self.out_dtype}

    def temperature(self, threshold: Tensor) -> float | Tensor:
        """tau of Eq. 1, in the threshold's dtype."""
        if self.relative:
            return self.tau.to(threshold.dtype) * threshold * threshold
        return self.tau
