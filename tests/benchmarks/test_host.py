"""The time of the host: of every step on tiny weights, and of masks in models of tiny layers."""

import copy
import itertools
import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import host, measure, timing
from benchmarks.batches import make_tiny_batch
from benchmarks.layer_shapes import NETWORKS
from benchmarks.masks import DTYPES
from benchmarks.measure import Bench
from benchmarks.report import format_host_table
from benchmarks.rows import Row
from benchmarks.steps import STEPS

CPU = torch.device("cpu")


def tiny_batch(step, tensors=2, dtype="float32", mask="relative", device="cpu"):
    weight, w_hat = DTYPES[dtype]
    batch = make_tiny_batch(tensors, STEPS[step].tiny, weight, torch.device(device))
    return batch.masked_by(mask, w_hat)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", STEPS)
def test_every_provider_is_right_on_tiny_weights(device, step, dtype):
    batch = tiny_batch(step, dtype=dtype, device=device)
    with torch.compiler.set_stance("force_eager"):
        for provider in STEPS[step].providers.values():
            assert STEPS[step].check(batch, provider(batch)()) is None


@pytest.fixture
def host_runs(monkeypatch):
    """The runs that are timed on the host. Each takes 6 us."""
    runs = []

    def clock(run):
        runs.append(run)
        return 6e-6, run()

    monkeypatch.setattr(measure, "host_clock_for", lambda device: clock)
    return runs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", ["threshold", "step"])
def test_every_row_has_a_time_of_the_host(device, step, dtype):
    bench = Bench(torch.device(device), set(STEPS[step].providers), budget=0.01, limit=1)
    with torch.compiler.set_stance("force_eager"):
        rows = bench.measure("x", step, [tiny_batch(step, 3, dtype, device=device)])
    assert len(rows) == len(STEPS[step].providers)
    assert all(row.host_us > 0 and not row.note for row in rows)


def test_the_time_of_the_host_is_that_of_a_layer(host_runs):
    bench = Bench(CPU, {"eager", "ours"}, budget=0.01, limit=1)
    rows = bench.measure("three", "mask", [tiny_batch("mask", 3)])
    assert [(row.provider, row.host_us) for row in rows] == [("eager", 2), ("ours", 2)]


def test_the_host_is_timed_once_for_inputs_of_the_same_number_of_weights(host_runs):
    bench = Bench(CPU, {"ours"}, budget=0.01, limit=1)
    bench.measure("first", "mask", [tiny_batch("mask", 3)])
    once = len(host_runs)
    (row,) = bench.measure("second", "mask", [tiny_batch("mask-2:4", 3)])
    assert len(host_runs) == once and row.host_us == 2
    for other in (tiny_batch("mask", 2), tiny_batch("mask", 3, "float32/bfloat16")):
        known = len(host_runs)
        bench.measure("other", "mask", [other])
        assert len(host_runs) > known


def test_a_provider_that_is_wrong_on_tiny_weights_is_not_timed(monkeypatch):
    """Or that fails there, when it is checked or later."""
    runs = []

    def only_large(batch):
        return lambda: [weight.sum() * (1 if len(weight) > 64 else 2) for weight in batch.weights]

    def fails_later(batch):
        def run():
            runs.append(None)
            if len(runs) > 2 * 2:
                raise RuntimeError("while timed")
            return [weight.sum() for weight in batch.weights]

        return run

    providers = STEPS["sum"].providers | {"only large": only_large, "later": fails_later}
    monkeypatch.setitem(STEPS, "sum", replace(STEPS["sum"], providers=providers))
    bench = Bench(CPU, set(providers), budget=0.01, limit=1)
    rows = {row.provider: row for row in bench.measure("x", "sum", [tiny_batch("mask-2:4")])}
    assert rows["only large"].note.startswith("wrong: the sum is")
    assert rows["later"].note == "failed: RuntimeError: while timed"
    assert [row.host_us for row in rows.values() if row.note] == [None, None]
    assert rows["sum"].host_us > 0 and rows["sum"].median_s > 0


