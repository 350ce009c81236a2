"""Run a grid of trainings on worker processes, and make its table and plot.

    python -m studies.grid methods --network mlp --data-dir DIR --workers 2 --out OUT
    python -m studies.grid finetune --network gpt-tiny --data-dir DIR --workers 2 --out OUT
    python -m studies.grid nm --data-dir DIR --workers 2 --out OUT
    python -m studies.grid channels --network resnet20 --data-dir DIR --workers 2 --out OUT
    python -m studies.grid tau --data-dir DIR --workers 2 --out OUT
    python -m studies.grid allocation --network mlp-small-head --data-dir DIR --out OUT

methods: every method at every sparsity. finetune: the same, from a trained dense network, in a
fifth of its epochs. nm: methods for N:M patterns. channels: methods that prune channels. tau: PDP's
temperatures and ramps. allocation: how PDP's layers share the budget.

Each run adds a row to OUT/<study>.csv. Rows that exist are not run again, and a run that was
stopped goes on after its last epoch: the same command continues where it was stopped. All rows
together make OUT/<study>.md and OUT/<study>.png.
"""

import argparse
import csv
import multiprocessing
import shlex
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from studies.command_line import budget_of
from studies.methods import CHANNEL_METHODS, NM_METHODS, UNSTRUCTURED_METHODS, make_method
from studies.tables import Row, plot_by_setting, plot_by_sparsity, read_rows, write_table
from studies.training import Outcome, Recipe, Task, train
from studies.workloads import WORKLOADS


class Setting(NamedTuple):
    """A method with its settings: a line of the table."""

    name: str
    method: str
    options: dict[str, Any]


class Job(NamedTuple):
    """One training of the grid."""

    network: str
    setting: Setting
    pattern: str
    sparsity: float
    seed: int
    epochs: int
    trained: Path | None = None  # where the weights are that the network starts from

    @property
    def key(self) -> tuple[str, ...]:
        """The cells of the CSV file that identify the training."""
        name = self.setting.name
        return (
            self.network,
            name,
            self.pattern,
            f"{self.sparsity:g}",
            str(self.seed),
            str(self.epochs),
        )

    @property
    def folder(self) -> str:
        """The name of the folder of its checkpoint."""
        return "_".join(self.key).replace(" ", "-").replace(",", "").replace(":", "-")

    @property
    def recipe(self) -> Recipe:
        recipe = WORKLOADS[self.network].recipe
        recipe = recipe if self.trained is None else recipe.finetuning()
        return recipe._replace(epochs=self.epochs)


def method_settings() -> list[Setting]:
    """Return all methods for unstructured sparsity."""
    return [Setting(name, name, {}) for name in UNSTRUCTURED_METHODS]


def nm_settings() -> list[Setting]:
    """Return all methods for N:M patterns."""
    return [Setting(name, name, {}) for name in NM_METHODS]


def channel_settings() -> list[Setting]:
    """Return all methods that prune channels."""
    return [Setting(name, name, {}) for name in CHANNEL_METHODS]


def tau_settings() -> list[Setting]:
    """Return settings of PDP: temperatures, ramps, and the ends of annealing and allocation.

    The last one is the recommended setting. The others differ from it in what they name.
    """
    constant = {
        **{f"tau {tau}": {"tau": float(tau)} for tau in ("1e-5", "1e-4", "1e-3", "1e-2")},
        **{f"relative {tau}": {"relative_tau": tau} for tau in (0.1, 0.3, 1.0)},
    }
    once = {"reallocate": None}
    linear = {"ramp_shape": "linear"} | once
    settings = [
        Setting(f"{name}, linear, allocated once", "pdp", temperature | linear)
        for name, temperature in constant.items()
    ]
    others = {
        "tau 1e-4, linear, allocated once, thresholds by epoch": {"tau": 1e-4}
        | linear
        | {"update_interval": 1.0},
        "tau 1e-3": {"tau": 1e-3},
        "tau 1e-2 to 1e-4": {"tau": (1e-2, 1e-4)},
        "relative 0.3": {"relative_tau": 0.3},
        "relative 0.3 to 0.02": {"relative_tau": (0.3, 0.02)},
        "relative 1 to 0.05": {"relative_tau": (1.0, 0.05)},
        "relative 1 to 0.02, linear": {"ramp_shape": "linear"},
        "relative 1 to 0.02, annealed by the end of the ramp": {"anneal": None},
        "relative 1 to 0.02, allocated once": once,
        "relative 1 to 0.02": {},
    }
    return settings + [Setting(name, "pdp", options) for name, options in others.items()]


