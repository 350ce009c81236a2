"""What the GPU run calls besides the benchmark: each does its work, as far as a CPU lets it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kernels, smoke, sweep, variants
from benchmarks.batches import make_batch
from benchmarks.rows import Row, read_rows
from pdp_kernels import ops
from tests.support import TIMEOUT

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

CASES = [
    pytest.param(case, id=f"{case.operator} {case.what} {name}")
    for name, dtype in smoke.DTYPES.items()
    for case in smoke.cases(dtype)
]


def test_every_operator_has_a_case():
    assert {param.values[0].operator for param in CASES} == set(ops.schemas.SCHEMAS)


@pytest.mark.parametrize("case", CASES)
def test_every_operator_is_right(case, device):
    assert smoke.run(case, torch.device(device), triton=False) == "ok"


@pytest.mark.parametrize(
    "case", [param for param in CASES if smoke.triton_function(param.values[0].operator)]
)
def test_every_triton_kernel_is_right(case, rounding_interpreter):
    if torch.cuda.is_available():
        pytest.skip("with a GPU, Triton compiles")
    assert smoke.run(case, CPU, triton=True) == "ok"


def test_a_wrong_answer_is_reported_with_its_position():
    case = next(case for case in smoke.cases(torch.float32) if case.operator == "soft_mask")
    answer = list(smoke.expected(case))
    answer[0] = answer[0].float()
    answer[0][7] += 1
    verdict = smoke.difference(case, tuple(answer))
    assert verdict.endswith("at 7; 1 of 4099 are wrong")


def test_exact_answers_have_no_tolerance():
    case = next(case for case in smoke.cases(torch.float32) if case.operator == "thresholds")
    (exact,) = smoke.expected(case)
    assert smoke.difference(case, (exact.float(),)) is None
    above = torch.nextafter(exact.float(), torch.tensor(torch.inf))
    assert smoke.difference(case, (above,)).endswith("4 of 4 are wrong")


def test_a_lost_device_costs_one_case():
    """What follows runs in a new process, where this one's mistake is not."""
    script = """
import sys, torch
from benchmarks import smoke
right = torch.ops.pdp.hard_mask
def fail(*arguments):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
torch.ops.pdp.hard_mask = fail
smoke.device_is_lost = lambda device: True
sys.argv[1:] = ["--device", "cpu", "hard_mask", "power_sums"]
smoke.main()
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    lines = result.stdout.splitlines()
    assert result.returncode == 1
    assert "ERROR RuntimeError: CUDA error: an illegal memory access" in lines[0]
    assert lines[1] == "the device is lost to this process: continuing in a new one"
    assert [line.split()[-1] for line in lines[2:-1]] == ["ok"] * 5
    assert lines[-1] == "5 of 6 cases are right"


WITHOUT_OPTIONAL_PACKAGES = """
import sys
for package in ("matplotlib", "numpy", "PIL", "scipy", "sklearn", "torch_pruning", "tqdm"):
    sys.modules[package] = None
