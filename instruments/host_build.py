"""The sources of the CUDA kernels, compiled for the CPU and called with CPU tensors."""

import ctypes
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from instruments.build import CXX, HOST_CUDA, build, cuda_sources
from pdp_kernels.ops import reference

TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

HOPPER_SHARED_MEMORY = 227 * 1024
ADA_SHARED_MEMORY = 99 * 1024  # the least of all devices

SAMPLED_FROM = 1 << 22  # kSampledFrom of csrc/cuda/thresholds.cuh

FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-fPIC"]

# Elements after each result. A kernel that writes beyond its result changes them.
GUARD = 64


def build_library(counting: bool = False):
    """Compile host_cuda/library.cpp and return the path of the shared library.

    Args:
        counting: whether it calls host_cuda/counters.cpp for each access.
    """
    plain = [CXX, *FLAGS, "-O2", "-I", HOST_CUDA, "-c"]
    kernels = [*plain, "-fsanitize=thread"] if counting else plain
    name = "counting.so" if counting else "kernels.so"
    objects = ["library.o", "self_test.o", "engine.o", *(["counters.o"] if counting else [])]
    return build(
        name,
        cuda_sources(),
        [*kernels, HOST_CUDA / "library.cpp", HOST_CUDA / "self_test.cpp"],
        [*plain, HOST_CUDA / "engine.cpp", HOST_CUDA / "counters.cpp"],
        [CXX, "-shared", *objects, "-ldl", "-o", name],
    )


class KernelError(Exception):
    """A mistake of a kernel that the CUDA model detected."""


class Selected(NamedTuple):
    """The result of a selection. Only the thresholds are known for a list of several key widths.

    candidates: the number of keys of each weight that a pass left to later ones.
    fallbacks: the number of weights whose sample did not lead to the threshold.
    """

    thresholds: Tensor
    candidates: Tensor
    fallbacks: int


class HostBuild:
    """The operators of csrc/cuda on CPU tensors. A seed determines the order of threads.

    Weights and masks must be dense, and are read in the order of memory.
    """

    def __init__(self, counting: bool = False):
        self._library = ctypes.CDLL(str(build_library(counting)))
        for name in ("host_launches", "host_overlapped_launches", "host_workspace_bytes"):
            getattr(self._library, name).restype = ctypes.c_int64
        self.device()
        self.sample_from()

    def device(self, multiprocessors: int = 2, shared_memory=HOPPER_SHARED_MEMORY, seed: int = 0):
        self._library.host_device(multiprocessors, shared_memory, ctypes.c_uint64(seed))

    def loads_code_for(self, architecture: int, device: int):
        """Let a device load code that was compiled for an architecture, such as 80."""
        self._library.host_code(device, architecture)

    def sample_from(self, weights: int = SAMPLED_FROM):
        """Let thresholds of that many float32 or float64 weights or more begin with a sample."""
        self._library.host_sampled_from(ctypes.c_int64(weights))

    def launches(self) -> int:
        """Return the number of kernels that the last call launched."""
        return self._library.host_launches()

    def overlapped_launches(self) -> int:
        """Return how many of them may begin before earlier kernels have ended."""
        return self._library.host_overlapped_launches()

    def workspace_bytes(self) -> int:
        """Return the size of the last call's workspace."""
        return self._library.host_workspace_bytes()

    def thresholds(self, weights: Sequence[Tensor], counts: Sequence[int]) -> "Selected":
        """Return the thresholds, and how they were found."""
        result = torch.full((len(weights),), torch.nan, dtype=reference.threshold_dtype(weights))
        candidates, fallbacks = torch.full((len(weights),), -1), torch.full((1,), -1)
        one_width = len({weight.itemsize for weight in weights}) == 1
        unknown = ctypes.c_void_p(None)
        self._call(
            "thresholds",
            *_views(weights),
            torch.tensor(counts),
            result,
            ctypes.c_int(result.dtype == torch.float64),
            *((candidates, fallbacks) if one_width else (unknown, unknown)),
        )
        return Selected(result, candidates, int(fallbacks))

    def digit_counts(self, weights: Sequence[Tensor], prefixes: Tensor, digit: int):
        assert prefixes.dtype == torch.int64
        bytes_each = weights[0].element_size()
        bins = 1 << reference.DIGIT_BITS[bytes_each][digit]
        counts = torch.full((len(weights) * bins + GUARD,), -7)
        above = torch.full((len(weights) + GUARD,), -7)
        numbers = (ctypes.c_int64(bytes_each), ctypes.c_int64(digit))
        self._call("digit_counts", *_views(weights), prefixes, *numbers, counts, above)
        return _guarded(counts).view(len(weights), bins), _guarded(above)

    def hard_mask(self, weight: Tensor, count: int) -> Tensor:
        kept = torch.full((weight.numel() + GUARD,), -7, dtype=torch.int8)
        size, kind = ctypes.c_int64(weight.numel()), ctypes.c_int32(TYPES[weight.dtype])
        self._call("hard_mask", weight, size, kind, torch.tensor([count]), kept)
        kept = _guarded(kept)
        assert ((kept == 0) | (kept == 1)).all()
        return kept.bool()

    def prune_counts(self, sizes: Sequence[int], sparsities: Sequence[float]) -> list[int]:
        counts = torch.full((len(sizes) + GUARD,), -7)
        tensors = ctypes.c_int64(len(sizes))
        ratios = torch.tensor(sparsities, dtype=torch.float64)
        self._call("prune_counts", tensors, torch.tensor(sizes), ratios, counts)
        return _guarded(counts).tolist()

    def power_sums(self, weights, masks, p: float, q: float, per_row: bool) -> Tensor:
        rows = [weight.shape[0] if per_row else 1 for weight in weights]
        result = torch.full((sum(rows) + GUARD, 3), -7, dtype=torch.float64)
        tensors, data, sizes, types = _views(weights)
        rest = (torch.tensor(rows), sizes, types, ctypes.c_double(p), ctypes.c_double(q), result)
        self._call("power_sums", tensors, data, _addresses(masks), *rest)
        return _guarded(result)

    def soft_mask_list(
        self,
        weights: Sequence[Tensor],
        thresholds: Tensor,
        taus: Tensor,
        relative: bool,
        out_dtype: torch.dtype | None,
    ) -> list[Tensor]:
        dtypes = [out_dtype or weight.dtype for weight in weights]
        return self._masks(weights, None, dtypes, dtypes, thresholds, taus, relative)

    def soft_mask_list_backward(
        self,
        grads: Sequence[Tensor | None],
        weights: Sequence[Tensor],
        thresholds: Tensor,
        taus: Tensor,
        relative: bool,
    ) -> list[Tensor]:
        """The gradients must have the layouts of the weights."""
        dtypes = [weight.dtype for weight in weights]
        of_grads = [torch.float32 if grad is None else grad.dtype for grad in grads]
        return self._masks(weights, grads, dtypes, of_grads, thresholds, taus, relative)

    def _masks(self, weights, grads, dtypes, w_hat_dtypes, thresholds, taus, relative):
        count = len(weights)
        absent = [False] * count if grads is None else [grad is None for grad in grads]
        sizes = [0 if a else w.numel() for a, w in zip(absent, weights, strict=True)]
        buffers = [
            torch.full((size + GUARD,), -7, dtype=dtype)
            for size, dtype in zip(sizes, dtypes, strict=True)
        ]
        tensors, data, _, types = _views(weights)
        self._call(
            "soft_mask_list",
            tensors,
            data,
            (ctypes.c_int64 * count)(*sizes),
            types,
            None if grads is None else _addresses(grads),
            _addresses(buffers),
            (ctypes.c_int32 * count)(*(TYPES[dtype] for dtype in w_hat_dtypes)),
            thresholds,
            ctypes.c_int64(thresholds.stride(0)),
            taus,
            ctypes.c_int64(taus.stride(0)),
            ctypes.c_int(relative),
        )
        return [
            _guarded(buffer)
            if is_absent
            else _guarded(buffer).as_strided(weight.shape, torch.empty_like(weight).stride())
            for buffer, is_absent, weight in zip(buffers, absent, weights, strict=True)
        ]

    def self_test(self, *kernels: str) -> Tensor:
        """Run kernels of host_cuda/self_test.cpp and return their memory, 1,024 words."""
        words = torch.zeros(1024, dtype=torch.int32)
        self._call("self_test", "".join(f"{kernel}\n" for kernel in kernels).encode(), words)
        return words

    def _call(self, name: str, *arguments):
        function = getattr(self._library, f"host_{name}")
        function.restype = ctypes.c_char_p
        pointers = [
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments
        ]
        error = function(*pointers)
        if error is not None:
            raise KernelError(error.decode())


