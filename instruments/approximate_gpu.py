"""Triton's interpreter with divisions and exponentials as inexact as a GPU's may be.

On NVIDIA GPUs a float32 division compiles to div.full, a power of 2 to ex2.approx, and an
exponential to that of the argument times log2 e. The PTX manual bounds both errors by 2 ulp
("Floating Point Instructions"). The interpreter calls NumPy, which rounds both correctly. This
module adds an error of up to 2 ulp, in one of the modes below. Results that GPUs compute exactly
stay exact: division by a power of two, 2^n for an integer n, and results that are 0, infinite or
NaN. The error depends on mantissas only.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np

ULPS = 2
LOG2_E = np.float32(1.4426950408889634)
MANTISSA = np.uint32(0x7FFFFF)


def constant(ulps: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda bits: np.full(bits.shape, ulps, dtype=np.int64)


def scattered(seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from bits to errors of -2 to 2 ulp: a hash of the mantissa."""

    def ulps(bits: np.ndarray) -> np.ndarray:
        mixed = (bits & MANTISSA).astype(np.uint64) + np.uint64(seed << 32)
        with np.errstate(over="ignore"):
            for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):  # splitmix64
                mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(factor)
        return (mixed >> np.uint64(33)).astype(np.int64) % (2 * ULPS + 1) - ULPS

    return ulps


# The errors of division and exponential in ulp, by mode.
MODES = {
    "up": (constant(ULPS), constant(ULPS)),
    "down": (constant(-ULPS), constant(-ULPS)),
    "apart": (constant(ULPS), constant(-ULPS)),
    "scattered 0": (scattered(0), scattered(1)),
    "scattered 1": (scattered(2), scattered(3)),
}


def moved(exact: np.ndarray, ulps: np.ndarray, exactly: np.ndarray) -> np.ndarray:
    """Return float32 numbers moved by some ulp, except where `exactly`."""
    bits = exact.view(np.int32).astype(np.int64)
    magnitude = bits & 0x7FFFFFFF
    stays = exactly | (magnitude == 0) | (magnitude >= 0x7F800000)
    magnitude = np.where(stays, magnitude, np.clip(magnitude + ulps, 0, 0x7F800000))
    return (magnitude | (bits & 0x80000000)).astype(np.uint32).view(np.float32)


@contextlib.contextmanager
def approximate_arithmetic(mode: str) -> Iterator[None]:
    """Run the interpreter's kernels in this mode of `MODES` within the context."""
    from triton.runtime.interpreter import InterpreterBuilder

    division_error, exponential_error = MODES[mode]

    @np.errstate(all="ignore")
    def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
        if numerator.dtype != np.float32:
            return np.divide(numerator, denominator)
        numerator, denominator = np.broadcast_arrays(numerator, denominator)
        quotient = np.divide(numerator, denominator)
        bits = np.ascontiguousarray(denominator).view(np.uint32)
        return moved(quotient, division_error(bits), bits & MANTISSA == 0)

    @np.errstate(all="ignore")
    def exponential(argument: np.ndarray) -> np.ndarray:
        if argument.dtype != np.float32:
            return np.exp(argument)
        return power_of_two(np.asarray(argument * LOG2_E, dtype=np.float32))

    @np.errstate(all="ignore")
    def power_of_two(power: np.ndarray) -> np.ndarray:
        if power.dtype != np.float32:
            return np.exp2(power)
        exact = np.exp2(power.astype(np.float64)).astype(np.float32)
        return moved(exact, exponential_error(power.view(np.uint32)), power == np.rint(power))

    names = ("create_fdiv", "create_exp", "create_exp2")
    real = {name: getattr(InterpreterBuilder, name) for name in names}
    InterpreterBuilder.create_fdiv = lambda self, left, right: self.binary_op(left, right, divide)
    InterpreterBuilder.create_exp = lambda self, argument: self.unary_op(argument, exponential)
    InterpreterBuilder.create_exp2 = lambda self, power: self.unary_op(power, power_of_two)
    try:
        yield
    finally:
        for name, method in real.items():
            setattr(InterpreterBuilder, name, method)
