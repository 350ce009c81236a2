"""The studies' programs run, in a short form on data that needs no download."""

import math
import os
import re
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from studies import data, grid, sap_mnist, settings, train_image, train_text, training
from studies.command_line import budget_of
from studies.jobs import Job, make_jobs
from studies.methods import make_method
from studies.tables import Row, Score, plot_by_setting, plot_by_sparsity, read_rows, write_table
from tests.support import TIMEOUT
from tests.support.studies import digits_mlp, read_csv, short_text, small_residual_network

ROOT = Path(__file__).parents[2]


def test_settings_may_have_their_own_schedule(call_main, monkeypatch, tmp_path):
    budgets = {}

    def capture(name, model, budget, **options):
        budgets[budget.warmup, budget.ramp] = name
        raise RuntimeError("not trained")

    monkeypatch.setattr(grid, "make_method", capture)
    monkeypatch.setattr(grid, "_task", train_image.make_task("mlp", None, 128, "cpu"))
    trained = tmp_path / "trained.pt"
    torch.save(digits_mlp().state_dict(), trained)
    gmp, scratch = settings.schedule_settings()[1:3]
    for setting, start in ((gmp, None), (gmp, trained), (scratch._replace(warmup=0.1), trained)):
        job = grid.Job("mlp", setting, "unstructured", 0.9, 0, 20, "cpu", trained=start)
        with pytest.raises(RuntimeError, match="not trained"):
            grid.train_job(job, tmp_path)
    assert budgets == {
        (3.0, 8.0): "gmp-global", (0.0, 12.0): "gmp-global", (2.0, 8.0): "pdp"
    }  # fmt: skip


@pytest.mark.parametrize(
    "network", ["mlp", "lenet", pytest.param("resnet20", marks=pytest.mark.slow)]
)
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


def test_train_text(call_main, monkeypatch, tmp_path):
    text = short_text()
    monkeypatch.setattr(data, "help_text", lambda: text)
    short = ("--size", "tiny", "--epochs", 2, "--steps-per-epoch", 5, "--out", tmp_path)
    output = call_main(train_text, *short, "--method", "str", "--str-decay", 100)
    assert "str: test loss" in output
    losses = [float(row["loss"]) for row in read_csv(tmp_path / "log.csv")]
    assert losses[1] < losses[0] < 5  # ln 103 = 4.63 by chance


def test_settings_of_another_method_are_rejected(call_main, tmp_path):
    with pytest.raises(ValueError, match=r"tau must be left out with method gmp, got 0\.1"):
        call_main(train_image, "--method", "gmp", "--tau", 0.1, "--out", tmp_path)