def _addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    """Return the addresses of tensors, null for None."""
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    return (ctypes.c_void_p * len(tensors))(*addresses)


def _views(weights: Sequence[Tensor]) -> tuple:
    """Return the number, addresses, sizes and types of a list of weights."""
    count = len(weights)
    return (
        ctypes.c_int64(count),
        _addresses(weights),
        (ctypes.c_int64 * count)(*(weight.numel() for weight in weights)),
        (ctypes.c_int32 * count)(*(TYPES[weight.dtype] for weight in weights)),
    )


def _guarded(result: Tensor) -> Tensor:
    """Return the result without its guard, which must be unchanged."""
    assert (result[-GUARD:] == -7).all(), "a kernel wrote beyond its result"
    return result[:-GUARD]


class BufferBytes(NamedTuple):
    """The accesses of one launch to one buffer ("shared memory" is one)."""

    launch: int
    kernel: str
    buffer: str
    read: int
    written: int
    atomics: int


class Requests(NamedTuple):
    """The requests of warps to one memory. cost: 32-byte sectors, or passes over the banks."""

    launch: int
    kernel: str
    shared: bool
    kind: str
    count: int
    bytes: int
    cost: int


class Counts(NamedTuple):
    """The accesses of a call. stale_loads: read-only loads of memory that a kernel had written."""

    bytes: list[BufferBytes]
    requests: list[Requests]
    stale_loads: int
    launches: int
    workspace_bytes: int

    def moved(self, buffer: str | None = None) -> int:
        """Return the bytes read and written in device memory, or in one buffer."""
        rows = [row for row in self.bytes if row.buffer != "shared memory"]
        rows = rows if buffer is None else [row for row in rows if row.buffer == buffer]
        return sum(row.read + row.written for row in rows)


class CountingBuild(HostBuild):
    """A HostBuild that counts the memory accesses of a call."""

    def __init__(self):
        super().__init__(counting=True)
        self._library.host_cuda_counts.restype = ctypes.c_char_p

    def count(self, call: Callable[[], object], trace: bool = False) -> Counts:
        """Return the memory accesses of `call`, one operator of this build.

        Args:
            trace: whether to count warps' requests too, which takes a hundred times as long.
        """
        self._library.host_cuda_start_counting(int(trace))
        call()
        counts = json.loads(self._library.host_cuda_counts())
        return Counts(
            [BufferBytes(**row) for row in counts["bytes"]],
            [Requests(**row) for row in counts["requests"]],
            counts["stale_loads"],
            self.launches(),
            self.workspace_bytes(),
        )
