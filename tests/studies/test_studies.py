"""The studies run, in a short form on data that needs no download."""

import csv
import gzip
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from studies import data, grid, train_image, train_text
from studies.command_line import budget_of
from studies.methods import METHODS, NM_METHODS, make_method
from studies.methods.base import Mask
from studies.methods.learned import ScoredMask, Shrink, StraightThrough
from studies.methods.magnitude import ACDC
from studies.networks import mlp
from studies.tables import Row, plot_by_setting, plot_by_sparsity, write_table
from studies.train_image import ImageTask, load_images, random_crop_and_flip
from studies.train_text import SIZES, TextTask
from studies.training import Recipe, train

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(epochs=4, batch=64, lr=0.1, weight_decay=5e-4)


def digits_mlp():
    return mlp(64, 300, 100, 10)


def run_study(name, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"studies.{name}", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def digits():
    return ImageTask(load_images("mlp", None), RECIPE.batch, augment=False)


def train_digits(task, name, sparsity=0.9, pattern="unstructured", options=None, **arguments):
    torch.manual_seed(0)
    model = train_image.make_network("mlp", task)
    budget = budget_of(sparsity, pattern, RECIPE.epochs)
    method = make_method(name, model, budget, **(options or {}))
    outcome = train(task, model, method, RECIPE, seed=0, show_progress=False, **arguments)
    return model, outcome


def weights_of(model):
    return [weight.detach() for weight in model.parameters() if weight.dim() > 1]


def zeros_of(model):
    return sum(int((weight == 0).sum()) for weight in weights_of(model))


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"dense", "sr-ste"}))
def test_method_meets_the_sparsity_exactly_in_plain_weights(digits, name):
    model, outcome = train_digits(digits, name)
    total = sum(weight.numel() for weight in weights_of(model))
    assert zeros_of(model) == math.floor(0.9 * total + 0.5)
    assert model.state_dict().keys() == digits_mlp().state_dict().keys()
    assert all(type(layer) in (torch.nn.Linear, torch.nn.ReLU, torch.nn.Flatten) for layer in model)
    assert outcome.sparsity == zeros_of(model) / total
    # OptG's ramp is a sigmoid in epochs, and is far from its end after four.
    assert outcome.score > (0.3 if name == "optg" else 0.7)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"dense", "sr-ste", "pdp", "pdp-paper"}))
def test_finalize_prunes_what_the_method_has_not(name):
    model = digits_mlp()
    method = make_method(name, model, budget_of(0.9, "unstructured", 10))
    assert method.sparsity() < 0.05 or name == "dnw"  # which prunes from the start
    method.finalize()
    total = sum(weight.numel() for weight in weights_of(model))
    assert zeros_of(model) == math.floor(0.9 * total + 0.5)


def test_dense_prunes_nothing(digits):
    model, outcome = train_digits(digits, "dense")
    assert zeros_of(model) == 0
    assert outcome.sparsity == 0
    assert outcome.score > 0.9


@pytest.mark.parametrize("name", sorted(set(NM_METHODS) - {"dense"}))
def test_method_keeps_n_of_m(digits, name):
    model, outcome = train_digits(digits, name, pattern="2:4")
    assert outcome.sparsity == 0.5
    for weight in weights_of(model):
        assert ((weight.view(len(weight), -1, 4) != 0).sum(2) == 2).all()
    assert outcome.score > 0.8


def test_str_brings_weights_back_where_thresholds_pruned_too_many(digits):
    model, outcome = train_digits(digits, "str", options={"decay": 0.5})
    assert outcome.own_sparsity > 0.95
    assert outcome.sparsity == pytest.approx(0.9, abs=1e-4)
    assert zeros_of(model) == math.floor(0.9 * sum(w.numel() for w in weights_of(model)) + 0.5)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_resumed_training_equals_the_uninterrupted_one(digits, name, tmp_path):
    pattern = "2:4" if name == "sr-ste" else "unstructured"
    expected, outcome = train_digits(digits, name, pattern=pattern)
    _, nothing = train_digits(digits, name, pattern=pattern, folder=tmp_path, stop_after=2)
    assert nothing is None
    resumed, again = train_digits(digits, name, pattern=pattern, folder=tmp_path, resume=True)
    for parameter, other in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other)
    assert again[:4] == outcome[:4]
    assert [int(row["epoch"]) for row in read_csv(tmp_path / "log.csv")] == [1, 2, 3, 4]


