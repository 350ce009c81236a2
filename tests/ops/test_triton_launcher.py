"""A kernel that was compiled is launched again without Triton, in the variant that Triton finds."""

import itertools
from functools import partial

import pytest
import torch

from tests.support.triton_variants import count_variants

pytest.importorskip("triton")


class StandIn:
    """A kernel, or a compiled one, that notes its launches."""

    def __init__(self, launches, name, compiled=None):
        self.launches, self.name, self.compiled = launches, name, compiled

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append((self.name, grid, arguments, options))
            return self.compiled

        return launch


def test_each_variant_is_launched_without_triton_from_its_second_launch_on():
    from pdp_kernels.triton_kernels.launch import Launcher

    launches = []
    launch = Launcher(StandIn(launches, "Triton", StandIn(launches, "compiled")))
    launch(5, "a", 1, 2, num_warps=4)
    launch(7, "a", 3, 4, num_warps=4)
    launch(7, "b", 3, 4, num_warps=4)
    launch(7, "a", 3, 4, num_warps=8)
    assert launches == [
        ("Triton", (5,), (1, 2), {"num_warps": 4}),
        ("compiled", (7, 1, 1), (3, 4), {}),
        ("Triton", (7,), (3, 4), {"num_warps": 4}),
        ("Triton", (7,), (3, 4), {"num_warps": 8}),
    ]


def test_an_interpreted_kernel_is_interpreted_each_time():
    from pdp_kernels.triton_kernels.launch import Launcher

    launches = []
    launch = Launcher(StandIn(launches, "interpreter"))
    launch(5, "a", 1, num_warps=4)
    launch(6, "a", 2, num_warps=4)
    assert [(name, grid) for name, grid, *_ in launches] == [
        ("interpreter", (5,)),
        ("interpreter", (6,)),
    ]


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Noted(dict):
    """The compiled variants of a Launcher: none, but it notes which was looked for."""

    def get(self, variant):
        self.variant = variant


def compare_variants():
    """Assert that a Launcher's variants are Triton's, for many kinds of calls."""
    from pdp_kernels.triton_kernels import soft_mask
    from triton import knobs

    launchers = (soft_mask.launch_forward, soft_mask.launch_backward)
    for launcher in launchers:
        launcher.compiled = Noted()
    count, asked = knobs.runtime.jit_cache_hook, []
    knobs.runtime.jit_cache_hook = lambda key, **rest: asked.append(key) or count(key=key, **rest)
    found = {launcher: {} for launcher in launchers}

    def call(launcher, operator, *arguments):
        asked.clear()
        operator(*arguments)
        (key,) = asked
        same = found[launcher].setdefault(launcher.compiled.variant, key)
        assert same == key, (launcher.compiled.variant, arguments)

    forward, backward = (
        partial(call, launch, operator)
        for launch, operator in zip(
            launchers, (soft_mask.soft_mask, soft_mask.soft_mask_backward), strict=True
        )
    )
    for dtype, out_dtype, relative in itertools.product(DTYPES, DTYPES, (False, True)):
        real = torch.float64 if dtype == torch.float64 else torch.float32
        for size, first in ((1, 0), (64, 1), (1 << 31, 0)):
            weight = torch.empty(size + first, dtype=dtype, device="meta")[first:]
            t = torch.empty(2, dtype=real, device="meta")[first]
            for return_mask in (False, True):
                forward(weight, t, t, relative, out_dtype, return_mask)
            grad = torch.empty(size, dtype=out_dtype, device="meta")
            for grads in ((grad, None), (None, grad), (grad, grad)):
                backward(*grads, weight, t, t, relative)


STEPS = {"calls": compare_variants}


def test_variants_of_a_launcher_are_those_of_triton():
    """A variant that stood for two of Triton's would launch the wrong one."""
    counts = count_variants(f"{__name__}:STEPS")["calls"]
    assert counts["_soft_mask_fwd_kernel"] == len(DTYPES) ** 2 * 2 * 2 * 2
