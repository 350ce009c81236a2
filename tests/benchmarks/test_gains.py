"""What pruning gains: files hold the same weights, sizes are those by hand, outputs are checked."""

import gzip
import io
import json
import sys
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import gains, latency, storage
from benchmarks.pruned_networks import (
    DENSE,
    HALF,
    PRUNINGS,
    SMALL,
    STORED,
    layers,
    random_network,
    removed_units,
    trained_network,
    zeroed_units,
    zeros,
)
from benchmarks.storage import STORAGES, save, stored_size
from pdp_kernels import check_nm
from studies.data import digits

# torch.save writes a record for each tensor, at a multiple of 64 bytes, and an index.
PER_RECORD, PER_FILE = 512, 2048


@pytest.fixture
def matrix():
    """A weight of 64 x 128 with 90% zeros: 819 nonzeros of 8192."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(128, 64, bias=False)).requires_grad_(False)
    return zeros(layer, 0.9).state_dict()


@pytest.mark.parametrize(
    ("name", "dtype", "content"),
    [
        ("torch.save", torch.float32, 8192 * 4),
        ("torch.save", torch.bfloat16, 8192 * 2),
        ("CSR", torch.float32, 819 * (4 + 4) + 65 * 4),
        ("CSR", torch.bfloat16, 819 * (2 + 4) + 65 * 4),
        ("values + bits", torch.float32, 819 * 4 + 8192 // 8),
        ("values + bits", torch.bfloat16, 819 * 2 + 8192 // 8),
    ],
)
def test_a_file_has_the_bytes_of_its_numbers(matrix, name, dtype, content):
    assert matrix["0.weight"].count_nonzero() == 819
    found = stored_size(name, {key: weight.to(dtype) for key, weight in matrix.items()})
    assert content < found["bytes"] < content + PER_FILE + 3 * PER_RECORD


def test_a_packed_2to4_file_has_nine_sixteenths_of_the_bytes():
    pruned = PRUNINGS["2:4"](random_network(SMALL["attention block"])).bfloat16().state_dict()
    weights = sum(weight.numel() for weight in pruned.values() if weight.dim() == 2)
    vectors = sum(weight.nbytes for weight in pruned.values() if weight.dim() == 1)
    content = 2 * weights * 9 // 16 + vectors  # half of the values, and 2 bits for each
    found = stored_size("2:4 packed", pruned)
    assert content < found["bytes"] < content + PER_FILE + 2 * len(pruned) * PER_RECORD


def test_a_safetensors_file_is_a_header_and_the_numbers(matrix):
    pytest.importorskip("safetensors")
    content = STORAGES["safetensors"].encode(matrix)
    assert len(content) == 8 + int.from_bytes(content[:8], "little") + 8192 * 4


@pytest.mark.parametrize("name", SMALL)
def test_zeros_do_not_change_the_size_of_a_plain_file(name):
    dense = random_network(SMALL[name])
    for pruning in ("50% zeros", "95% zeros", "2:4"):
        pruned = PRUNINGS[pruning](dense)
        assert len(save(pruned.state_dict())) == len(save(dense.state_dict()))


def test_a_file_that_is_saved_through_gzip_loads_and_has_the_measured_size(matrix, tmp_path):
    """In the lines of docs/guides/export.md, which compress at level 9."""
    path = tmp_path / "pruned.pt.gz"
    buffer = io.BytesIO()
    torch.save(matrix, buffer)
    path.write_bytes(gzip.compress(buffer.getvalue()))
    measured = stored_size("gzip -9", matrix)["bytes"]
    assert path.stat().st_size == pytest.approx(measured, abs=64)  # a header
    loaded = torch.load(io.BytesIO(gzip.decompress(path.read_bytes())))
    assert torch.equal(loaded["0.weight"], matrix["0.weight"])


@pytest.mark.parametrize("dtype", gains.DTYPES)
@pytest.mark.parametrize("pruning", PRUNINGS)
@pytest.mark.parametrize("name", SMALL)
def test_every_storage_gives_the_same_weights_back(name, pruning, dtype):
    state = PRUNINGS[pruning](random_network(SMALL[name])).to(dtype).state_dict()
    for chosen in storage.storages_for(pruning, SMALL[name].compressed):
        found = stored_size(chosen, state)
        reason = found.get("note", "not installed")
        assert found.get("bytes", 0) > 0 or reason.startswith(("not installed", "compress_2to4"))


@pytest.mark.parametrize(
    "spoil", [lambda state: {}, lambda state: {"0.weight": -state["0.weight"]}]
)
def test_weights_that_come_back_other_are_reported(monkeypatch, matrix, spoil):
    broken = storage.Storage(save, lambda content: spoil(storage.load(content)))
    monkeypatch.setitem(STORAGES, "broken", broken)
    assert stored_size("broken", matrix)["note"].startswith("wrong: 0.weight")


def test_what_is_not_installed_is_said(monkeypatch, matrix):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setattr(storage.shutil, "which", lambda name: None)
    for name in ("safetensors", "zstd -3"):
        assert stored_size(name, matrix) == {"note": "not installed"}


@pytest.mark.parametrize("name", SMALL)
def test_a_network_without_unread_units_has_the_same_outputs(name):
    unread = zeroed_units(random_network(SMALL[name]))
    smaller = removed_units(unread)
    inputs = torch.randn(3, *SMALL[name].inputs)
    torch.testing.assert_close(smaller(inputs), unread(inputs), rtol=1e-4, atol=1e-5)
    for layer in layers(smaller).values():
        expected = (
            (layer.out_features, layer.in_features)
            if isinstance(layer, nn.Linear)
            else (layer.out_channels, layer.in_channels)
        )
        assert layer.weight.shape[:2] == expected


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("MLP 64-512-512-10", 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10),
        ("GPT-2 block", 768 * (3 * 768 + 768 + 2 * 1536) + 2 * 768),
    ],
)
def test_half_of_the_hidden_units_are_removed(name, elements):
    smaller = PRUNINGS[HALF](random_network(STORED[name]))
    assert sum(weight.numel() for weight in smaller.parameters()) == elements


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_a_trained_network_is_pruned_as_its_row_says(pruning):
    model, accuracy = trained_network(SMALL["MLP 64-64-32-10"], pruning, epochs=2)
    weights = [layer.weight for layer in layers(model).values()]
    zero = sum(int((weight == 0).sum()) for weight in weights)
    total = sum(weight.numel() for weight in weights)
    data = digits()
    right = int((model(data.test_inputs).argmax(1) == data.test_labels).sum())
    assert accuracy == pytest.approx(right / 360)
    if pruning.endswith("zeros"):
        assert zero == round(int(pruning.split("%")[0]) * total / 100)
    elif pruning == "2:4":
        assert zero == total // 2 and all(check.ok for check in check_nm(model))
    else:
        sizes = {DENSE: (64, 32), HALF: (32, 16)}[pruning]
        assert zero == 0 and tuple(len(weight) for weight in weights) == (*sizes, 10)


@pytest.mark.parametrize("rows", [(1,), (5,), (2, 3)])
def test_a_layer_in_csr_computes_as_the_dense_one(rows):
    model = zeros(nn.Sequential(nn.Linear(64, 32)), 0.9)
    inputs = torch.randn(*rows, 64)
    torch.testing.assert_close(latency.with_csr(model)(inputs), model(inputs))


def test_bytes_in_memory_are_those_of_values_and_indices(matrix):
    model = nn.Sequential(nn.Linear(128, 64, bias=False))
    model.load_state_dict(matrix)
    assert latency.held_bytes(model) == 8192 * 4
    assert latency.held_bytes(latency.with_csr(model)) == 819 * (4 + 4) + 65 * 4


def wrong(model, example):
    return lambda inputs: model(inputs) * 1.01


def fails_later(model, example):
    runs = []

    def run(inputs):
        runs.append(None)
        if len(runs) > 2:
            raise RuntimeError("while timed")
        return model(inputs)

    return run


@pytest.mark.parametrize(
    ("prepare", "note"),
    [
        (wrong, "wrong: outputs differ by "),
        (fails_later, "failed: RuntimeError: while timed"),
    ],
)
def test_a_runtime_that_fails_is_noted_and_the_others_are_timed(monkeypatch, prepare, note):
    monkeypatch.setitem(latency.PREPARE, latency.COMPILED, prepare)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    name = "MLP 64-64-32-10"
    network = SMALL["attention block"]
    rows = latency.measure(name, network, 1, budget=0.01)
    notes = {(row["runtime"], row["pruning"]): row.get("note", "") for row in rows}
    assert len(notes) == 12
    for (runtime, _), found in notes.items():
        if runtime == latency.COMPILED:
            assert found.startswith(note)
        else:
            assert found == ("not installed" if runtime == latency.ONNX else "")
    assert [gains.is_error(row) for row in rows].count(True) == 3


def test_a_quick_run_has_every_row_and_prints_the_tables(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gains", "--quick", "--out", str(tmp_path)])
    with torch.compiler.set_stance("force_eager"):
        assert gains.main() == 0
    content = json.loads((tmp_path / "gains.json").read_text())
    assert set(content) == {"environment", "settings", "sizes", "latencies"}
    assert {"commit", "torch", "cpu", "onnxruntime"} <= set(content["environment"])

    names = partial(storage.storages_for, compressors=())
    per_network = sum(2 * len(names(pruning)) for pruning in PRUNINGS)
    compressed = sum(2 * len(PRUNINGS) * len(network.compressed) for network in SMALL.values())
    assert len(content["sizes"]) == len(SMALL) * per_network + compressed
    for row in content["sizes"]:
        assert {"network", "weights", "elements", "dtype", "pruning", "storage"} <= set(row)
        assert row.get("note") or row["of dense"] > 0
        if (row["pruning"], row["storage"]) == (DENSE, "torch.save"):
            assert row["of dense"] == 1
    assert {row["network"] for row in content["sizes"] if "accuracy" in row} == {"MLP 64-64-32-10"}

    timed = [row for row in content["latencies"] if row["runtime"] != latency.TENSOR_CORES]
    assert len(timed) == 12 + 12 + 9  # no products with CSR for convolutions
    for row in timed:
        assert row["difference"] <= latency.TOLERANCE or row["note"] == "not installed"
        if "note" not in row:
            low, high = row["quartiles_s"]
            assert low <= row["median_s"] <= high and row["runs"] >= 3
        if row["runtime"] in (latency.EAGER, latency.CSR):
            assert row["held_bytes"] > 0
    printed = capsys.readouterr().out
    assert "| half of the hidden units removed |" in printed and "## " not in printed
    if not torch.cuda.is_available():
        assert f"{latency.TENSOR_CORES}: not yet measured: needs a CUDA device" in printed


def test_a_plain_run_measures_the_networks_of_the_documentation():
    arguments = gains.parse_arguments([])
    assert not arguments.quick and arguments.parts == gains.PARTS and arguments.out is None
    with pytest.raises(SystemExit):
        gains.parse_arguments(["--networks", "VGG"])
