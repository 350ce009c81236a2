"""Launches of Triton kernels that take little of the host's time."""

from collections.abc import Hashable
from typing import Any


class Launcher:
    """Launches a kernel. From its second launch on, a variant is found without Triton.

    Triton finds the compiled variant of a kernel by the types, addresses and values of all
    arguments, on each launch. That takes 5 us.

    Args:
        kernel: a function under triton.jit. Its variants must depend on nothing but what the
            callers name.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[Hashable, Any] = {}

    def __call__(self, programs: int, variant: Hashable, *arguments: Any, num_warps: int) -> None:
        """Launch so many programs.

        Args:
            programs: the size of the grid.
            variant: the device and everything that the kernel is compiled for.
            arguments: every argument of the kernel, by position.
            num_warps: warps per program; part of the variant.
        """
        compiled = self.compiled.get((variant, num_warps))
        if compiled is None:  # the interpreter compiles nothing, and always comes here
            launch = self.kernel[(programs,)]
            self.compiled[variant, num_warps] = launch(*arguments, num_warps=num_warps)
        else:
            compiled[(programs, 1, 1)](*arguments)