def allocation_settings() -> list[Setting]:
    """Return how the layers share a budget: by one threshold with or without a cap, or not."""
    settings = {
        "dense": ("dense", {}),
        "magnitude without a cap": ("pdp", {"max_layer_sparsity": 1.0}),
        "magnitude": ("pdp", {}),
        **{name: ("pdp", {"allocation": name}) for name in ("lamp", "erk", "uniform")},
    }
    return [Setting(name, *setting) for name, setting in settings.items()]


STUDIES = {
    "methods": method_settings,
    "finetune": method_settings,
    "nm": nm_settings,
    "channels": channel_settings,
    "tau": tau_settings,
    "allocation": allocation_settings,
}
SCRATCH = "running"  # the folder of checkpoints in OUT


def make_jobs(arguments: argparse.Namespace) -> list[Job]:
    """Return all trainings of the grid, seed by seed. Dense ones serve all sparsities."""
    settings = [
        setting
        for setting in STUDIES[arguments.study]()
        if any(fnmatchcase(setting.name, glob) for glob in arguments.settings)
    ]
    if not settings:
        raise ValueError(
            f"settings match none of the study {arguments.study}: {arguments.settings}"
        )
    workload = WORKLOADS[arguments.network]
    recipe = workload.recipe
    if arguments.study == "finetune":
        recipe = recipe.finetuning()
    epochs = arguments.epochs or recipe.epochs
    if arguments.study == "nm":
        columns = [(pattern, 0.0) for pattern in arguments.patterns]
    elif arguments.study == "channels":
        columns = [("channel", sparsity) for sparsity in arguments.sparsities]
    else:
        columns = [("unstructured", sparsity) for sparsity in arguments.sparsities]
    jobs = []
    for seed in range(arguments.seeds):
        for setting in settings:
            for pattern, sparsity in columns[:1] if setting.method == "dense" else columns:
                if setting.method == "dense":
                    pattern, sparsity = "unstructured", 0.0
                budget_of(sparsity, pattern, epochs, narrowed=workload.narrowed)
                jobs.append(Job(arguments.network, setting, pattern, sparsity, seed, epochs))
    return jobs


def make_pretrainings(jobs: list[Job], out: Path) -> tuple[list[Job], list[Job]]:
    """Return the dense trainings that these jobs start from, and the jobs that start there."""
    dense = {
        seed: Job(network, Setting("trained", "dense", {}), "unstructured", 0.0, seed, epochs)
        for network, seed, epochs in dict.fromkeys(
            (job.network, job.seed, WORKLOADS[job.network].recipe.epochs) for job in jobs
        )
    }
    starts = {seed: out / "trained" / f"{job.folder}.pt" for seed, job in dense.items()}
    trainings = [job for seed, job in dense.items() if not starts[seed].exists()]
    return trainings, [job._replace(trained=starts[job.seed]) for job in jobs]


_task: Task | None = None  # of this worker process


def start_worker(network: str, folder: Path | None, device: str) -> None:
    """Prepare a worker process: one thread, subnormals flushed to zero, the data loaded."""
    global _task
    torch.set_num_threads(1)
    # Products of small weights and small soft masks are subnormal: with tau = 1e-4 an epoch of the
    # MLP took 44 s instead of 1.5 s.
    torch.set_flush_denormal(True)
    workload = WORKLOADS[network]
    _task = workload.make_task(folder, workload.recipe, device)


def run_job(job: Job, out: Path) -> Row:
    """Train in a worker process."""
    outcome, _ = train_job(job, out)
    return Row(
        *job.key, outcome.score, outcome.soft_score, outcome.own_sparsity, round(outcome.seconds, 1)
    )


