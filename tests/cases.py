"""What the tests share: the weights the kernels are run on, and the error budget."""

import torch

import pdp_kernels  # noqa: F401
from pdp_kernels import reference

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


def assert_within_budget(actual, exact, rounded, lost=0.0):
    """error <= 2 x (error of the reference in the storage dtype) + eps max|exact| + lost.

    `exact` is the reference in float64, `rounded` the reference on the storage dtype, for the
    weight or for a stack of it with_neighbours. For float64 the two are one computation, whose own
    rounding counts too: 16 eps. `lost` is what a kernel leaves out on purpose.
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
    largest = exact.abs().max().clamp(min=info.smallest_normal)
    budget = 2 * own_error + eps * largest + lost
    error = torch.where(actual == exact, 0, actual - exact).abs().max()  # inf - inf is no error
    assert error <= budget, f"error {error:.3g} exceeds the budget {budget:.3g}"
