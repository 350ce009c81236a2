"""The code that nvcc and Triton generate has the widths, the spills and the figures committed.

`python -m instruments.compiled` prints it. No GPU is needed.
"""

import fnmatch
import itertools
import json

import pytest

from instruments import cards, compiled
from instruments.build import build
from instruments.cubin import read_cubin
from instruments.cuda_loops import HOT_LOOPS, find_nvcc
from instruments.measured import LOADS, STORES, width
from instruments.sass import disassemble

# Ampere, Hopper, Blackwell. The CUDA source is compiled for the last two, as the figures are.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

DTYPES = ("f32", "f32>bf16", "bf16", "f64>bf16", "f16>f64")
GROUPS = ("2:4", "4:8 conv dim=1", "3:5")
TILES = ("linear dim=0", "linear dim=1", "conv dim=1")
TRITON_KERNELS = {
    "soft_mask forward": ("",),
    "soft_mask backward": ("",),
    "N:M forward": GROUPS,
    "N:M backward": GROUPS,
    "N:M hard mask": GROUPS,
    "channel norms": TILES,
    "channel norms of sums": TILES,
    "channel forward": TILES,
    "channel products": TILES[1:],  # the backward of channels in one run finds them itself
    "channel factors of sums": TILES[1:],
    "channel backward": TILES,
    "compress_2to4": ("",),
}

# Triton kernels that do not depend on the dtype of w_hat. compress_2to4 does not either.
OF_THE_WEIGHT_ALONE = ("N:M hard mask", "channel norms", "channel norms of sums")

# CUDA kernels that read no weights, or few.
SMALL_KERNELS = ("start_selection", "start_counting", "write_items", "add_tiles", "prune_ties")

# Kernels with accesses of less than 16 bytes: the fraction of the bytes that wider ones move all
# the same, and what stands in the way of the rest.
NARROW = {
    "hard_mask write [bf]*": (0.66, "16 bytes are 2 to 8 weights, and these as many bytes of mask"),
    "hard_mask write unaligned *": (0, "weights do not begin at a multiple of 16 bytes"),
    "power_sums * masked *": (0.66, "16 bytes of weights have 4 or 8 bytes of mask"),
    "power_sums * unaligned *": (0, "weights do not begin at a multiple of 16 bytes"),
    "power_sums p=* f64": (0, "a lane reads every 32nd weight, in order"),
    "power_sums any *": (0, "a lane reads every 32nd weight, in order"),
    "soft_mask_list * f32>bf16": (0.66, "16 bytes of weights have 8 bytes of w_hat"),
    "N:M * 2:4 relative f32>bf16": (0.66, "a thread has groups of 4, 8 bytes of bfloat16"),
    "N:M * 2:4 odd relative f32>bf16": (0.66, "a thread has groups of 4, 8 bytes of bfloat16"),
    "N:M * 2:4 linear * f32>bf16": (0.66, "a thread has 4 neighbouring groups"),
    "N:M * 2:4 relative bf16": (0, "a thread has groups of 4, 8 bytes of bfloat16"),
    "N:M * 2:4 odd relative bf16": (0, "a thread has groups of 4, 8 bytes of bfloat16"),
    "N:M * 2:4 linear * bf16": (0, "a thread has 4 neighbouring groups"),
    "N:M hard mask 2:4 f32": (0.8, "a thread has groups of 4, 4 bytes of mask"),
    "N:M hard mask 2:4 odd f32": (0.8, "a thread has groups of 4, 4 bytes of mask"),
    "N:M hard mask 2:4 linear * f32": (0.8, "a thread has 4 neighbouring groups"),
    "N:M hard mask 2:4 bf16": (0, "a thread has groups of 4, 8 bytes of bfloat16"),
    "N:M hard mask 2:4 odd bf16": (0, "a thread has groups of 4, 8 bytes of bfloat16"),
    "N:M * 3:5 *": (0, "a group of 5 has no alignment"),
    "N:M * conv *": (0, "members of a group lie apart"),
    "channel norms conv dim=1 bf16": (0.96, "a program writes 8 bytes for each of its columns"),
    "compress_2to4 bf16": (0.96, "16 weights have 2 bytes of metadata"),
}

