"""Every step of the benchmark, run small: right answers pass, wrong ones do not, no row is lost."""

import json
import sys
from dataclasses import replace
from math import prod

import pytest
import torch
from torch import Tensor, nn

from benchmarks import __main__ as benchmark
from benchmarks import channels, nm, profile, report, sparse_linear
from benchmarks.batches import exact_threshold, make_batch
from benchmarks.environment import describe_environment
from benchmarks.layer_shapes import NETWORKS
from benchmarks.masks import DTYPES
from benchmarks.measure import Bench, measure_all
from benchmarks.rows import ResultFiles, Row, read_rows
from benchmarks.steps import STEPS
from studies import networks

CPU = torch.device("cpu")


def batch_of(name="65536", dtype="float32", mask="relative", device="cpu"):
    weight, w_hat = DTYPES[dtype]
    batch = make_batch(name, weight, 0.9, torch.Generator().manual_seed(0))
    return batch.masked_by(mask, w_hat).to(torch.device(device))


KINDS = [*((dtype, "relative") for dtype in DTYPES), ("float32", "paper")]
CASES = [
    pytest.param(step, provider, dtype, mask, id=f"{step} {provider} {dtype} {mask}")
    for step, entry in STEPS.items()
    for provider in entry.providers
    for dtype, mask in (KINDS if entry.masked else KINDS[:2])
]


@pytest.mark.parametrize(("step", "provider", "dtype", "mask"), CASES)
def test_every_provider_is_correct(device, step, provider, dtype, mask):
    batch = batch_of(dtype=dtype, mask=mask, device=device)
    with torch.compiler.set_stance("force_eager"):
        answer = STEPS[step].providers[provider](batch)()
        assert STEPS[step].check(batch, answer) is None


