"""What a backend's soft masks may differ by beyond rounding.

Where e^-|z| is subnormal a kernel may take it for 0. And a GPU's division and exponential of
float32 are off by up to 2 ulp, so

- z passes through one division, or three if the temperature is relative, and the exponential takes
  it times log2 e, which is rounded twice: z is off by 2 or 6 ulp more, and one;
- e^-|z| is off by that times |z|, and by 2 ulp of its own;
- m is off by m (1 - m) times the error of e^-|z|, and by the 2 ulp of its division;
- m (1 - m) is off by the error of e^-|z| at most, and by the 2 ulp of its division; its factor in a
  gradient, by 2 for each of its divisions, of which there are as many as in z.
"""

import torch

from pdp_kernels.ops import reference
from tests.support.oracle import doubled

# What div.full and ex2.approx, a GPU's division and exponential of float32, may be off by.
APPROXIMATE_ULPS = 2

# Below e^-87.3 float32 numbers are subnormal.
SMALLEST_EXPONENT = 87.3


class Allowances:
    """Errors allowed to a backend at each of the values, weights or norms of channels.

    mask: of m. slope: of m (1 - m) with its factor in a gradient.
    """

    def __init__(self, backend, values, threshold, tau, relative):
        threshold, tau = doubled(threshold, tau)
        self.values = values.double()
        self.scale, self.tau = reference.scale_and_temperature(threshold, tau, relative)
        z = reference.mask_exponent(self.values, threshold, tau, relative)
        if values.dtype == torch.float64:
            self.mask = self.slope = torch.zeros_like(z)
            return
        decay = torch.exp(-z.abs())
        self.mask = self.slope = torch.where(z.abs() > SMALLEST_EXPONENT, decay, 0)
        if getattr(backend, "approximates", backend.device == "cuda"):
            eps = torch.finfo(torch.float32).eps  # an ulp is at most that much of a number
            divisions = APPROXIMATE_ULPS * eps * (3 if relative else 1)
            of_decay = z.abs() * (divisions + eps) + APPROXIMATE_ULPS * eps
            of_slope = of_decay + APPROXIMATE_ULPS * eps + divisions
            slope = reference.sigmoid_slope(z)
            self.mask = self.mask + slope * of_decay + torch.sigmoid(z) * APPROXIMATE_ULPS * eps
            self.slope = self.slope + slope * of_slope

    def of_gradient(self, grad_w_hat, grad_mask) -> float:
        """Return the error allowed to dw, through each of the gradients that is given."""
        slope = 2 * self.values / self.scale / self.scale / self.tau * self.slope
        allowed = 0.0
        if grad_w_hat is not None:
            allowed += largest(grad_w_hat * self.mask) + largest(grad_w_hat * self.values * slope)
        if grad_mask is not None:
            allowed += largest(grad_mask * slope)
        return allowed


def largest(values):
    """Return the largest magnitude that is a number; 0 of none."""
    values = values.nan_to_num(0, 0, 0)
    return values.abs().max().item() if values.numel() else 0.0
