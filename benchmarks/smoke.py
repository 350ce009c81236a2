"""Compare every operator once with the reference, in a few seconds.

`python -m benchmarks.smoke` calls torch.ops.pdp on a GPU. `--triton` calls the functions of
triton_kernels, for compute-sanitizer or, on a CPU, in Triton's interpreter. If an error loses the
device, the remaining cases run in a new process.
"""

import argparse
import faulthandler
import fnmatch
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.environment import device_is_lost
from pdp_kernels.ops import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# A case that takes longer hangs: the process prints its stack and ends.
SECONDS = 60

# Allowed error relative to the largest right value, by the dtype of the answer: a few roundings of
# float32 arithmetic with a division and an exponential that are 2 ulp off, and one rounding to 16
# bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8 + 1e-5}


class Case(NamedTuple):
    """An operator's name, its branch, and its arguments on the CPU."""

    operator: str
    what: str
    arguments: tuple


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield every operator and every branch of mask operators, with sizes of incomplete tiles."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (0.02 * torch.randn(shape, generator=generator)).to(dtype)

    weights = [normal(100_003), normal(31), normal(8, 4, 3, 3), normal(1)]
    masks = [weights[0] > 0, None, None, None]
    counts = torch.tensor([w.numel() * 9 // 10 for w in weights])
    yield Case("prune_counts", "", (weights, [0.9, 0.5, 0.0, 1.0]))
    yield Case("thresholds", "", (weights, counts))
    prefixes = torch.zeros(len(weights), dtype=torch.int64)
    bits = reference.DIGIT_BITS[dtype.itemsize]
    key = int(reference.magnitude_keys(weights[1].abs().median().view(1)))
    for digit in range(len(bits)):
        prefixes = torch.full((len(weights),), key >> sum(bits[digit:]))
        yield Case("digit_counts", f"digit {digit}", (weights, prefixes, digit))
    yield Case("hard_mask", "", (weights[0], counts[:1]))
    yield Case("power_sums", "tensors", (weights, masks, 0.5, 1.0, False))
    yield Case("power_sums", "rows", ([weights[2]], [None], 0.3, 1.7, True))

    threshold = torch.tensor(0.02)
    temperatures = ((False, torch.tensor(1e-4)), (True, torch.tensor(0.1)))
    flat, image = normal(4099), normal(8, 12, 3, 3).to(memory_format=torch.channels_last)
    out = torch.bfloat16
    for relative, tau in temperatures:
        what = "relative" if relative else "absolute"
        mask = (threshold, tau, relative)
        yield Case("soft_mask", what, (flat, *mask, out, relative))
        yield Case("soft_mask_backward", what, (normal(4099), None, flat, *mask))
        group = (tau, 4, torch.tensor(2), 1, relative)
        yield Case("soft_mask_nm", what, (image, *group, out, relative))
        yield Case("soft_mask_nm_backward", what, (image, None, image, *group))
    layers, thresholds = [flat, image, normal(33)], torch.tensor([0.02, 0.01, math.inf])
    mask = (thresholds, torch.tensor(0.1).expand(3), True)
    yield Case("soft_mask_list", "", (layers, *mask, out))
    yield Case("soft_mask_list_backward", "", ([normal(4099), image, None], layers, *mask))
    both = (normal(4099), normal(4099), flat, threshold, temperatures[1][1], True)
    yield Case("soft_mask_backward", "and of the mask", both)
    yield Case(
        "soft_mask_nm",
        "3 of 7 pruned",
        (normal(5, 77), tau, 7, torch.tensor(3), 1, True, None, True),
    )
    grads = (normal(5, 77), normal(5, 77), normal(5, 77))
    yield Case("soft_mask_nm_backward", "3 of 7 pruned", (*grads, tau, 7, torch.tensor(3), 1, True))
    yield Case("hard_mask_nm", "2:4", (image, 4, torch.tensor(2), 1))
    yield Case("hard_mask_nm", "3 of 7 pruned", (grads[0], 7, torch.tensor(3), 1))
    if dtype.itemsize == 2:
        yield Case("compress_2to4", "", (normal(64, 192),))

    # Channels of several tiles, of one tile that stays in registers, and of an inner dimension.
    for what, weight, dim in (
        ("long", normal(3, 9001), 0),
        ("whole", normal(37, 129), 0),
        ("inner", normal(37, 130), 1),
    ):
        norms = reference.channel_norms(weight, dim, True)
        threshold = norms.median()
        mask = (norms, threshold, tau, dim, True)
        grad_mask = torch.randn(len(norms), generator=generator).to(dtype)
        yield Case("channel_norms", what, (weight, dim, True))
        yield Case("soft_mask_channel", what, (weight, *mask, out))
        grads = (weight.neg(), grad_mask)
        yield Case("soft_mask_channel_backward", what, (*grads, weight, *mask, True))


# Answers without tolerance: integers and positions; and thresholds, which equal those in float64.
EXACT = {"prune_counts", "thresholds", "digit_counts", "hard_mask", "hard_mask_nm", "compress_2to4"}

TRITON_FILES = ("soft_mask", "soft_mask_list", "soft_mask_nm", "soft_mask_channel", "compress")


def triton_function(operator: str) -> Callable | None:
    """Return the function of triton_kernels that implements an operator, if there is one."""
    for file in TRITON_FILES:
        module = importlib.import_module(f"pdp_kernels.triton_kernels.{file}")
        if hasattr(module, operator):
            return getattr(module, operator)
    return None


def mapped(arguments: Sequence, change: Callable) -> list:
    """Return the arguments with `change` applied to each, and to each element of a list."""
    return [mapped(a, change) if isinstance(a, list) else change(a) for a in arguments]


def doubled(argument: object) -> object:
    """Return a floating point tensor or a dtype in float64, and other arguments as they are."""
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.double()
    return torch.float64 if isinstance(argument, torch.dtype) else argument


def expected(case: Case) -> tuple[Tensor, ...]:
    """Return the reference's answer in float64, or in the dtype where integers depend on it."""
    keeps_dtype = case.operator in EXACT - {"thresholds"}
    arguments = case.arguments if keeps_dtype else mapped(case.arguments, doubled)
    return as_tuple(getattr(reference, case.operator)(*arguments))


def as_tuple(answer: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the answer as a tuple."""
    return (answer,) if isinstance(answer, Tensor) else tuple(answer)


def difference(case: Case, answer: tuple[Tensor, ...]) -> str | None:
    """Return what is wrong with an answer, or None."""
    for number, (got, want) in enumerate(zip(answer, expected(case), strict=True)):
        got = got.cpu()
        if got.shape != want.shape:
            return f"output {number} has shape {tuple(got.shape)}, not {tuple(want.shape)}"
        if got.numel() == 0:
            continue
        if case.operator in EXACT:
            want = want.to(got.dtype)
            right = (got == want).flatten()
        else:
            allowed = TOLERANCE[got.dtype] * want.abs().max()
            right = ((got.double() - want).abs() <= allowed).flatten()
        if not right.all():
            at = int(right.logical_not().int().argmax())
            there = f"{got.flatten()[at].item():.6g} instead of {want.flatten()[at].item():.6g}"
            wrong = int(right.logical_not().sum())
            return f"output {number} is {there} at {at}; {wrong} of {right.numel()} are wrong"
    return None


def run(case: Case, device: torch.device, triton: bool) -> str:
    """Run a case and return "ok" or what is wrong."""

    def sent(argument: object) -> object:
        return argument.to(device) if isinstance(argument, Tensor) else argument

    call = getattr(torch.ops.pdp, case.operator)
    try:
        if triton:
            call = triton_function(case.operator)
        answer = as_tuple(call(*mapped(case.arguments, sent)))
        wrong = difference(case, answer)
    except Exception as error:
        text = " ".join(str(error).split())
        return f"ERROR {type(error).__name__}: {text[:300]}"
    return f"WRONG {wrong}" if wrong else "ok"


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smoke", description=__doc__.splitlines()[0]
    )
    parser.add_argument("operators", nargs="*", default=["*"], help="patterns such as soft_mask*")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--triton", action="store_true", help="the Triton kernels alone")
    parser.add_argument(
        "--no-poison", dest="poison", action="store_false",
        help="leave fresh memory as it is, for initcheck to see what no kernel wrote",
    )  # fmt: skip
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--wrong", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> int:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    faulthandler.enable(file=sys.__stderr__)
    # Fresh memory is NaN, so that an element that no kernel writes shows.
    torch.use_deterministic_algorithms(arguments.poison, warn_only=True)
    chosen = [
        (name, case)
        for name, dtype in DTYPES.items()
        for case in cases(dtype)
        if any(fnmatch.fnmatch(case.operator, pattern) for pattern in arguments.operators)
        and not (arguments.triton and triton_function(case.operator) is None)
    ]
    wrong = arguments.wrong
    for index, (dtype, case) in enumerate(chosen[arguments.start :], arguments.start):
        print(f"{case.operator:27}{dtype:10}{case.what:17}", end="", flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)
        begin = time.perf_counter()
        verdict = run(case, device, arguments.triton)
        faulthandler.cancel_dump_traceback_later()
        wrong += verdict != "ok"
        print(f"{time.perf_counter() - begin:6.2f} s  {verdict}", flush=True)
        if verdict != "ok" and device_is_lost(device):
            print("the device is lost to this process: continuing in a new one", flush=True)
            carried = ["--start", str(index + 1), "--wrong", str(wrong)]
            command = [sys.executable, "-m", "benchmarks.smoke", *sys.argv[1:], *carried]
            os.execv(sys.executable, command)
    print(f"{len(chosen) - wrong} of {len(chosen)} cases are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