def pretrain(job: Job, out: Path) -> None:
    """Train a dense network in a worker process, and write its weights."""
    _, model = train_job(job, out)
    path = out / "trained" / f"{job.folder}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def train_job(job: Job, out: Path) -> tuple[Outcome, nn.Module]:
    """Train, from the checkpoint of an earlier call if there is one."""
    workload = WORKLOADS[job.network]
    budget = budget_of(
        job.sparsity,
        job.pattern,
        job.epochs,
        exclude=workload.exclude,
        narrowed=workload.narrowed,
    )
    torch.manual_seed(job.seed)
    model = workload.make_network(_task)
    if job.trained is not None:
        model.load_state_dict(torch.load(job.trained, weights_only=True))
    method = make_method(job.setting.method, model, budget, **job.setting.options)
    folder = out / SCRATCH / job.folder
    outcome = train(
        _task,
        model,
        method,
        job.recipe,
        job.seed,
        folder=folder,
        resume=True,
        keep_log=False,
        show_progress=False,
    )
    return outcome, model


def run_jobs(jobs: list[Job], path: Path, arguments: argparse.Namespace) -> None:
    """Run the jobs, and append the row of each to the file as soon as it is done."""
    if not jobs:
        return
    out = arguments.out
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(",".join(Row._fields) + "\n")
    pretrainings: list[Job] = []
    if arguments.study == "finetune":
        pretrainings, jobs = make_pretrainings(jobs, out)
    with (
        ProcessPoolExecutor(
            arguments.workers,
            multiprocessing.get_context("spawn"),
            start_worker,
            (arguments.network, arguments.data_dir, arguments.device),
        ) as pool,
        open(path, "a", newline="") as file,
        # The remaining time follows from the epochs of the trainings that are done.
        tqdm(total=sum(j.epochs for j in [*pretrainings, *jobs]), unit="epoch", smoothing=0) as bar,
    ):
        writer = csv.writer(file, lineterminator="\n")
        waiting = {pool.submit(pretrain, job, out): job for job in pretrainings}
        for done in as_completed(waiting):
            done.result()
            shutil.rmtree(out / SCRATCH / waiting[done].folder)
            bar.update(waiting[done].epochs)
        waiting = {pool.submit(run_job, job, out): job for job in jobs}
        for done in as_completed(waiting):
            row = done.result()
            writer.writerow(row)
            file.flush()
            shutil.rmtree(out / SCRATCH / waiting[done].folder)
            bar.update(waiting[done].epochs)
            bar.set_postfix_str(f"{row.setting}, {row.column}: {row.score:.4f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", choices=STUDIES)
    add("--network", choices=WORKLOADS, default="mlp")
    add("--data-dir", type=Path, help="as for studies.train_image")
    add("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98, 0.99])
    add("--patterns", nargs="+", default=["2:4", "1:4"], help="patterns of the study nm")
    add("--settings", nargs="+", default=["*"], help="globs of the rows of the table to run")
    add("--seeds", type=int, default=3)
    add("--epochs", type=int)
    add("--workers", type=int, default=1)
    add("--out", type=Path, default=Path("study"))
    add("--device", default="cpu")
    arguments = parser.parse_args()
    for name in ("seeds", "workers"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(arguments, name)}")
    return arguments


def shown_command() -> str:
    """Return the command line, with DIR for the folder of the data."""
    words = ["python", "-m", "studies.grid", *sys.argv[1:]]
    if "--data-dir" in words:
        words[words.index("--data-dir") + 1] = "DIR"
    return shlex.join(words)


def main() -> None:
    arguments = parse_arguments()
    path = arguments.out / f"{arguments.study}.csv"
    jobs = make_jobs(arguments)
    present = {row.key for row in read_rows(path)}
    run_jobs([job for job in jobs if job.key not in present], path, arguments)
    order = {job.key: number for number, job in enumerate(jobs)}
    rows = sorted((row for row in read_rows(path) if row.key in order), key=lambda r: order[r.key])
    write_table(rows, path.with_suffix(".md"), shown_command())
    by_sparsity = arguments.study in ("methods", "finetune", "allocation")
    plot = plot_by_sparsity if by_sparsity else plot_by_setting
    plot(rows, path.with_suffix(".png"))
    print(path.with_suffix(".md").read_text(), end="")


if __name__ == "__main__":
    main()
