"""Builds of the kernels' own sources for this CPU, with the signatures of the operators.

The CPU sources are compiled once for each instruction set: an installed extension runs only the
highest that its machine has. The CUDA sources are compiled on the model of instruments/host_cuda.
"""

import ctypes
import re

import torch

from instruments.build import CXX, ROOT, build
from instruments.host_build import HostBuild
from pdp_kernels.ops import reference
from tests.support.weights import DTYPES

SOURCE = ROOT / "tests" / "backends" / "host_cpu" / "variants.cpp"
CSRC = ROOT / "csrc"
# Compiled beside SOURCE, which includes the others: these use names of theirs again.
SEPARATE_SOURCES = [
    CSRC / "cpu" / f"{name}.cpp" for name in ("digit_counts", "soft_mask_nm", "soft_mask_channel")
]
# What setup.py compiles with.
FLAGS = re.findall(
    r'"(-[^"]+)"', re.search(r"\nFLAGS = .*\nFLAGS \+= .*\n", (ROOT / "setup.py").read_text())[0]
)
# Each instruction set of csrc/cpu/parallel.h, and the x86-64 level of the CPUs that run it.
LEVELS = {"x86-64": 1, "x86-64-v3": 3, "x86-64-v4": 4, "avx2": 3}
GATHERS = {"portable": 1, "avx2": 3, "avx512": 4}  # each with the level it needs


def sources():
    """Return the files that a build of the CPU kernels may include."""
    return sorted([SOURCE, *CSRC.glob("*.h"), *(CSRC / "cpu").iterdir()])


