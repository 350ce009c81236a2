"""The CPU kernels at every x86-64 level, of which a machine runs only the highest it has.

tests/host_cpu compiles the kernels' own sources once per level; each level the CPU at hand can run
is held against the reference.
"""

import ctypes
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pdp_kernels import pdp_threshold
from pdp_kernels.ops import reference
from tests.distributed import test_digit_counts
from tests.functional import (
    test_compress,
    test_hard_mask,
    test_pq_index,
    test_soft_mask,
    test_soft_mask_channel,
    test_soft_mask_nm,
    test_threshold,
)
from tests.support.cases import DTYPES, denormals, weight_of, with_special_values

SOURCE = Path(__file__).parent / "host_cpu" / "variants.cpp"
CPU_KERNELS = Path(__file__).parents[2] / "csrc" / "cpu"
SETUP = Path(__file__).parents[2] / "setup.py"
# Compiled beside SOURCE, which includes the others: these use names of theirs again.
SEPARATE_SOURCES = [
    CPU_KERNELS / f"{name}.cpp" for name in ("digit_counts", "soft_mask_nm", "soft_mask_channel")
]
COMPILER = shutil.which("c++") or shutil.which("g++")
# What setup.py compiles with.
FLAGS = re.findall(r'"(-[^"]+)"', re.search(r"\nFLAGS = .*\nFLAGS \+= .*\n", SETUP.read_text())[0])
LEVELS = {"x86-64": 1, "x86-64-v3": 3, "x86-64-v4": 4}
GATHERS = {"portable": 1, "avx2": 3, "avx512": 4}  # each with the level it needs
SIZES = (33, 9973, 70_001)  # gathered whole, bracketed by a sample, more than one tile

INFINITY_KEY = 0x7F800000
NAN_KEY = INFINITY_KEY + 1

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64"), reason="levels are those of x86-64"
    ),
]


class Kernels:
    """The C functions of variants.cpp with the signatures of the operators."""

    device = "cpu"

    def __init__(self, level, folder):
        path = folder / f"{level}.so"
        flags = [
            *FLAGS,
            f"-march={level}",
            "-DPDP_MULTIVERSION=",
            "-fPIC",
            "-shared",
            "-pthread",
        ]
        run = subprocess.run(
            [COMPILER, *flags, SOURCE, *SEPARATE_SOURCES, "-o", path],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        self.library = ctypes.CDLL(str(path))

    def call(self, name, *arguments):
        """Calls a function all of whose parameters are 64 bits wide."""
        return getattr(self.library, name)(*map(as_c, arguments))

    def gather(self, variant, data, low, high):
        """The keys gathered, and the number of keys below."""
        count, guard = data.numel(), 64
        keys, below = torch.full((count + guard,), -1, dtype=torch.int32), torch.tensor([7])
        number = list(GATHERS).index(variant)
        gathered = self.call("gather_variant", number, data, count, low, high, keys, below)
        assert (keys[count:] == -1).all(), "a key was written behind the buffer"
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
        given = (weight, weight.dtype, tau, m, weight.stride(dim), pruned, relative)
        self.call("soft_mask_nm", *given, w_hat, mask, w_hat.dtype, weight.numel())
        return w_hat, mask

    def soft_mask_nm_backward(self, grad_w_hat, grad_mask, weight, tau, m, pruned, dim, relative):
        grad = torch.empty_like(weight)
        grads = (grad_w_hat, grad_mask, (grad_mask if grad_w_hat is None else grad_w_hat).dtype)
        given = (weight, weight.dtype, tau, m, weight.stride(dim), pruned, relative)
        self.call("soft_mask_nm_backward", *grads, *given, grad, weight.numel())
        return grad

    def hard_mask_nm(self, weight, m, pruned, dim):
        kept = torch.empty_like(weight, dtype=torch.bool)
        given = (weight, weight.dtype, m, weight.stride(dim), pruned)
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
    """How a list of weights is handed over: their number, addresses, sizes and types."""
    return (
        len(weights),
        torch.tensor([weight.data_ptr() for weight in weights]),
        torch.tensor([weight.numel() for weight in weights]),
        torch.tensor([DTYPES.index(weight.dtype) for weight in weights]),
    )


def as_c(argument):
    if argument is None:
        return None
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, torch.dtype):
        argument = DTYPES.index(argument)
    return ctypes.c_int64(argument)