@pytest.mark.parametrize("step", ["mask", "mask-2:4", "mask-channel"])
def test_compiled_providers_compile(step):
    batch = batch_of(dtype="float32/bfloat16")
    assert STEPS[step].check(batch, STEPS[step].providers["compiled"](batch)()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_oracle_threshold_is_the_midpoint_of_two_magnitudes(device, dtype):
    weight = torch.tensor([4.0, -1.0, 3.0, -2.0, 0.5], dtype=dtype).to(device)
    found = [exact_threshold(weight, sparsity).item() for sparsity in (0.2, 0.5, 0.8)]
    assert found == [0.75, 2.5, 3.5]


def spoiled(answer, index):
    """The answer with 1% more in the largest element of one of its tensors."""
    if isinstance(answer, Tensor):
        answer = answer.detach().clone()
        flat = answer.view(-1)
        flat[flat.abs().argmax()] *= 1.01
        return answer
    if isinstance(answer, dict):
        return {name: spoiled(value, index) for name, value in answer.items()}
    answer = list(answer)
    nested = not isinstance(answer[0], Tensor) and index < len(answer)
    at = index if nested else 0
    answer[at] = spoiled(answer[at], index)
    return tuple(answer) if nested else answer


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("step", [step for step in STEPS if step != "pack-2:4"])
def test_an_error_of_one_percent_is_reported(step, index):
    batch = batch_of()
    provider = "ours" if "ours" in STEPS[step].providers else step
    answer = STEPS[step].providers[provider](batch)()
    assert STEPS[step].check(batch, spoiled(answer, index)) is not None


def test_packed_weights_in_the_wrong_place_are_reported():
    batch = batch_of(dtype="bfloat16")
    values, metadata = STEPS["pack-2:4"].providers["ours"](batch)()[0]
    assert STEPS["pack-2:4"].check(batch, [(values.flip(0), metadata)]) is not None


def test_channel_baseline_is_right_where_gradients_through_norms_are_large():
    """In bfloat16 its two parts were rounded each, and their sum again: past the tolerance."""
    batch = batch_of("2097152", "bfloat16", "paper")
    assert channels.check_masks(batch, channels.MASKS["eager"](batch)()) is None


@pytest.mark.parametrize("count", [65536, 2359296, 16777216, 67108864, 100663296])
def test_sizes_that_are_measured_can_be_packed(count):
    rows, columns = nm.as_matrix(torch.empty(count, device="meta")).shape
    assert rows % 32 == 0 and columns % 64 == 0


def test_bytes_of_a_step_follow_the_dtypes():
    moved = {step: STEPS[step].moved for step in STEPS}
    assert [moved["forward"](4, h) for h in (4, 2)] == [8, 6]
    assert [moved["backward"](4, h) for h in (4, 2)] == [12, 10]
    assert moved["pack-2:4"](4, 4) == moved["pack-2:4"](2, 2) == 3.125


@pytest.fixture
def broken_step(monkeypatch):
    """A step whose providers fail in each way there is, beside one that does not."""
    runs = []

    def fails_later():
        runs.append(None)
        if len(runs) > 2 * 2:  # checks, on the input and on tiny weights, run it twice
            raise RuntimeError("while timed")
        return [torch.zeros(())]

    def fail(error):
        def raise_it():
            raise error

        return raise_it

    providers = {
        "no such size": lambda batch: fail(ValueError("rows must be a multiple of 32"))(),
        "no memory": lambda batch: fail(torch.OutOfMemoryError("CUDA out of memory")),
        "bug": lambda batch: fail(KeyError("w")),
        "later": lambda batch: fails_later,
        "wrong": lambda batch: lambda: [torch.ones(())],
        "ours": lambda batch: lambda: [torch.zeros(())],
    }
    check = lambda batch, answer: None if answer[0] == 0 else "it is not 0"  # noqa: E731
    step = replace(STEPS["sum"], providers=providers, check=check)
    monkeypatch.setitem(STEPS, "broken", step)
    return list(providers)


def test_failures_become_notes_and_the_other_providers_are_timed(broken_step):
    bench = Bench(CPU, set(broken_step), budget=0.01, limit=1)
    rows = {row.provider: row for row in bench.measure("65536", "broken", [batch_of()])}
    assert {name: row.note for name, row in rows.items()} == {
        "no such size": "failed: ValueError: rows must be a multiple of 32",
        "no memory": "skipped: out of memory",
        "bug": "failed: KeyError: 'w'",
        "later": "failed: RuntimeError: while timed",
        "wrong": "wrong: it is not 0",
        "ours": "",
    }
    assert rows["ours"].runs >= 3 and rows["ours"].median_s > 0
    assert [row.is_error for row in rows.values()] == [True, False, True, True, True, False]


def run_benchmark(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cpu", *words])
    return benchmark.main()


def test_an_input_that_fails_costs_only_its_own_rows(monkeypatch, tmp_path, capsys):
    result = tmp_path / "rows.csv"
    words = ("--inputs", "1", "4096", "--steps", "copy", "forward", "--budget", "0.01")
    assert run_benchmark(monkeypatch, *words, "--providers", "copy", "ours", "--out", str(result))
    first, *others = read_rows(result)
    assert first.input == "1" and first.note.startswith("failed: ValueError: sparsity 0.9 prunes")
    found = [(row.step, row.dtype, row.mask, row.bytes_per_weight, row.note) for row in others]
    assert found == [
        ("copy", "float32", "", 8, ""),
        ("forward", "float32", "relative", 8, ""),
        ("forward", "float32/bfloat16", "relative", 6, ""),
    ]
    assert "1 float32: failed" in capsys.readouterr().err


def test_steps_without_a_mask_run_once_for_each_dtype_of_weights(monkeypatch, tmp_path):
    words = ["--inputs", "4096", "--steps", "copy", "forward", "--budget", "0.01"]
    words += ["--dtypes", "float32/bfloat16", "bfloat16", "float32", "--masks", "relative", "paper"]
    result = tmp_path / "rows.csv"
    run_benchmark(monkeypatch, *words, "--providers", "copy", "ours", "--out", str(result))
    assert [(row.step, row.dtype, row.mask) for row in read_rows(result)] == [
        ("copy", "float32", ""),
        *(("forward", "float32/bfloat16", mask) for mask in ("relative", "paper")),
        *(("forward", "float32", mask) for mask in ("relative", "paper")),
        ("copy", "bfloat16", ""),
        *(("forward", "bfloat16", mask) for mask in ("relative", "paper")),
    ]


def row_of(step="forward", mask="relative", provider="ours", median=1e-3, **others):
    row = Row("1000", 1, 1000, "float32", mask, step, provider, 8.0, median, median, median, 5)
    return replace(row, gb_per_s=8e-6 / median, **others)


def test_rows_are_in_the_file_before_the_run_ends(tmp_path):
    files = ResultFiles(tmp_path, {"commit": "0123abc"}, {"sparsity": 0.9})
    rows = [row_of(host_us=2.5), row_of(provider="eager", note="failed: KeyError: 'w'")]
    for number, row in enumerate(rows, 1):
        files.add([row])
        assert list(read_rows(tmp_path / "benchmark.csv")) == rows[:number]
        content = json.loads((tmp_path / "benchmark.json").read_text())
        assert len(content["rows"]) == number and content["environment"] == {"commit": "0123abc"}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".json"]


def test_a_last_row_that_is_cut_off_is_left_out(tmp_path):
    ResultFiles(tmp_path, {}, {}).add([row_of(), row_of(mask="paper")])
    path = tmp_path / "benchmark.csv"
    path.write_text(path.read_text().rstrip()[:-20])
    assert list(read_rows(path)) == [row_of()]


def test_results_without_the_time_of_the_host_are_read(tmp_path):
    ResultFiles(tmp_path, {}, {}).add([row_of()])
    path = tmp_path / "benchmark.csv"
    path.write_text(path.read_text().replace(",host_us,", ",").replace(",,,", ",,"))
    assert "host_us" not in path.read_text()
    assert list(read_rows(path)) == [row_of()]


def test_short_table_has_a_line_for_each_input_dtype_and_mask(tmp_path, monkeypatch, capsys):
    rows = [
        row_of("copy", "", "copy", 1e-3),
        row_of("threshold", "", median=2e-3, host_us=12.3),
        row_of("forward", "relative", median=4e-3, host_us=45.6),
        row_of("forward", "paper", median=8e-3),
        row_of("forward", dtype="float32/bfloat16", median=2e-3),
        row_of("mask", "relative", median=8e-3),
        row_of("forward", "relative", "eager", median=1.0),
        row_of("backward", "relative", note="failed: KeyError: 'w'"),
    ]
    ResultFiles(tmp_path / "core", {}, {}).add(rows)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    assert report.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "core"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:7]]
    steps = ["threshold", "forward", "mask", "backward"]
    assert cells[0] == ["input", "dtype", "mask", "copy GB/s", *steps]
    assert cells[2][1:] == ["float32", "relative", "0", "2  50%", "4  25%", "8  12%", "1 100%"]
    assert cells[3][1:] == ["float32", "paper", "0", "", "8  12%", "", ""]
    assert cells[4][1:] == ["float32/bfloat16", "relative", "0", "", "2  50%", "", ""]
    assert lines[7] == "1000 float32 relative backward ours: failed: KeyError: 'w'"
    assert lines[9] == report.HOST_TITLE
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[12:14]]
    assert cells == [
        ["threshold", "1", "float32", "", "12.3"],
        ["forward", "1", "float32", "relative", "45.6"],
    ]