# Kernels that calculate in float64 though the weights are narrower, and why they do.
FLOAT64 = {
    "power_sums *": "sums of millions of powers",
    "channel norms *": "squares and their sums",
    "channel products *": "sums of the columns of a program",
    "channel backward * dim=0 *": "the sum of a channel's products, and what becomes of it",
}


@pytest.fixture(scope="module")
def available():
    found = compiled.versions()
    if not found:
        pytest.skip("neither nvcc nor Triton is there")
    return found


@pytest.fixture(
    scope="module", params=["CUDA for Hopper", pytest.param("everything", marks=pytest.mark.slow)]
)
def results(request, available):
    """The code of each compiler for each architecture, or of nvcc for one of them.

    Triton takes a minute and more for everything; test_compress.py compiles a kernel with it.
    """
    if request.param == "CUDA for Hopper":
        if "nvcc" not in available:
            pytest.skip("no nvcc")
        return compiled.compile_and_measure([("nvcc", "sm_90")])
    jobs = set(itertools.product(available, compiled.FIGURES_ARCHITECTURES))
    jobs |= {("triton", "sm_80")} if "triton" in available else set()
    return compiled.compile_and_measure(sorted(jobs, reverse=True))  # Triton, the slower, first


only_with_everything = pytest.mark.parametrize(
    "results", [pytest.param("everything", marks=pytest.mark.slow)], indirect=True
)


def matches(names, patterns):
    """Return the names that each pattern matches."""
    return {pattern: set(fnmatch.filter(names, pattern)) for pattern in patterns}


@only_with_everything
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_triton_compiles_every_kernel_for_every_dtype(available, results, architecture):
    if "triton" not in available:
        pytest.skip("no triton")
    expected = set()
    for title, variants in TRITON_KERNELS.items():
        alone = title in (*OF_THE_WEIGHT_ALONE, "compress_2to4")
        for variant, dtypes in itertools.product(variants, DTYPES):
            dtype = dtypes.partition(">")[0] if alone else dtypes
            if title != "compress_2to4" or dtype in ("bf16", "f16"):
                expected.add(" ".join(filter(None, (title, variant, dtype))))
    names = results["triton", architecture].resources
    names = {name.removesuffix(" (all outputs)") for name in names}
    assert expected <= {name.replace(" relative", "").replace(" absolute", "") for name in names}
    for temperature, dtypes in itertools.product(("relative", "absolute"), DTYPES):
        assert {
            f"soft_mask {way} {temperature} {dtypes}" for way in ("forward", "backward")
        } <= names


def test_every_cuda_kernel_is_measured_or_reads_no_weights(available, results):
    if "nvcc" not in available:
        pytest.skip("no nvcc")
    known = {hot.kernel.partition("_kernel")[0] for hot in HOT_LOOPS} | set(SMALL_KERNELS)
    for (compiler, _), made in results.items():
        if compiler == "nvcc":
            assert {name.partition("_kernel")[0] for name in made.resources} == known


def test_no_kernel_spills_on_hopper(results):
    stacks = {
        name: each["stack"]
        for (_, architecture), made in results.items()
        if architecture == "sm_90"
        for name, each in made.resources.items()
    }
    assert not {name: stack for name, stack in stacks.items() if stack > 0}


def test_every_kernel_moves_16_bytes_at_a_time_but_those_named(results):
    used = set()
    for (_, architecture), made in results.items():
        found = matches([each.name for each in made.measured], NARROW)
        used |= {pattern for pattern, names in found.items() if names}
        narrow = {e.name: e.fraction_wide for e in made.measured if e.fraction_wide < 0.98}
        assert narrow.keys() == set().union(*found.values()), architecture
        for pattern, names in found.items():
            least, _ = NARROW[pattern]
            assert all(narrow[name] >= least for name in names), (architecture, pattern)
    compilers = {compiler for compiler, _ in results}
    assert used == set(NARROW) or len(compilers) == 1


