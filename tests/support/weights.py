"""The weights that every kernel is run on."""

import torch

import pdp_kernels  # noqa: F401  registers the operators

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
SIZES = (1, 2, 31, 33, 4097, 9973, 40009)

# What the sum of a weight's masks, powers or squares is finite for.
FINITE = {
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


def denormals(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return subnormal magnitudes, zero among them."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    return torch.randint(0, 100, (size,), dtype=bits).view(dtype)


def huge(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return magnitudes up to the largest one of the dtype."""
    return (torch.rand(size, dtype=torch.float64) * torch.finfo(dtype).max).to(dtype)


def with_special_values(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return normal weights, one in eight of which is inf, -inf, NaN or -NaN."""
    weight = torch.randn(size).to(dtype)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan], dtype=dtype)
    where = torch.randperm(size)[: size // 8]
    weight[where] = special[torch.arange(len(where)) % 4]
    return weight


SPECIAL = {
    "denormals": denormals,
    "huge": huge,
    "inf and NaN": with_special_values,
    "all NaN": lambda n, dtype: torch.full((n,), torch.nan, dtype=dtype),
}

DISTRIBUTIONS = (*FINITE, *SPECIAL)


def weight_of(distribution: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight of one of `DISTRIBUTIONS`."""
    if distribution in SPECIAL:
        return SPECIAL[distribution](size, dtype)
    return FINITE[distribution](size).to(dtype)


def counts_of(size: int) -> list[int]:
    """Return how many weights to prune: none, one, half, all but one, all."""
    return sorted({0, min(1, size), size // 2, max(0, size - 1), size})