def test_headlines_are_those_of_the_first_mask():
    rows = [
        replace(row_of("mask", mask, provider, median), input="2359296")
        for mask, factor in (("relative", 1), ("paper", 7))
        for provider, median in (("ours", 1.0), ("compiled", 3.0 * factor))
    ]
    line = "mask, 2359296, float32: ours is 3x as fast as compiled"
    assert report.format_headlines(rows) == line


def test_every_dtype_has_a_line_in_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.plot import LINES, plot_speedups

    rows = [row_of(dtype=dtype, speedup=2.0) for dtype in DTYPES]
    plot_speedups(tmp_path / "plot.png", rows, "title")
    assert (tmp_path / "plot.png").stat().st_size > 0
    assert len({LINES[dtype] for dtype in DTYPES}) == len(DTYPES)


def test_commit_comes_from_the_environment_if_it_is_set(monkeypatch):
    monkeypatch.setenv("PDP_COMMIT", "0123abc")
    assert describe_environment(CPU)["commit"] == "0123abc"


def test_each_measurement_is_printed_and_written_and_one_that_fails_is_noted(tmp_path, capsys):
    row = {"dense_s": 2e-3, "sparse_s": 1e-3, "speedup": 2.0, "sparse_tflop_per_s": 500.0}

    def fail():
        raise ValueError("x")

    out = tmp_path / "rows.json"
    cases = {"a": lambda: row, "b": fail, "c": lambda: {"note": "wrong: y"}}
    assert measure_all("shape", cases, sparse_linear.describe, {"commit": "0123abc"}, out) == 1
    assert capsys.readouterr().out.splitlines() == [
        "a: dense 0.002 s, 2:4 0.001 s, 2x, 500 TFLOP/s",
        "b: failed: ValueError: x",
        "c: wrong: y",
    ]
    content = json.loads(out.read_text())
    assert content["environment"] == {"commit": "0123abc"}
    assert content["rows"] == [
        {"shape": "a", **row},
        {"shape": "b", "note": "failed: ValueError: x"},
        {"shape": "c", "note": "wrong: y"},
    ]
    assert measure_all("shape", {"a": lambda: row}, sparse_linear.describe, {}, None) == 0


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("resnet50", 25_502_912),
        ("mobilenet-v1", 4_209_088),
        ("bert-base", 85_524_480),
        ("gpt2", 123_532_032),
        ("llama-7b", 6_607_077_376),
        ("llama-7b-block", 202_375_168),
    ],
)
def test_layer_list_has_all_weights_of_the_network(name, total):
    assert sum(prod(shape) for shape, _ in NETWORKS[name]()) == total


@pytest.mark.parametrize(
    ("make", "name"), [(networks.resnet50, "resnet50"), (networks.gpt2, "gpt2")]
)
def test_trained_network_has_the_weights_of_its_list(make, name):
    with torch.device("meta"):
        model = make()
    layers = (layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    assert sorted(layer.weight.numel() for layer in layers) == sorted(
        prod(shape) for shape, _ in NETWORKS[name]()
    )


@pytest.mark.parametrize("dtype", profile.DTYPES.values())
def test_everything_that_is_profiled_runs(dtype, device):
    names = []
    for operation in profile.operations(32, dtype, torch.device(device)):
        assert operation.run() is not None
        assert operation.bytes >= 32 * profile.COLUMNS * dtype.itemsize
        names.append(operation.name)
    assert len(names) == len(set(names))