def test_resumed_training_repeats_dropout(tmp_path):
    size = SIZES["tiny"]._replace(layers=1, dropout=0.2)
    recipe = size.recipe._replace(epochs=2)
    task = TextTask(data.help_text(), size.context, recipe.batch, steps_per_epoch=3)

    def train_gpt(**arguments):
        torch.manual_seed(0)
        model = train_text.make_network(size, task)
        budget = budget_of(0.75, "unstructured", recipe.epochs, exclude=("head",))
        method = make_method("pdp", model, budget)
        train(task, model, method, recipe, seed=0, show_progress=False, **arguments)
        return model

    expected = train_gpt()
    train_gpt(folder=tmp_path, stop_after=1)
    resumed = train_gpt(folder=tmp_path, resume=True)
    for parameter, other in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other)
    assert not (expected.head.weight == 0).any()


def gradients(function, *inputs):
    """The output, and its gradients for a random gradient of the output."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    output = function(*inputs)
    upstream = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return output.detach(), upstream, torch.autograd.grad(output, inputs, upstream)


def test_transforms_and_their_gradients():
    weight = torch.tensor([0.5, -0.1, 0.3, -0.9, 0.0], dtype=torch.float64)
    kept = torch.tensor([True, False, True, False, False])
    pruned = weight.masked_fill(~kept, 0)

    for transform in (Mask(weight), ScoredMask(weight)):
        transform.mask.copy_(kept)
        w_hat, upstream, (gradient,) = gradients(transform, weight)
        assert torch.equal(w_hat, pruned)
        assert torch.equal(gradient, upstream * kept)
    transform(weight).backward(upstream)
    assert torch.equal(transform.scores.grad, upstream * weight)

    w_hat, upstream, (gradient,) = gradients(lambda w: StraightThrough.apply(w, kept, 0.25), weight)
    assert torch.equal(w_hat, pruned)
    assert torch.equal(gradient, upstream + 0.25 * (weight - pruned))

    threshold = torch.tensor(0.2, dtype=torch.float64)
    w_hat, _, got = gradients(Shrink.apply, weight, threshold)
    expected, _, reference = gradients(
        lambda w, t: w.sign() * (w.abs() - t).relu(), weight, threshold
    )
    torch.testing.assert_close((w_hat, *got), (expected, *reference))


def test_acdc_phases():
    method = make_method("acdc", digits_mlp(), budget_of(0.9, "unstructured", 100))
    assert isinstance(method, ACDC)
    sparse = [epoch for epoch in range(100) if method.is_sparse(epoch)]
    assert sparse == [e for e in range(10, 75) if e // 5 % 2 == 0] + [*range(85, 100)]


def test_crop_and_flip():
    images = torch.arange(2 * 3 * 6 * 5).view(2, 3, 6, 5) + 1.0
    shifts = set()
    for seed in range(40):
        moved = random_crop_and_flip(images, torch.Generator().manual_seed(seed))
        for image, result in zip(images, moved, strict=True):
            padded = torch.nn.functional.pad(image, [4] * 4)
            matches = [
                (row, column, flip)
                for row in range(9)
                for column in range(9)
                for flip in (False, True)
                if torch.equal(
                    result,
                    padded[:, row : row + 6, column : column + 5].flip([2] if flip else []),
                )
            ]
            assert len(matches) == 1
            shifts.add(matches[0])
    assert {flip for *_, flip in shifts} == {False, True}
    assert {row for row, *_ in shifts} == {column for _, column, _ in shifts} == set(range(9))


def test_mnist_files(tmp_path):
    images = torch.randint(256, (3, 28, 28), dtype=torch.uint8)
    for prefix in ("train", "t10k"):
        header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
        content = header + images.numpy().tobytes()
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
        content = bytes([0, 0, 8, 1]) + (3).to_bytes(4, "big") + bytes([7, 0, 9])
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))
    loaded = data.mnist(tmp_path)
    assert torch.equal(loaded.train_inputs, images.unsqueeze(1) / 255)
    assert loaded.test_labels.tolist() == [7, 0, 9]


def test_cifar10_folder_and_archive(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 2), ("test", 1)):
        for label, value in (("cat", 50), ("dog", 200)):
            folder = tmp_path / "cifar10" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                image.new("RGB", (32, 32), (value, value, value)).save(folder / f"{number}.jpg")
    loaded = data.cifar10(tmp_path)
    assert loaded.train_inputs.shape == (4, 3, 32, 32)
    assert loaded.train_labels.tolist() == [0, 0, 1, 1]
    assert loaded.test_inputs.mean((1, 2, 3)).mul(255).round().tolist() == [50, 200]
    archived = tmp_path / "archived"
    archived.mkdir()
    with tarfile.open(archived / data.CIFAR10_ARCHIVE, "w:xz") as archive:
        archive.add(tmp_path / "cifar10", "cifar10")
    for part, other in zip(loaded, data.cifar10(archived), strict=True):
        assert torch.equal(part, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, "unstructured", 10), "sparsity"),
        ((0.5, "4:2", 10), "pattern"),
        ((0.5, "unstructured", 0), "epochs"),
        ((0.5, "unstructured", 10, 5, 6), "warmup and ramp"),
    ],
)
def test_budget_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        budget_of(*arguments)


@pytest.mark.parametrize(("name", "pattern"), [("gmp", "2:4"), ("sr-ste", "unstructured")])
def test_method_of_another_pattern(name, pattern):
    with pytest.raises(ValueError, match="method"):
        make_method(name, digits_mlp(), budget_of(0.5, pattern, 4))


@pytest.fixture
def call_main(monkeypatch, capsys):
    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("network", ["mlp", "lenet", "resnet20"])
def test_train_image(network, call_main, tmp_path):
    common = ("--network", network, "--epochs", 2, "--sparsity", 0.8, "--out", tmp_path)
    stopped = call_main(train_image, *common, "--stop-after", 1)
    assert "stopped after epoch 1 of 2" in stopped
    assert "pdp: test accuracy" in call_main(train_image, *common, "--resume")
    assert len(read_csv(tmp_path / "log.csv")) == 2
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")
    model = torch.load(tmp_path / "model.pt")
    weights = [weight for weight in model.values() if weight.dim() > 1]
    total = sum(weight.numel() for weight in weights)
    assert sum(int((w == 0).sum()) for w in weights) == math.floor(0.8 * total + 0.5)


def test_train_text(call_main, tmp_path):
    short = ("--size", "tiny", "--epochs", 2, "--steps-per-epoch", 5, "--out", tmp_path)
    output = call_main(train_text, *short, "--method", "str", "--str-decay", 100)
    assert "str: test loss" in output
    losses = [float(row["loss"]) for row in read_csv(tmp_path / "log.csv")]
    assert losses[1] < losses[0] < 5  # ln 103 = 4.63 by chance


def test_setting_of_another_method(call_main, tmp_path):
    with pytest.raises(ValueError, match=r"tau must be left out with method gmp, got 0\.1"):
        call_main(train_image, "--method", "gmp", "--tau", 0.1, "--out", tmp_path)


def test_study_runs_what_is_missing(tmp_path):
    """In a process of its own, as its workers import the main module."""
    path = tmp_path / "methods.csv"
    present = "mlp,gmp,unstructured,0.9,0,1,0.125,,0.9,1.0"
    path.write_text(",".join(Row._fields) + f"\n{present}\n")
    arguments = ("--epochs", 1, "--seeds", 2, "--workers", 2, "--out", tmp_path)
    settings = ("--settings", "dense", "pdp", "gmp", "--sparsities", 0.5, 0.9)
    output = run_study("grid", "methods", *arguments, *settings)
    assert path.read_text().splitlines()[1] == present
    rows = read_csv(path)
    assert len(rows) == 2 * (1 + 2 + 2)  # dense once per seed
    assert len({tuple(row.values())[:6] for row in rows}) == len(rows)
    assert output == (tmp_path / "methods.md").read_text()
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", sorted(grid.STUDIES))
def test_settings_of_studies_are_valid(name, tmp_path):
    for setting in grid.STUDIES[name]():
        budget = budget_of(0.9, "2:4" if name == "nm" else "unstructured", 20)
        make_method(setting.method, digits_mlp(), budget, **setting.options)


def test_study_table_and_plot(tmp_path):
    def row(setting, pattern, sparsity, seed, accuracy, soft, own):
        return Row("mlp", setting, pattern, sparsity, seed, "20", accuracy, soft, own, 10.0)

    rows = [
        row("dense", "unstructured", "0", "0", 0.98, None, 0.0),
        row("pdp", "unstructured", "0.9", "0", 0.97, 0.975, 0.9),
        row("pdp", "unstructured", "0.9", "1", 0.96, 0.965, 0.9),
        row("str", "unstructured", "0.95", "0", 0.9, None, 0.91),
    ]
    write_table(rows, tmp_path / "table.md", "python -m studies.grid")
    table = (tmp_path / "table.md").read_text().splitlines()
    assert "    python -m studies.grid" in table
    assert table[4:] == [
        "| | 90% | 95% | soft, 90% | soft, 95% | time |",
        "|---|---|---|---|---|---|",
        "| dense | 98.00 | 98.00 |  |  | 10 s |",
        "| pdp | 96.50 ± 0.71 |  | 97.00 ± 0.71 |  | 10 s |",
        "| str |  | 90.00 |  |  | 10 s |",
        "",
        "Sparsity before the final pruning, where it missed the budget: str at 95%: 91.00%.",
    ]
    for plot in (plot_by_sparsity, plot_by_setting):
        plot(rows, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "plot.png").unlink()


def test_sap_mnist(tmp_path):
    output = run_study("sap_mnist", "--rounds", 2, "--epochs", 1, "--seeds", 1, "--out", tmp_path)
    rows = read_csv(tmp_path / "rounds.csv")
    assert len(rows) == 4 * 3  # methods, rounds and the dense network
    remaining = {row["method"]: float(row["remaining"]) for row in rows if row["round"] == "2"}
    assert set(remaining) == {"SAP, neuron", "SAP, global", "one-shot", "lottery ticket"}
    assert remaining["lottery ticket"] == pytest.approx(0.64, abs=1e-3)
    assert all(0 < share < 0.9 for share in remaining.values())
    for picture in ("accuracy.png", "pq_index.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "accuracy at equal remaining weights" in output


def test_remove_dead_channels():
    pytest.importorskip("torch_pruning")
    output = run_study("remove_dead_channels", "--epochs", 1, "--sparsity", 0.5)
    masked, smaller, difference = output.strip().splitlines()[-3:]
    weights = [int(line.split()[1].replace(",", "")) for line in (masked, smaller)]
    # Half of the channels between two convolutions of 32 x 64 x 9 weights, in each of 3 blocks.
    assert weights[0] - weights[1] == 3 * (2 * 32 * 32 * 9 + 2 * 32)
    assert masked.split("accuracy")[1] == smaller.split("accuracy")[1]
    assert float(difference.split(":")[1]) < 1e-4
