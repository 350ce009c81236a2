"""The launches of the Triton kernels, compiled for one architecture without a GPU.

The operators' own launchers run on tensors of device "meta", which have a shape but no memory. The
driver compiles, but launches nothing. So block sizes, numbers of warps and Triton's specialisation
of arguments (divisible by 16, equal to 1) are the released ones. The address of a meta tensor is 0:
aligned to 16 bytes, as the addresses of torch's allocator are.

    python -m instruments.triton_launches sm_90 FILE     write the launches for sm_90 as JSON
"""

import base64
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pdp_kernels.triton_kernels import compress, soft_mask, soft_mask_channel, soft_mask_nm
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Dtypes of the weight and of w_hat.
MEASURED = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
]
DTYPES = [*MEASURED, (torch.float64, torch.bfloat16), (torch.float16, torch.float64)]
SHORT = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

LINEAR = (4096, 4096)
CONVOLUTION = (512, 512, 3, 3)

# Titles by kernel, in the order of the report. None stands for products that sum squares: norms.
TITLES = {
    "_soft_mask_fwd_kernel": "soft_mask forward",
    "_soft_mask_bwd_kernel": "soft_mask backward",
    "_soft_mask_nm_fwd_kernel": "N:M forward",
    "_soft_mask_nm_bwd_kernel": "N:M backward",
    "_hard_mask_nm_kernel": "N:M hard mask",
    None: "channel norms",
    "soft_mask_channel_fwd_kernel": "channel forward",
    "channel_products_kernel": "channel products",
    "channel_norms_kernel": "channel norms of sums",
    "channel_pulls_kernel": "channel factors of sums",
    "soft_mask_channel_bwd_kernel": "channel backward",
    "soft_mask_channel_bwd_whole_kernel": "channel backward",
    "_compress_2to4_kernel": "compress_2to4",
}
# Kernels that read partial sums, and no weights.
SMALL = ("channel norms of sums", "channel factors of sums")
OF_THE_WEIGHT_ALONE = ("N:M hard mask", "channel norms", SMALL[0], "compress_2to4")
WITHOUT_TEMPERATURE = (*OF_THE_WEIGHT_ALONE, "channel products")

# The compile-time constants that are sizes of a tile or block. Their product is the number of
# elements that a program holds in registers, or reads tile by tile.
EXTENTS = ("BLOCK", "TILE", "UNROLL", "GROUPS", "M", "ROWS", "COLUMNS")


