"""What the tests share: the weights the kernels are run on, and the error budget."""

import torch

import pdp_kernels  # noqa: F401
from pdp_kernels.ops import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 31, 33, 4097, 9973, 40009)

DISTRIBUTIONS = {
    "normal": torch.randn,
    "uniform": lambda n: torch.rand(n) * 2 - 1,
    "heavy-tailed": lambda n: torch.distributions.Cauchy(0.0, 1.0).sample((n,)),
    "few distinct": lambda n: torch.randint(-2, 3, (n,)) * 0.25,
    "all equal": lambda n: torch.full((n,), 0.3),
    "one shared prefix": lambda n: 1 + torch.rand(n) * 2**-6,
    "sorted": lambda n: torch.linspace(-1, 1, n) ** 3,
    "periodic": lambda n: torch.arange(n).remainder(512).float(),
    "signed zeros": lambda n: torch.randn(n).relu() * torch.randint(-1, 2, (n,)),
}


def weight_of(distribution: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    return DISTRIBUTIONS[distribution](size).to(dtype)


def denormals(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Magnitudes below the smallest normal number, zero among them."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    return torch.randint(0, 100, (size,), dtype=bits).view(dtype)


def with_special_values(size: int, dtype: torch.dtype) -> torch.Tensor:
    """One weight in eight is inf, -inf, NaN or -NaN."""
    weight = torch.randn(size).to(dtype)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan], dtype=dtype)
    where = torch.randperm(size)[: size // 8]
    weight[where] = special[torch.arange(len(where)) % 4]
    return weight


def counts_of(size: int) -> list[int]:
    return sorted({0, 1, size // 2, size - 1, size})


def exact_threshold(weight: torch.Tensor, count: int) -> torch.Tensor:
    """The reference in float64, rounded once to the dtype a threshold has."""
    exact = reference.threshold(weight.cpu().double(), torch.tensor(count))
    return exact.to(reference.threshold_dtype([weight]))


def doubled(*arguments):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]


def on_device(backend, *arguments):
    return [a.to(backend.device) if isinstance(a, torch.Tensor) else a for a in arguments]


def with_neighbours(weight):
    """A stack of the weight itself and of up to 63 more within 1% of it, 2^17 numbers together.

    A few numbers may happen to be rounded well, and at a low temperature few lie in the soft zone,
    where errors are largest: the reference's error is that around the weight.
    """
    copies = min(64, 1 + 2**17 // max(1, weight.numel()))
    nudges = 1 + 0.01 * torch.rand(copies, *weight.shape, dtype=torch.float64)
    nudges[0] = 1
    return (weight.double() * nudges).to(weight.dtype)


# What div.full and ex2.approx, a GPU's division and exponential of float32, may be off by.
APPROXIMATE_ULPS = 2

# Below e^-87.3 float32 numbers are subnormal, which kernels may take for 0.
SMALLEST_EXPONENT = 87.3


class Losses:
    """What kernels may lose of soft masks beyond rounding: see `assert_within_budget`.

    mask, slope: of m, and of m (1 - m) with its factor in a gradient.
    """

    def __init__(self, backend, values, threshold, tau, relative):
        """values: weights, or norms of channels."""
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
        """Of dw, through each of the gradients that is given."""
        slope = 2 * self.values / self.scale / self.scale / self.tau * self.slope
        lost = 0.0
        if grad_w_hat is not None:
            lost += largest(grad_w_hat * self.mask) + largest(grad_w_hat * self.values * slope)
        if grad_mask is not None:
            lost += largest(grad_mask * slope)
        return lost


def largest(values):
    """The largest magnitude that is a number; 0 of none."""
    values = values.nan_to_num(0, 0, 0)
    return values.abs().max().item() if values.numel() else 0.0


def assert_within_budget(actual, exact, rounded, lost=0.0):
    """error <= 2 x (error of the reference in the storage dtype) + eps max|exact| + lost.

    `exact` is the reference in float64, `rounded` the reference on the storage dtype, for the
    weight or for a stack of it with_neighbours. For float64 the two are one computation, whose own
    rounding counts too: 16 eps.

    `lost` is what a kernel may lose beyond rounding (`Losses`): where e^-|z| is below the smallest
    normal number it may be 0; and a GPU's division and exponential are off by 2 ulp, so

    - z passes through one division, or three if the temperature is relative, and the exponential
      takes it times log2 e, which is rounded twice: z is off by 2 or 6 ulp more, and one;
    - e^-|z| is off by that times |z|, and by 2 ulp of its own;
    - m is off by m (1 - m) times what e^-|z| is, and by the 2 ulp of its division;
    - m (1 - m) is off by what e^-|z| is at most, and by the 2 ulp of its division; its factor in a
      gradient, by 2 for each of its divisions, of which there are as many as in z.
    """
    assert actual.dtype == rounded.dtype
    assert exact.shape in (actual.shape, (exact.shape[:1] + actual.shape))
    if exact.numel() == 0:
        return
    info = torch.finfo(rounded.dtype)
    eps = info.eps * (16 if rounded.dtype == torch.float64 else 1)
    actual, rounded = actual.cpu().double(), rounded.cpu().double()
    own_error = torch.where(rounded == exact, 0, rounded - exact).abs().max()
    exact = exact if exact.shape == actual.shape else exact[0]
    scale = exact.abs().max().clamp(min=info.smallest_normal)
    budget = 2 * own_error + eps * scale + lost
    error = torch.where(actual == exact, 0, actual - exact).abs().max()  # inf - inf is no error
    assert error <= budget, f"error {error:.3g} exceeds the budget {budget:.3g}"