@only_with_everything
def test_a_soft_mask_has_narrow_accesses_for_t_and_tau_alone(available, results):
    if "triton" not in available:
        pytest.skip("no triton")
    for architecture in ARCHITECTURES:
        for each in results["triton", architecture].measured:
            if each.name.startswith("soft_mask"):
                accesses = [*each.loads.items(), *each.stores.items()]
                narrow = sum(count for width, count in accesses if width != "128")
                assert round(narrow * each.elements, 2) == 2, (architecture, each.name)


@only_with_everything
def test_a_mask_of_an_odd_size_costs_what_an_aligned_one_does(available, results):
    if "triton" not in available:
        pytest.skip("no triton")
    for architecture in compiled.FIGURES_ARCHITECTURES:
        costs = {e.name: e.instructions for e in results["triton", architecture].measured}
        masks = {name for name in costs if not name.startswith("channel")}
        odd = {name for name in masks if " odd " in name}
        assert len(odd) == 14
        for name in odd:
            assert costs[name] == pytest.approx(costs[name.replace(" odd", "")], rel=1e-3)


@only_with_everything
def test_channels_of_odd_sizes_cost_what_aligned_ones_do(available, results):
    """Sums by column have a tenth more instructions, for some columns are idle."""
    if "triton" not in available:
        pytest.skip("no triton")
    for architecture in compiled.FIGURES_ARCHITECTURES:
        costs = {e.name: e.instructions for e in results["triton", architecture].measured}
        odd = {name for name in costs if name.startswith("channel") and " odd " in name}
        assert len(odd) == 2 * (2 + 3 + 3) + 3
        for name in odd:
            assert costs[name] <= 1.12 * costs[name.replace(" odd", " linear")], name


@only_with_everything
def test_channels_along_dim_1_take_no_float64_for_each_weight(available, results):
    if "triton" not in available:
        pytest.skip("no triton")
    for architecture in compiled.FIGURES_ARCHITECTURES:
        for each in results["triton", architecture].measured:
            words = each.name.split()
            if words[0] == "channel" and words[1] in ("products", "backward") and "dim=1" in words:
                cost = each.per_element
                assert cost["FP64"] + cost["conversions"] < 0.5, (architecture, each.name)


def test_no_kernel_calculates_in_float64_but_those_named(results):
    used = set()
    for (_, architecture), made in results.items():
        measured = [each for each in made.measured if "f64" not in each.name]
        found = matches([each.name for each in measured], FLOAT64)
        used |= {pattern for pattern, names in found.items() if names}
        wide = {
            each.name
            for each in measured
            if each.per_element["FP64"] + each.per_element["conversions"] > 0
        }
        assert wide == set().union(*found.values()), architecture
    compilers = {compiler for compiler, _ in results}
    assert used == set(FLOAT64) or len(compilers) == 1


@pytest.mark.parametrize("compiler", compiled.COMPILERS)
def test_no_kernel_needs_more_instructions_than_the_committed_figures(available, results, compiler):
    committed = json.loads(compiled.FIGURES.read_text())[compiler]
    if compiler not in available:
        pytest.skip(f"no {compiler}")
    if available[compiler] != committed["version"]:
        pytest.skip(f"{compiler} {available[compiler]}, figures of {committed['version']}")
    made = {key: results[key] for key in results if key[0] == compiler}
    if not made:
        pytest.skip(f"the smaller set has nothing of {compiler}")
    measured = compiled.figures(made)[compiler]
    wrong = [
        f"{architecture} {line}"
        for architecture in compiled.FIGURES_ARCHITECTURES
        if (compiler, architecture) in made
        for line in compiled.rises(committed[architecture], measured[architecture])
    ]
    assert not wrong, "\n".join([*wrong, "if it is meant: python -m instruments.compiled --update"])


def test_a_rise_a_new_kernel_and_a_missing_one_are_reported():
    committed = {"same": 8.0, "fewer": 8.0, "more": 8.0, "missing": 8.0}
    measured = {"same": 8.0, "fewer": 7.0, "more": 8.125, "new": 1.0}
    wrong = compiled.rises(committed, measured)
    assert [line.partition(":")[0] for line in wrong] == ["new", "missing", "more"]
    assert "8.125" in wrong[-1] and "8.0" in wrong[-1]