class Operators:
    """The operators on a weight of one shape.

    Args:
        shape: the shape of the weight.
        dtypes: the dtypes of the weight and of w_hat.
        relative: whether the temperature is relative.
        everything: whether the mask is an output and has a gradient.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtypes: tuple[torch.dtype, torch.dtype],
        relative: bool,
        everything: bool,
    ) -> None:
        weight, w_hat = dtypes
        real = torch.float64 if weight == torch.float64 else torch.float32
        self.weight = torch.empty(shape, dtype=weight, device="meta")
        self.w_hat = torch.empty(shape, dtype=w_hat, device="meta")
        self.scalar = torch.empty((), dtype=real, device="meta")
        self.count = torch.empty((), dtype=torch.int64, device="meta")
        self.relative = relative
        self.everything = everything
        self.grad_mask = self.w_hat if everything else None

    def soft_mask(self) -> None:
        w, g, t = self.weight, self.w_hat, self.scalar
        soft_mask.soft_mask(w, t, t, self.relative, g.dtype, self.everything)
        soft_mask.soft_mask_backward(g, self.grad_mask, w, t, t, self.relative)

    def groups(self, m: int, dim: int) -> None:
        w, g, tau = self.weight, self.w_hat, self.scalar
        which = (m, self.count, dim)
        soft_mask_nm.soft_mask_nm(w, tau, *which, self.relative, g.dtype, self.everything)
        soft_mask_nm.soft_mask_nm_backward(g, self.grad_mask, w, tau, *which, self.relative)
        soft_mask_nm.hard_mask_nm(w, *which)

    def channels(self, dim: int) -> None:
        w, g, t = self.weight, self.w_hat, self.scalar
        norms = soft_mask_channel.channel_norms(w, dim, True)
        which = (w, norms, t, t, dim, self.relative)
        _, mask = soft_mask_channel.soft_mask_channel(*which, g.dtype)
        grad_mask = mask if self.everything else None
        soft_mask_channel.soft_mask_channel_backward(g, grad_mask, *which, True)

    def compress(self) -> None:
        if self.weight.dtype in compress.NAN:
            compress.compress_2to4(self.weight)


# (variant, shape, operators, their arguments). `odd`: 16 does not divide the number of elements.
Variant = tuple[str, tuple[int, ...], Callable[..., None], tuple[int, ...]]
Dtypes = tuple[torch.dtype, torch.dtype]
SOFT_MASK: Variant = ("", LINEAR, Operators.soft_mask, ())
PATTERNS: list[Variant] = [
    ("2:4", LINEAR, Operators.groups, (4, -1)),
    ("4:8 conv dim=1", CONVOLUTION, Operators.groups, (8, 1)),
    ("3:5", (4096, 4000), Operators.groups, (5, -1)),
    ("linear dim=0", LINEAR, Operators.channels, (0,)),
    ("linear dim=1", LINEAR, Operators.channels, (1,)),
    ("conv dim=1", CONVOLUTION, Operators.channels, (1,)),
]
MEASURED_ONLY: list[Variant] = [
    ("odd", (4099 * 1021,), Operators.soft_mask, ()),
    ("2:4 odd", (1_048_579, 4), Operators.groups, (4, -1)),
    ("2:4 linear dim=0", LINEAR, Operators.groups, (4, 0)),
    ("2:4 conv dim=1", CONVOLUTION, Operators.groups, (4, 1)),
    ("conv dim=0", CONVOLUTION, Operators.channels, (0,)),
    ("odd dim=0", (4099, 4093), Operators.channels, (0,)),
    ("odd dim=1", (4099, 4093), Operators.channels, (1,)),
    ("", LINEAR, Operators.compress, ()),
]
COMPILED_ONLY: list[Variant] = [("", LINEAR, Operators.compress, ())]
HUGE: list[Variant] = [  # sizes of 64 bits
    ("huge", (1 << 31,), Operators.soft_mask, ()),
    ("2:4 huge", (1 << 29, 4), Operators.groups, (4, -1)),
]


def calls(architecture: str) -> Iterator[tuple[Variant, Dtypes, bool, bool]]:
    """Yield what to compile for an architecture: variant, dtypes, relative, measured.

    Hopper and Blackwell measure the dtypes and outputs of training, with the default relative
    temperature. All dtypes are also compiled with all outputs: for Hopper with an absolute
    temperature, for Ampere (and Blackwell, unless measured) with a relative one.
    """
    measured = MEASURED if architecture in ("sm_90", "sm_100") else []
    for dtypes in measured:
        yield SOFT_MASK, dtypes, False, True
        for variant in [SOFT_MASK, *PATTERNS, *MEASURED_ONLY]:
            yield variant, dtypes, True, True
    for dtypes in DTYPES:
        for relative in (True, False):
            yield SOFT_MASK, dtypes, relative, False
        if architecture != "sm_100" or dtypes not in measured:
            for variant in [*PATTERNS, *COMPILED_ONLY]:
                yield variant, dtypes, architecture != "sm_90", False
    for variant in HUGE:
        yield variant, (torch.bfloat16, torch.bfloat16), True, False


class CompilingDriver(DriverBase):
    """A driver without a GPU, for which Triton compiles."""

    def __init__(self, architecture: str) -> None:
        self.capability = int(architecture.removeprefix("sm_"))

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Callable[..., Any]:
        raise NotImplementedError("nothing runs here")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Recorder:
    """Records launches in place of JITFunction.run: it compiles them, but does not launch."""

    def __init__(self) -> None:
        self.compile = JITFunction.run
        self.launches: list[dict[str, Any]] = []

    def run(
        self,
        kernel: JITFunction,
        *args: Any,
        grid: tuple[int, ...],
        warmup: bool,
        **kwargs: Any,
    ) -> None:
        # A kernel whose caller gets the compiled one may be launched without Triton from then on.
        compiled = self.compile(kernel, *args, grid=grid, warmup=True, **kwargs)
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        tensors = [each for each in arguments.values() if torch.is_tensor(each)]
        largest = max(each.numel() for each in tensors)
        extents = [arguments[name] for name in (*EXTENTS, "steps") if name in arguments]
        of_squares = kernel.__name__ == "channel_products_kernel" and args[0] is args[1]
        self.launches.append(
            {
                "title": TITLES[None if of_squares else kernel.__name__],
                "threads": math.prod(grid) * 32 * compiled.metadata.num_warps,
                # Elements that a thread holds in registers, including those outside the tensor.
                "padded": torch.Size(extents).numel() // (32 * compiled.metadata.num_warps),
                # How often its loops run, if an argument says so: over steps that are not held.
                "runs": arguments["steps"] - arguments.get("HELD", 0)
                if "steps" in arguments
                else None,
                "bytes": sum(each.nbytes for each in {id(each): each for each in tensors}.values()),
                # Bytes per element if the kernel reads or writes each of these tensors once.
                "element_bytes": sum(each.itemsize for each in tensors if each.numel() == largest),
                "cubin": base64.b64encode(compiled.asm["cubin"]).decode(),
            }
        )


def launches(architecture: str) -> list[dict[str, Any]]:
    """Return the compiled launches for an architecture, each with a unique name."""
    recorder = Recorder()
    driver.set_active(CompilingDriver(architecture))
    JITFunction.run = lambda kernel, *args, **kwargs: recorder.run(kernel, *args, **kwargs)
    found: dict[str, dict[str, Any]] = {}
    order: dict[str, tuple[int, int, bool]] = {}
    variants: list[str] = []
    for (variant, shape, operator, arguments), dtypes, relative, measured in calls(architecture):
        operators = Operators(shape, dtypes, relative, everything=not measured)
        operator(operators, *arguments)
        weight, w_hat = (SHORT[dtype] for dtype in dtypes)
        for launch in recorder.launches:
            title = launch.pop("title")
            alone = weight == w_hat or title in OF_THE_WEIGHT_ALONE
            words = [title, variant, weight if alone else f"{weight}>{w_hat}"]
            if title not in WITHOUT_TEMPERATURE:
                words.insert(2, "relative" if relative else "absolute")
                words += [] if measured else ["(all outputs)"]
            name = " ".join(filter(None, words))
            variants += [variant] if variant not in variants else []
            order[name] = (list(TITLES.values()).index(title), variants.index(variant), relative)
            elements = operators.weight.numel()
            counted = {"measured": measured and title not in SMALL, "elements": elements}
            found.setdefault(name, launch | counted)
        recorder.launches.clear()
    return [{"name": name} | found[name] for name in sorted(found, key=order.__getitem__)]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(launches(sys.argv[1])))