@pytest.fixture(scope="session")
def baseline(tmp_path_factory):
    return Kernels("x86-64", tmp_path_factory.mktemp("host_cpu"))


@pytest.fixture(scope="session")
def cpu_level(baseline):
    return baseline.call("cpu_level")


@pytest.fixture(scope="session", params=LEVELS)
def kernels(request, baseline, cpu_level, tmp_path_factory):
    if cpu_level < LEVELS[request.param]:
        pytest.skip(f"this CPU lacks {request.param}")
    if request.param == "x86-64":
        return baseline
    return Kernels(request.param, tmp_path_factory.mktemp("host_cpu"))


def special_floats(size):
    """NaN of many payloads, inf, zeros and denormals of both signs among ordinary numbers."""
    values = torch.cat([with_special_values(size, torch.float32), denormals(size, torch.float32)])
    values[::7] = -values[::7]
    values.view(torch.int32)[::11] |= INFINITY_KEY
    return values[torch.randperm(2 * size)[:size]]


@pytest.mark.parametrize("variant", GATHERS)
@pytest.mark.parametrize("make", [torch.randn, special_floats])
def test_every_gather_finds_the_same_keys_in_the_same_order(kernels, cpu_level, make, variant):
    if cpu_level < GATHERS[variant]:
        pytest.skip(f"this CPU lacks {variant}")
    storage = make(4096 + 16)
    everything, one_to_two = (0, NAN_KEY), (0x3F800000, 0x40000000)
    only_nan, only_zero, nothing = (NAN_KEY, NAN_KEY), (0, 0), (0x7F000001, 0x7F000001)
    for low, high in (everything, one_to_two, only_nan, only_zero, nothing):
        for count in (*range(34), 4096):
            for offset in (0, 1, 5, 15):
                data = storage[offset : offset + count]
                keys = (data.view(torch.int32) & 0x7FFFFFFF).clamp(max=NAN_KEY)
                gathered, below = kernels.gather(variant, data, low, high)
                assert torch.equal(gathered, keys[(keys >= low) & (keys <= high)])
                assert below == (keys < low).sum()


def every_pattern(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def random_patterns():
    """Floats of random bits, and the NaNs whose payload a truncation would lose."""
    bits = torch.randint(-(2**31), 2**31, (1_000_003,)).to(torch.int32)
    bits[:4] = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1])
    return bits.view(torch.float32)


def around_ties(dtype, wide):
    """The middle of each two neighbouring 16-bit numbers, and what lies next to it.

    Above the largest finite number its neighbour is the power of two that no longer fits.
    """
    ordered = every_pattern(dtype).double().abs().unique()
    finite = ordered[ordered.isfinite()]
    finite = torch.cat([finite, 2 * finite[-1:] - finite[-2:-1]])
    ties = ((finite[1:] + finite[:-1]) / 2).to(wide)
    beside = [ties.nextafter(torch.tensor(end, dtype=wide)) for end in (0, torch.inf)]
    positive = torch.cat([ties, *beside])
    return torch.cat([positive, -positive])


