"""Run every kernel of the package once under a profiler.

`ncu --profile-from-start off ... python -m benchmarks.profile`. Prints the bytes that each operator
should move, to be compared with the profiler's counts (`benchmarks/kernels.py`).
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.masks import Mask
from pdp_kernels import (
    compress_2to4,
    hard_mask,
    pdp_mask,
    pdp_mask_channel,
    pdp_mask_nm,
    pdp_threshold,
    pq_index,
)
from pdp_kernels.ops import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = 4096


class Operation(NamedTuple):
    """An operator call, and the bytes that the best implementation reads and writes."""

    name: str
    bytes: int
    run: Callable[[], object]


def operations(rows: int, dtype: torch.dtype, device: torch.device) -> Iterator[Operation]:
    """Yield operators on a weight of shape (rows, 4096), with their inputs prepared."""
    weight = (0.02 * torch.randn(rows, COLUMNS, device=device)).to(dtype).requires_grad_()
    grad = torch.randn_like(weight)
    plain = weight.detach()
    one = weight.numel() * weight.element_size()
    threshold = pdp_threshold(plain, 0.9)
    bits = reference.DIGIT_BITS[weight.element_size()]
    key = int(threshold.to(dtype).view(reference.INTEGERS[weight.element_size()]))
    yield Operation("threshold", one, lambda: pdp_threshold(plain, 0.9))
    for digit in range(len(bits)):
        prefix = torch.tensor([key >> sum(bits[digit:])], device=device)
        yield Operation(
            f"digit {digit}",
            one,
            lambda prefix=prefix, digit=digit: torch.ops.pdp.digit_counts([plain], prefix, digit),
        )
    yield Operation("hard mask", one + weight.numel(), lambda: hard_mask(plain, 0.9))
    yield Operation("PQ Index", one, lambda: pq_index(plain))
    for out_dtype in dict.fromkeys((dtype, torch.bfloat16)):
        written = "" if out_dtype == dtype else " to bfloat16"
        arguments = Mask.of("relative", out_dtype, device).arguments
        masks = {
            "mask": partial(pdp_mask, weight, threshold=threshold, **arguments),
            "2:4 mask": partial(pdp_mask_nm, weight, 2, 4, **arguments),
            "channel mask": partial(pdp_mask_channel, weight, 0.5, **arguments),
        }
        for name, mask in masks.items():
            norms = one if name == "channel mask" else 0  # reads for the norms, and for <g, W>
            masked = mask()
            w_hat = masked.numel() * masked.element_size()
            yield Operation(f"{name}{written}, forward", one + w_hat + norms, mask)
            backward = partial(
                torch.autograd.grad, masked, weight, grad.to(out_dtype), retain_graph=True
            )
            yield Operation(f"{name}{written}, backward", 2 * one + w_hat + 2 * norms, backward)
    if dtype == torch.bfloat16:
        yield Operation("2:4 packed", one + one // 2 + one // 16, lambda: compress_2to4(plain))


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--rows", type=int, default=2**14, help="rows of 4096 weights (default: 2^14)"
    )
    return parser.parse_args(words)


def main() -> int:
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        print("profiling needs a CUDA device", file=sys.stderr)
        return 2
    for name, dtype in DTYPES.items():
        for operation in operations(arguments.rows, dtype, torch.device("cuda")):
            operation.run()  # compiles
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
            operation.run()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
            print(f"{operation.name}, {name}: {operation.bytes:,} B", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