class CpuBuild:
    """The CPU kernels, compiled for one instruction set, with the signatures of the operators."""

    device = "cpu"

    def __init__(self, level):
        chosen = f"-march={level}" if level.startswith("x86-64") else f"-m{level}"
        flags = [*FLAGS, chosen, "-DPDP_MULTIVERSION=", "-fPIC", "-shared", "-pthread"]
        name = f"{level}.so"
        command = [CXX, *flags, SOURCE, *SEPARATE_SOURCES, "-o", name]
        self.library = ctypes.CDLL(str(build(name, sources(), command)))

    def call(self, name, *arguments):
        """Call a function of variants.cpp, all of whose parameters are 64 bits wide."""
        return getattr(self.library, name)(*map(as_c, arguments))

    def gather(self, variant, data, low, high):
        """Return the keys gathered, and the number of keys below."""
        count, guard = data.numel(), 64
        keys, below = torch.full((count + guard,), -1, dtype=torch.int32), torch.tensor([7])
        number = list(GATHERS).index(variant)
        gathered = self.call("gather_variant", number, data, count, low, high, keys, below)
        assert (keys[count:] == -1).all(), "a key was written beyond the buffer"
        return keys[:gathered], below.item() - 7

    def convert(self, values, dtype):
        result = torch.empty(values.shape, dtype=dtype)
        self.call("convert", values, values.dtype, result, dtype, values.numel())
        return result

    def thresholds(self, weights, counts):
        results = torch.empty(len(weights), dtype=torch.float64)
        self.call("thresholds", *as_list(weights), counts, results)
        return results.to(reference.threshold_dtype(weights))

    def digit_counts(self, weights, prefixes, digit):
        bytes_each = weights[0].element_size()
        bins = 1 << reference.DIGIT_BITS[bytes_each][digit]
        counts = torch.empty(len(weights), bins, dtype=torch.int64)
        above = torch.empty_like(prefixes)
        given = (*as_list(weights), prefixes, bytes_each, digit)
        self.call("digit_counts", *given, counts, above)
        return counts, above

    def hard_mask(self, weight, count):
        kept = torch.empty(weight.shape, dtype=torch.bool)
        self.call("hard_mask", weight, weight.dtype, weight.numel(), count.item(), kept)
        return kept

    def soft_mask(self, weight, threshold, tau, relative, out_dtype, return_mask):
        w_hat = torch.empty_like(weight, dtype=out_dtype)
        mask = torch.empty_like(w_hat) if return_mask else None
        given = (weight, weight.dtype, threshold, tau, relative)
        self.call("soft_mask", *given, w_hat, mask, out_dtype, weight.numel())
        return w_hat, mask

    def soft_mask_backward(self, grad_w_hat, grad_mask, weight, threshold, tau, relative):
        grad = torch.empty_like(weight)
        grad_dtype = (grad_mask if grad_w_hat is None else grad_w_hat).dtype
        given = (grad_w_hat, grad_mask, grad_dtype, weight, weight.dtype, threshold, tau, relative)
        self.call("soft_mask_backward", *given, grad, weight.numel())
        return grad

    def soft_mask_nm(self, weight, tau, m, pruned, dim, relative, out_dtype, return_mask):
        w_hat = torch.empty_like(weight, dtype=out_dtype)
        mask = torch.empty_like(w_hat) if return_mask else None
        given = (weight, weight.dtype, tau, m, weight.stride(dim), pruned.item(), relative)
        self.call("soft_mask_nm", *given, w_hat, mask, w_hat.dtype, weight.numel())
        return w_hat, mask

    def soft_mask_nm_backward(self, grad_w_hat, grad_mask, weight, tau, m, pruned, dim, relative):
        grad = torch.empty_like(weight)
        grads = (grad_w_hat, grad_mask, (grad_mask if grad_w_hat is None else grad_w_hat).dtype)
        given = (weight, weight.dtype, tau, m, weight.stride(dim), pruned.item(), relative)
        self.call("soft_mask_nm_backward", *grads, *given, grad, weight.numel())
        return grad

    def hard_mask_nm(self, weight, m, pruned, dim):
        kept = torch.empty_like(weight, dtype=torch.bool)
        given = (weight, weight.dtype, m, weight.stride(dim), pruned.item())
        self.call("hard_mask_nm", *given, kept, weight.numel())
        return kept

    def channel_layout(self, weight, dim):
        channels, inner = weight.shape[dim], weight.stride(dim)
        return weight.numel() // (channels * inner), channels, inner

    def channel_norms(self, weight, dim, rms):
        norms = torch.empty(weight.shape[dim], dtype=reference.threshold_dtype([weight]))
        layout = self.channel_layout(weight, dim)
        self.call("channel_norms", weight, weight.dtype, *layout, rms, norms)
        return norms

    def soft_mask_channel(self, weight, norms, threshold, tau, dim, relative, out_dtype):
        w_hat = torch.empty_like(weight, dtype=out_dtype)
        mask = w_hat.new_empty(weight.shape[dim])
        given = (weight, weight.dtype, norms, threshold, tau, relative)
        layout = self.channel_layout(weight, dim)
        self.call("soft_mask_channel", *given, *layout, w_hat, mask, w_hat.dtype)
        return w_hat, mask

    def soft_mask_channel_backward(
        self, grad_w_hat, grad_mask, weight, norms, threshold, tau, dim, relative, rms
    ):
        grad = torch.empty_like(weight)
        grads = (grad_w_hat, grad_mask, (grad_mask if grad_w_hat is None else grad_w_hat).dtype)
        given = (weight, weight.dtype, norms, threshold, tau, relative, rms)
        layout = self.channel_layout(weight, dim)
        self.call("soft_mask_channel_backward", *grads, *given, *layout, grad)
        return grad

    def compress_2to4(self, weight):
        rows, cols = weight.shape
        values = weight.new_empty(rows, cols // 2)
        metadata = weight.new_empty(rows, cols // 16, dtype=torch.int16)
        self.call("compress_2to4", weight, weight.dtype, rows, cols, values, metadata)
        return values, metadata

    def power_sums(self, weights, masks, p, q, per_row):
        rows = [weight.shape[0] if per_row else 1 for weight in weights]
        columns = [
            torch.tensor([weight.data_ptr() for weight in weights]),
            torch.tensor([0 if mask is None else mask.data_ptr() for mask in masks]),
            torch.tensor(rows),
            torch.tensor([weight.numel() for weight in weights]),
            torch.tensor([DTYPES.index(weight.dtype) for weight in weights]),
            torch.tensor([p, q], dtype=torch.float64),
        ]
        results = torch.empty(sum(rows), 3, dtype=torch.float64)
        self.call("power_sums", len(weights), *columns, results)
        return results


def as_list(weights):
    """Return the number, the addresses, the sizes and the types of weights."""
    return (
        len(weights),
        torch.tensor([weight.data_ptr() for weight in weights]),
        torch.tensor([weight.numel() for weight in weights]),
        torch.tensor([DTYPES.index(weight.dtype) for weight in weights]),
    )


def as_c(argument):
    """Return an argument as C takes it: a pointer or 64 bits."""
    if argument is None:
        return None
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, torch.dtype):
        argument = DTYPES.index(argument)
    return ctypes.c_int64(argument)


class CudaBuild:
    """The CUDA kernels on the model of a GPU, with the signatures of the operators."""

    device = "cpu"

    def __init__(self):
        self.host = HostBuild()
        self.digit_counts = self.host.digit_counts
        self.power_sums = self.host.power_sums
        self.soft_mask_list = self.host.soft_mask_list

    def thresholds(self, weights, counts):
        thresholds = self.host.thresholds(weights, counts.tolist()).thresholds
        return thresholds

    def hard_mask(self, weight, counts):
        return self.host.hard_mask(weight, counts.item())

    def soft_mask_list_backward(self, grads, weights, thresholds, taus, relative):
        in_order = [
            grad
            if grad is None or grad.stride() == weight.stride()
            else torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
            for grad, weight in zip(grads, weights, strict=True)
        ]
        return self.host.soft_mask_list_backward(in_order, weights, thresholds, taus, relative)