def test_the_host_waits_for_the_device_before_a_run_and_not_after_it(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    seconds, answer = timing.host_clock_for(torch.device("cuda"))(lambda: order.append("run"))
    assert order == ["wait", "run"] and seconds > 0 and answer is None


def test_the_clock_of_a_device_waits_as_long_as_the_host_takes(monkeypatch):
    """A device that is busy until the host is ahead, and then works for three milliseconds."""
    order, host = [], itertools.chain([2e-3, 5e-3], itertools.repeat(1.0))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")

        def synchronize(self):
            order.append("end")

        def elapsed_time(self, end):
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append(cycles / 2e9))
    monkeypatch.setattr(timing, "cpu_clock", lambda run: (next(host), run()))
    clock = timing.device_clock_for(torch.device("cuda"))
    other = copy.copy(clock)
    waits = []
    for _ in range(4):
        assert clock(lambda: order.append("run") or "answer") == (3e-3, "answer")
        wait, *rest = order
        assert rest == ["event", "run", "event", "end"]
        waits.append(wait)
        order.clear()
    assert waits == pytest.approx([1e-3, 3.1e-3, 7.6e-3, clock.longest])
    assert other.lead == 1e-3
    assert timing.device_clock_for(torch.device("cpu")) is timing.cpu_clock


def test_inputs_of_the_same_number_of_weights_share_a_line():
    row = Row("4096", 1, 4096, "float32", "relative", "mask", "ours", 20, host_us=1.234)
    rows = [row, replace(row, input="65536"), replace(row, provider="eager", host_us=5)]
    rows += [replace(row, tensors=54, host_us=0.5), replace(row, tensors=49, host_us=None)]
    lines = format_host_table(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["step", "layers", "dtype", "mask", "ours", "eager"]
    assert cells[2:] == [
        ["mask", "1", "float32", "relative", "1.23", "5"],
        ["mask", "54", "float32", "relative", "0.5", ""],
    ]


@pytest.mark.parametrize("name", ["resnet50", "gpt2"])
def test_tiny_networks_have_the_layers_of_their_networks(name):
    shapes = [shape for shape, _ in NETWORKS[name]()]
    layers = [layer for layer in host.tiny_network(name) if not isinstance(layer, nn.Flatten)]
    assert [layer.weight.shape[2:] for layer in layers] == [shape[2:] for shape in shapes]
    assert {layer.weight.shape[:2] for layer in layers} == {(host.WIDTH, host.WIDTH)}


def run_host(monkeypatch, tmp_path, *tasks):
    result = tmp_path / "host.json"
    words = ["--device", "cpu", "--budget", "0.01", "--out", str(result), "--tasks", *tasks]
    monkeypatch.setattr(sys, "argv", ["host", *words])
    with torch.compiler.set_stance("force_eager"):
        return host.main(), json.loads(result.read_text())["rows"]


def test_costs_of_a_layer_are_those_beyond_the_dense_model(monkeypatch, tmp_path, capsys):
    """For every task: its runs work, and their times are divided among the layers."""
    timed = {}

    def time_interleaved(providers, estimates, batches, clock, budget):
        for name, provider in providers.items():
            timed[name], _ = 1e-3 * len(timed), clock(provider(batches[0]))
        return {name: timing.Timing(t, (t, t), 1) for name, t in timed.items()}

    monkeypatch.setattr(host, "time_interleaved", time_interleaved)
    for task, layers in zip(host.TASKS, (54, 54, 49, 49), strict=True):
        timed.clear()
        status, (row,) = run_host(monkeypatch, tmp_path, task)
        assert status == 0 and row["layers"] == layers
        assert row["difference"] < 1e-8
        # dense 0, 1; pdp 2, 3, 4; eager 5, 6, 7; compiled 8, 9, 10 ms
        costs = {"pdp": (2, 2, 4), "eager": (5, 5, 7), "compiled": (8, 8, 10)}
        for name, milliseconds in costs.items():
            want = [1e3 * each / layers for each in milliseconds]
            assert list(row["host_us"][name].values()) == pytest.approx(want)
        assert capsys.readouterr().out.rstrip().endswith("pruner.step 4000 us")


@pytest.mark.parametrize("task", host.TASKS)
def test_the_host_is_timed_on_the_device(device, task):
    with torch.compiler.set_stance("force_eager"):
        row = host.measure(host.TASKS[task], torch.device(device), 0.01)
    assert set(row["host_us"]) == {"pdp", "eager", "compiled"}
    assert min(row["seconds"].values()) > 0


def test_gradients_of_the_tiny_networks_are_checked(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.training_step.difference", lambda *arguments: 0.5)
    status, (row,) = run_host(monkeypatch, tmp_path, next(iter(host.TASKS)))
    assert status == 1 and row["note"] == "wrong: gradients differ by 0.5 of the largest"