def assert_same_numbers(actual, expected):
    """Bit for bit, but for a NaN any NaN."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.itemsize]
    assert torch.equal(actual.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(actual[number].view(bits), expected[number].view(bits))


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_widening_is_exact_for_every_bit_pattern(kernels, dtype, wide):
    values = every_pattern(dtype)
    assert_same_numbers(kernels.convert(values, wide), values.to(wide))


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrowing_rounds_to_nearest_even(kernels, dtype, wide):
    for values in (every_pattern(dtype).to(wide), around_ties(dtype, wide)):
        assert_same_numbers(kernels.convert(values, dtype), values.to(dtype))
    values = random_patterns().to(wide)
    assert_same_numbers(kernels.convert(values, dtype), values.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", ["normal", "few distinct", "one shared prefix"])
def test_thresholds_and_hard_masks_equal_the_reference(kernels, distribution, dtype):
    check_selection(kernels, [weight_of(distribution, size, dtype) for size in SIZES])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [denormals, with_special_values])
def test_selection_equals_the_reference_on_denormals_inf_and_nan(kernels, make, dtype):
    check_selection(kernels, [make(size, dtype) for size in SIZES])


def check_selection(kernels, weights):
    for share in (0.0, 0.5, 0.99):
        counts = [1 + int(share * (weight.numel() - 2)) for weight in weights]
        test_threshold.assert_exact(kernels, weights, counts)
        for weight, count in zip(weights, counts, strict=True):
            test_hard_mask.assert_exact(kernels, weight, count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digit_counts_equal_the_reference(kernels, dtype):
    for distribution in ("normal", "few distinct", "one shared prefix"):
        test_digit_counts.check_distribution(kernels.digit_counts, "cpu", distribution, dtype)
    for make in (denormals, with_special_values):
        test_digit_counts.check_special_values(kernels.digit_counts, "cpu", make, dtype)
    test_digit_counts.check_sizes(kernels.digit_counts, "cpu", dtype)


@pytest.mark.parametrize("relative", [False, True], ids=["tau", "relative_tau"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_masks_and_gradients_stay_within_budget(kernels, dtype, relative):
    for distribution in ("normal", "heavy-tailed", "few distinct", "signed zeros"):
        for size in (0, 1, 33, 9973):
            weight = weight_of(distribution, size, dtype)
            threshold = pdp_threshold(weight, 0.7).item()
            for tau in (1e-4, 0.3):
                test_soft_mask.check(kernels, weight, threshold, tau, relative)
    weight = denormals(997, dtype)
    test_soft_mask.check(kernels, weight, pdp_threshold(weight, 0.5).item(), 0.3, relative)
    largest = torch.finfo(dtype).max * torch.linspace(-1, 1, 997).to(dtype)
    test_soft_mask.check(kernels, largest, 1.0, 1e-4, relative)  # w^2 / tau overflows


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_masks_stay_within_budget_in_every_output_type(kernels, dtype, out_dtype):
    test_soft_mask.check(kernels, torch.randn(1033).to(dtype), 0.7, 0.1, False, out_dtype)


@pytest.mark.parametrize("relative", [False, True], ids=["tau", "relative_tau"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_are_masked_within_budget_and_hard_masks_are_exact(kernels, dtype, relative):
    for n, m in ((2, 4), (4, 8), (3, 5), (31, 32)):
        for dim in (0, 1):
            weight = torch.randn(test_soft_mask_nm.shape_for(m, dim)).to(dtype)
            test_soft_mask_nm.check(kernels, weight, m, m - n, dim, relative)
            test_soft_mask_nm.check_hard(kernels, weight.round(), m, m - n, dim)


@pytest.mark.parametrize("relative", [False, True], ids=["tau", "relative_tau"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_are_masked_within_budget(kernels, dtype, relative):
    for shape, dim in [*test_soft_mask_channel.SHAPES, *test_soft_mask_channel.LARGE_SHAPES]:
        weight = torch.randn(shape).to(dtype)
        test_soft_mask_channel.check(kernels, weight, dim, relative, relative)


@pytest.mark.parametrize("dtype", test_compress.COMPRESSED_DTYPES, ids=str)
def test_compression_equals_torchs(kernels, dtype):
    test_compress.assert_equals_torch(kernels.compress_2to4, test_compress.every_group(dtype))
    test_compress.assert_equals_torch(kernels.compress_2to4, torch.randn(96, 1088).to(dtype))


@pytest.mark.parametrize("norms", test_pq_index.NORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_power_sums_equal_the_formula(kernels, dtype, norms):
    test_pq_index.test_sums_are_right_for_every_size_and_mask(kernels.power_sums, dtype, norms)
    test_pq_index.test_sums_of_inf_nan_and_of_the_ends_of_the_range(
        kernels.power_sums, dtype, norms
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_power_sums_of_rows_equal_the_formula(kernels, dtype):
    test_pq_index.test_sums_of_rows(kernels.power_sums, dtype)