from benchmarks.__main__ import parse_arguments
"""


def run_without_optional_packages(*arguments):
    program = f"{WITHOUT_OPTIONAL_PACKAGES}parse_arguments({list(arguments)})"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)


def test_the_benchmark_explains_itself_without_optional_packages():
    result = run_without_optional_packages("--help")
    assert result.returncode == 0, result.stderr
    assert "--inputs" in result.stdout


def test_the_benchmark_names_the_package_that_a_run_needs():
    result = run_without_optional_packages("--device", "cpu")
    assert result.returncode == 2
    assert "a run needs numpy: pip install numpy" in result.stderr


SWEPT = [
    pytest.param(file, choice, id=sweep.label(file, choice))
    for file in sweep.SWEEPS
    for choice in (next(sweep.choices(file)), list(sweep.choices(file))[-1])
]


@pytest.mark.parametrize(("file", "choice"), SWEPT)
def test_triton_kernels_are_right_with_the_constants_of_a_sweep(file, choice, rounding_interpreter):
    if torch.cuda.is_available():
        pytest.skip("with a GPU, Triton compiles")
    with sweep.constants(file, choice):
        for case in smoke.cases(torch.bfloat16):
            function = smoke.triton_function(case.operator)
            if function and function.__module__.endswith(f".{file}"):
                assert smoke.run(case, CPU, triton=True) == "ok"


def test_a_sweep_times_every_choice_and_restores_the_constants(monkeypatch, tmp_path, capsys):
    from pdp_kernels.triton_kernels import soft_mask

    before, result = soft_mask.BLOCK, tmp_path / "rows.csv"
    words = ["soft_mask", "--device", "cpu", "--weights", "65536", "--budget", "0.001"]
    monkeypatch.setattr(sys, "argv", ["sweep", *words, "--out", str(result)])
    monkeypatch.setattr(sweep, "make_batches", one_batch)
    assert sweep.main() == 0
    assert before == soft_mask.BLOCK
    rows = list(read_rows(result))
    labels = {sweep.label("soft_mask", choice) for choice in sweep.choices("soft_mask")}
    assert {row.input for row in rows} == labels and len(rows) == len(labels) * 2 * 3
    kinds = {(row.mask, row.dtype) for row in rows if row.step != "copy"}
    assert kinds == {("relative", "float32/bfloat16"), ("relative", "bfloat16")}
    assert "soft_mask BLOCK=1024 NUM_WARPS=4" in capsys.readouterr().out


def one_batch(name, dtype, device, sparsity):
    return [make_batch(name, dtype, sparsity, torch.Generator(device).manual_seed(0))]


def row_of(choice, median, step="forward"):
    return Row(
        choice, 1, 1000, "float32", "relative", step, "ours", 6.0, median, gb_per_s=1 / median
    )


def test_the_fastest_choice_of_a_sweep_comes_first():
    rows = [row_of("a X=1", 2.0), row_of("a X=2", 1.0), row_of("b X=1", 3.0)]
    lines = sweep.format_sweep(rows).splitlines()
    assert [line[:5] for line in lines] == ["a X=2", "a X=1", "b X=1"]


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_every_variant_changes_exactly_its_own_sources(name, tmp_path):
    folder = variants.folder_of(tmp_path, name)
    variants.copy_sources(folder, variants.VARIANTS[name])
    assert not list(folder.glob("pdp_kernels/*.so"))
    assert (folder / "setup.py").exists() and (folder / "benchmarks" / "__main__.py").exists()
    files = {change.file for change in variants.VARIANTS[name]}
    for path in (ROOT / "csrc" / "cuda").iterdir():
        copy = folder / "csrc" / "cuda" / path.name
        assert (copy.read_text() != path.read_text()) == (path.name in files)


def test_an_unknown_constant_is_rejected():
    source = "constexpr int kX = 1;\nconstexpr int kY = 2;\nconstexpr int kY = 3;\n"
    changed = variants.changed(source, variants.Change("a.cuh", "kX", "3"))
    assert changed == source.replace("kX = 1", "kX = 3")
    for constant in ("kZ", "kY"):
        with pytest.raises(ValueError, match=r"a\.cuh has \d constants"):
            variants.changed(source, variants.Change("a.cuh", constant, "1"))


NCU = """==PROF== Connected to process 1
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","void pdp::f<(int)4, float>(const T<float> *, long)","dram__bytes_read.sum","byte","2,000,000"
"0","void pdp::f<(int)4, float>(const T<float> *, long)","dram__bytes_write.sum","byte","1000000"
"0","void pdp::f<(int)4, float>(const T<float> *, long)","gpu__time_duration.sum","ns","1,000"
"0","void pdp::f<(int)4, float>(const T<float> *, long)","launch__registers_per_thread","","32"
"1","_soft_mask_fwd_kernel","gpu__time_duration.sum","ns","n/a"
==PROF== Disconnected from process 1
"""


def test_kernels_are_read_from_what_ncu_writes(tmp_path):
    path = tmp_path / "ncu.csv"
    path.write_text(NCU)
    heading, first, second = kernels.format_kernels(path).splitlines()
    assert heading.split()[:4] == ["kernel", "GB/s", "us", "MB"]
    assert first.split() == ["f<(int)4,", "float>", "3000", "1.0", "2.0", "1.0", "-", "32", *"---"]
    assert second.split() == ["_soft_mask_fwd_kernel", *["-"] * 9]


def test_the_run_profiles_every_kernel_of_ours_and_no_other():
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    pattern = re.compile(re.search(r"^KERNELS='(.*)'$", text, re.MULTILINE)[1])
    sources = [path.read_text() for path in (ROOT / "triton_kernels").glob("*.py")]
    triton = re.findall(r"^def (\w+_kernel)\(\n    \w+_ptr", "".join(sources), re.MULTILINE)
    assert len(triton) == 12 and all(map(pattern.fullmatch, triton))
    assert pattern.fullmatch("void pdp::count_kernel<unsigned int>(pdp::Plan<unsigned int>)")
    assert not pattern.search("void at::native::vectorized_elementwise_kernel<4, (int)1>(int)")


def test_the_run_asks_ncu_for_what_the_table_shows():
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    asked = re.findall(r"^METRICS\+?=,?(.*)$", text, re.MULTILINE)
    assert sorted(",".join(asked).split(",")) == sorted(kernels.METRICS)


def test_cuda_kernels_are_in_the_namespace_that_the_run_profiles():
    for path in (ROOT / "csrc" / "cuda").glob("*.cuh"):
        text = path.read_text()
        for kernel in re.finditer("__global__", text):
            before = text[: kernel.start()]
            assert before.count("namespace pdp {") == 1 and "}  // namespace pdp" not in before