class InThisProcess:
    """A ProcessPoolExecutor whose calls run at once, in this process."""

    def __init__(self, workers, context, initializer, arguments):
        initializer(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        done = Future()
        try:
            done.set_result(function(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done


PRESENT = "mlp on samples,gmp,unstructured,0.9,0,1,cpu,0.125,,0.9,1.0,c0ffee"


@pytest.fixture
def grid_folder(tmp_path):
    """A folder in which one row of the grid of methods exists."""
    (tmp_path / "methods.csv").write_text(",".join(Row._fields) + f"\n{PRESENT}\n")
    return tmp_path


def check_grid(folder, output, count):
    """The row that existed is as it was, and no row stands twice."""
    assert (folder / "methods.csv").read_text().splitlines()[1] == PRESENT
    rows = read_csv(folder / "methods.csv")
    assert len({tuple(row.values())[:7] for row in rows}) == len(rows) == count
    assert output == (folder / "methods.md").read_text()
    assert (folder / "methods.png").read_bytes().startswith(b"\x89PNG")


def test_grid_runs_what_is_missing(call_main, grid_folder):
    arguments = ("--epochs", 1, "--seeds", 1, "--device", "cpu", "--out", grid_folder)
    settings = ("--settings", "dense", "pdp", "gmp", "--sparsities", 0.9)
    check_grid(grid_folder, call_main(grid, "methods", *arguments, *settings), count=3)
    table = (grid_folder / "methods.md").read_text()
    more = ("--settings", "dense", "pdp", "gmp", "granet", "--sparsities", 0.9)
    redrawn = call_main(grid, "methods", *arguments, *more, "--redraw")
    check_grid(grid_folder, redrawn, count=3)
    assert redrawn == table.replace("pdp gmp --sp", "pdp gmp granet --sp")


def test_rows_of_other_data_or_other_trained_networks_are_not_reused(monkeypatch):
    keys, folders = set(), set()
    for more in ((), ("--pretraining-epochs", "4"), ("--data-dir", "data")):
        command = ["grid", "finetune", "--settings", "pdp", "--sparsities", "0.5", "--epochs", "2"]
        monkeypatch.setattr(sys, "argv", [*command, "--seeds", "1", "--device", "cpu", *more])
        (job,) = make_jobs(grid.parse_arguments())
        keys.add(job.key)
        folders.add(job.folder)
    assert {(key[0], key[5]) for key in keys} == {
        ("mlp on samples", "20+2"),
        ("mlp on samples", "4+2"),
        ("mlp", "20+2"),
    }
    assert len(folders) == 3


@pytest.mark.slow
def test_grid_runs_on_several_workers(grid_folder):
    """In a process of its own, as its workers import the main module."""
    command = [sys.executable, "-m", "studies.grid", "methods", "--epochs", "1", "--seeds", "2"]
    command += ["--workers", "2", "--device", "cpu", "--out", str(grid_folder)]
    command += ["--settings", "dense", "pdp", "gmp", "--sparsities", "0.5", "0.9"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr
    check_grid(grid_folder, done.stdout, count=2 * (1 + 2 + 2))  # dense once per seed


@pytest.mark.parametrize("name", sorted(settings.STUDIES))
def test_settings_of_studies_are_valid(name, tmp_path):
    study = settings.STUDIES[name]
    pattern = {"weights": "unstructured", "groups": "2:4", "channels": "channel"}[study.prunes]
    for setting in study.settings():
        budget = budget_of(0.5, pattern, 20, narrowed=("*.conv1",), finetuning=study.finetunes)
        model = small_residual_network() if study.prunes == "channels" else digits_mlp()
        make_method(setting.method, model, budget, **setting.options)


def test_finetuning_starts_from_a_trained_network(call_main, one_process, tmp_path):
    arguments = ("finetune", "--seeds", 1, "--device", "cpu", "--out", tmp_path)
    arguments += ("--pretraining-epochs", 10, "--settings", "dense", "gmp-global")
    call_main(grid, *arguments, "--epochs", 1, "--sparsities", 0.5)
    rows = {row["setting"]: float(row["score"]) for row in read_csv(tmp_path / "finetune.csv")}
    assert min(rows.values()) > 0.9  # one epoch from scratch leaves 0.1 to 0.3
    assert [path.name for path in (tmp_path / "trained").iterdir()] == [
        "mlp-on-samples_trained_unstructured_0_0_10_cpu.pt"
    ]
    assert not list((tmp_path / "running").iterdir())


@pytest.mark.parametrize("study", ["finetune-nm", "finetune-channels"])
def test_finetuning_prunes_groups_and_channels(call_main, one_process, study, tmp_path):
    arguments = (study, "--seeds", 1, "--device", "cpu", "--out", tmp_path)
    arguments += ("--pretraining-epochs", 3, "--settings", "pdp", "one-shot", "--epochs", 1)
    table = call_main(grid, *arguments, "--sparsities", 0.5, "--patterns", "2:4")
    rows = read_csv(tmp_path / f"{study}.csv")
    assert {row["setting"] for row in rows} == {"pdp", "one-shot"}
    assert {row["pattern"] for row in rows} == {"2:4" if study == "finetune-nm" else "channel"}
    assert "| one-shot |" in table


def test_budgets_have_the_times_of_the_recommended_settings():
    for pattern, finetuning, warmup, ramp in (
        ("unstructured", False, 3, 8),
        ("channel", False, 3, 8),
        ("2:4", False, 7, 4),
        ("unstructured", True, 0, 12),
        ("2:4", True, 0, 0),
    ):
        budget = budget_of(0.5, pattern, 20, narrowed=("*",), finetuning=finetuning)
        assert (budget.warmup, budget.ramp) == pytest.approx((warmup, ramp))
    budget = budget_of(0.5, "2:4", 20, 1.0, 2.0, finetuning=True)
    assert (budget.warmup, budget.ramp) == (1.0, 2.0)


@pytest.fixture
def one_process(monkeypatch):
    """Grids train in this process, whose numbers are as before afterwards."""
    monkeypatch.setattr(grid, "ProcessPoolExecutor", InThisProcess)
    yield
    torch.set_flush_denormal(False)
    torch.backends.cudnn.benchmark = False


def test_a_stopped_run_of_a_grid_goes_on(call_main, one_process, monkeypatch, tmp_path):
    arguments = ("methods", "--seeds", 1, "--epochs", 2, "--settings", "gmp", "--sparsities", 0.5)
    call_main(grid, *arguments, "--out", tmp_path / "whole")
    train_epoch = training.train_epoch

    def stop_at_second(task, model, method, recipe, optimizer, epoch, *rest):
        if epoch == 1:
            raise KeyboardInterrupt
        return train_epoch(task, model, method, recipe, optimizer, epoch, *rest)

    monkeypatch.setattr(training, "train_epoch", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        call_main(grid, *arguments, "--out", tmp_path / "stopped")

    epochs = []
    monkeypatch.setattr(
        training, "train_epoch", lambda *a: (epochs.append(a[5]), train_epoch(*a))[1]
    )
    call_main(grid, *arguments, "--out", tmp_path / "stopped")
    assert epochs == [1]
    whole, stopped = (read_csv(tmp_path / name / "methods.csv") for name in ("whole", "stopped"))
    assert [row["score"] for row in stopped] == [row["score"] for row in whole]


def test_time_limit_ends_a_grid_with_the_rows_so_far(grid_folder):
    command = [sys.executable, "-m", "studies.grid", "methods", "--epochs", "100000"]
    command += ["--settings", "gmp", "--sparsities", "0.9", "--workers", "2", "--device", "cpu"]
    command += ["--out", str(grid_folder), "--time-limit", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 1
    assert "0 of 3 runs" in done.stderr
    assert "stopped by the time limit" in done.stderr
    assert done.stderr.splitlines()[-1] == "no run is done"
    assert (grid_folder / "methods.csv").read_text().splitlines()[1:] == [PRESENT]


def test_progress_tells_epochs_and_the_time_left(capsys, monkeypatch):
    clock = iter((0.0, 20.0))
    monkeypatch.setattr(grid.time, "monotonic", lambda: next(clock))
    jobs = [Job("mlp", settings.method_settings()[0], "unstructured", 0.0, 0, 4, "cpu")] * 2
    epochs = grid.multiprocessing.get_context("spawn").Value("q", 2)
    grid.Progress(jobs, 1, epochs, math.inf).show("; pdp")
    assert (
        capsys.readouterr().err == "20 s: 0 of 2 runs, 1 waiting, 2 of 8 epochs, 60 s left; pdp\n"
    )


def without_times(table):
    return re.sub(r"\d+ s \|", "", table)


def test_rows_of_another_device_are_neither_reused_nor_in_the_table(
    call_main, one_process, tmp_path
):
    arguments = ("methods", "--seeds", 1, "--epochs", 1, "--settings", "gmp", "--sparsities", 0.5)
    arguments += ("--device", "cpu", "--out", tmp_path)
    table = without_times(call_main(grid, *arguments))
    path = tmp_path / "methods.csv"
    header, row = path.read_text().splitlines()
    other = row.replace(",cpu,", ",NVIDIA H100,")
    path.write_text(f"{header}\n{other}\n")
    assert without_times(call_main(grid, *arguments)) == table
    rows = path.read_text().splitlines()
    assert rows[1] == other
    again, first = (each.split(",") for each in (rows[2], row))
    assert again[:-2] == first[:-2] and again[-1] == first[-1]  # all but the time


def test_rows_of_other_columns_are_rejected(tmp_path):
    (tmp_path / "methods.csv").write_text("network,setting,score\nmlp,gmp,0.9\n")
    with pytest.raises(ValueError, match="must have the columns network, setting, pattern"):
        read_rows(tmp_path / "methods.csv")


def test_a_run_that_fails_costs_the_others_nothing(
    call_main, one_process, monkeypatch, capsys, tmp_path
):
    make_method = grid.make_method

    def fail_with_gmp(name, *arguments, **options):
        if name == "gmp":
            raise ValueError("out of luck")
        return make_method(name, *arguments, **options)

    monkeypatch.setattr(grid, "make_method", fail_with_gmp)
    settings = ("--settings", "gmp", "gmp-global", "--sparsities", 0.5, "--seeds", 1)
    with pytest.raises(SystemExit, match=r"failed: mlp-on-samples_gmp_unstructured_0\.5_0_1_cpu"):
        call_main(grid, "methods", *settings, "--epochs", 1, "--device", "cpu", "--out", tmp_path)
    assert "out of luck" in capsys.readouterr().err
    assert [row["setting"] for row in read_csv(tmp_path / "methods.csv")] == ["gmp-global"]
    assert "gmp-global" in (tmp_path / "methods.md").read_text()


def test_study_table_and_plot(tmp_path):
    def row(setting, pattern, sparsity, seed, accuracy, soft, own):
        key = ("mlp", setting, pattern, sparsity, seed, "20", "cpu")
        return Row(*key, accuracy, soft, own, 10.0, "c0ffee" + seed)

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
        "Commits of the code: c0ffee0, c0ffee1.",
        "",
        "| | 90% | 95% | soft, 90% | soft, 95% | time |",
        "|---|---|---|---|---|---|",
        "| dense | 98.00 | 98.00 |  |  | 10 s |",
        "| pdp | 96.50 ± 0.71 |  | 97.00 ± 0.71 |  | 10 s |",
        "| str |  | 90.00 |  |  | 10 s |",
        "",
        "Sparsity before the final pruning, where it missed the budget: str at 95%: 91.00%.",
        "",
        "By how much pdp is better than each, over the same seeds: mean [95% interval of the mean, "
        "Student's t], bold where the interval does not contain 0.",
        "",
        "| pdp against | 90% | 95% |",
        "|---|---|---|",
        "| dense | -1.00 |  |",
        "| str |  |  |",
    ]
    for plot in (plot_by_sparsity, plot_by_setting):
        plot(rows, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "plot.png").unlink()


def test_paired_differences():
    accuracy = Score("accuracy", 100, 2, False)
    mine, other = {"0": 0.90, "1": 0.92, "2": 0.94}, {"0": 0.89, "1": 0.905, "2": 0.92, "3": 0.1}
    # 1, 1.5 and 2 points: the mean's standard error is 0.5 / sqrt(3), the quantile of t_2 4.3027.
    assert accuracy.difference(mine, other) == "**+1.50 [+0.26, +2.74]**"
    assert accuracy.difference(other, mine) == "**-1.50 [-2.74, -0.26]**"
    assert accuracy.difference({"0": 0.9, "1": 0.9}, {"0": 0.8, "1": 0.95}) == (
        "+2.50 [-92.80, +97.80]"
    )
    loss = Score("loss", 1, 4, True)
    assert loss.difference({"0": 1.5}, {"0": 1.75}) == "+0.2500"
    assert loss.difference({"0": 1.5}, {"1": 1.75}) == ""


def test_sap_mnist(call_main, tmp_path):
    arguments = ("--rounds", 2, "--epochs", 1, "--seeds", 1, "--out", tmp_path)
    output = call_main(sap_mnist, *arguments)
    rows = read_csv(tmp_path / "rounds.csv")
    assert len(rows) == 4 * 3  # methods, rounds and the dense network
    remaining = {row["method"]: float(row["remaining"]) for row in rows if row["round"] == "2"}
    assert set(remaining) == {"SAP, neuron", "SAP, global", "one-shot", "lottery ticket"}
    assert remaining["lottery ticket"] == pytest.approx(0.64, abs=1e-3)
    assert all(0 < fraction < 0.9 for fraction in remaining.values())
    for picture in ("accuracy.png", "pq_index.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "accuracy at equal remaining weights" in output


def test_remove_dead_channels(call_main):
    pytest.importorskip("torch_pruning")
    from studies import remove_dead_channels

    output = call_main(remove_dead_channels, "--epochs", 1, "--sparsity", 0.5)
    masked, smaller, difference = output.strip().splitlines()[-3:]
    weights = [int(line.split()[1].replace(",", "")) for line in (masked, smaller)]
    # Half of the channels between two convolutions of 32 x 64 x 9 weights, in each of 3 blocks.
    assert weights[0] - weights[1] == 3 * (2 * 32 * 32 * 9 + 2 * 32)
    assert masked.split("accuracy")[1] == smaller.split("accuracy")[1]
    assert float(difference.split(":")[1]) < 1e-4