def test_an_h200_has_27_issue_slots_for_a_float32_and_half_for_units_half_as_wide():
    card = cards.CARDS["H200"]
    assert cards.room(card, "issue", 4) == pytest.approx(27.6, abs=0.05)
    each = {"issue": 55.2, "ALU": 6.9, "FP64": 0, "XU": 6.9}
    allowed = cards.fractions(card, each, 4)
    assert list(allowed) == ["issue", "XU", "ALU"]
    assert list(allowed.values()) == pytest.approx([0.5, 0.5, 2.0], rel=2e-3)


# Each kernel does one thing that the report has to see.
KNOWN = """
extern "C" __global__ void wide(const float4* in, float4* out, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    float4 sum = {};
#pragma unroll 1
    for (int j = 0; j < n; ++j) {
      const float4 x = in[i * n + j];
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    out[i] = sum;
  }
}
extern "C" __global__ void narrow(const short* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];
}
extern "C" __global__ void float64(const float* in, float* out) {
  out[threadIdx.x] = static_cast<float>(in[threadIdx.x] * 0.1 + exp2f(in[threadIdx.x]));
}
extern "C" __global__ void branching(const float4* in, float4* out, int n) {
  if (n % 4 == 0) {
    out[threadIdx.x] = in[threadIdx.x];
  } else {
    const float* from = reinterpret_cast<const float*>(in);
    float* to = reinterpret_cast<float*>(out);
    for (int i = threadIdx.x; i < n; i += 32) to[i] = __expf(from[i]) / from[i + 1];
  }
}
extern "C" __global__ void local(const int* in, int* out) {
  int values[32];
  for (int i = 0; i < 32; ++i) values[in[i] & 31] = in[32 + i];
  out[threadIdx.x] = values[in[64] & 31];
}
"""


@pytest.mark.parametrize("architecture", compiled.FIGURES_ARCHITECTURES)
def test_the_report_sees_loops_widths_float64_and_local_memory(available, architecture, tmp_path):
    if "nvcc" not in available:
        pytest.skip("no nvcc")
    source = tmp_path / "known.cu"
    source.write_text(KNOWN)
    command = [find_nvcc(), f"-arch={architecture}", "-cubin", source, "-o", "known.cubin"]
    kernels = read_cubin(build("known.cubin", [source], command).read_bytes())
    functions = {f.kernel.name: f for f in disassemble(kernels, architecture)}

    def widths(name, kinds, blocks=None):
        return {width(i) for i in functions[name].instructions(blocks) if i.name in kinds}

    def accesses_of(bits, code):
        return sum(i.name in LOADS | STORES and width(i) == bits for i in code)

    (outer,) = (loop for loop in functions["wide"].loops() if loop.nested)
    (inner,) = outer.nested
    assert widths("wide", LOADS, inner.blocks) == {128} and not inner.nested
    assert widths("wide", LOADS, outer.own_blocks) == widths("wide", STORES, inner.blocks) == set()
    assert widths("wide", STORES, outer.own_blocks) == {128}
    assert (widths("narrow", LOADS), widths("narrow", STORES)) == ({16}, {32})
    assert widths("branching", LOADS) == widths("branching", STORES) == {32, 128}
    for side in (32, 128):
        way = functions["branching"].way(lambda code, side=side: accesses_of(side, code))
        assert widths("branching", LOADS, way) == widths("branching", STORES, way) == {side}
    counts = {name: cards.cost(each.instructions()) for name, each in functions.items()}
    assert counts["float64"]["FP64"] > 0 and counts["float64"]["conversions"] > 0
    assert counts["float64"]["MUFU"] == 1
    assert counts["wide"]["FP64"] == counts["wide"]["conversions"] == 0
    stacks = {name: each.kernel.stack for name, each in functions.items()}
    assert stacks.pop("local") >= 128 and not any(stacks.values())
