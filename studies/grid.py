"""Run a grid of trainings on worker processes, and make its table and plot.

    python -m studies.grid methods --network mlp --data-dir DIR --workers 2 --out OUT
    python -m studies.grid finetune --network gpt-tiny --data-dir DIR --workers 2 --out OUT
    python -m studies.grid schedules --network gpt-tiny --data-dir DIR --workers 2 --out OUT
    python -m studies.grid finetune-schedules --network mlp --data-dir DIR --workers 2 --out OUT
    python -m studies.grid nm --data-dir DIR --workers 2 --out OUT
    python -m studies.grid finetune-nm --data-dir DIR --workers 2 --out OUT
    python -m studies.grid channels --network resnet20 --data-dir DIR --workers 2 --out OUT
    python -m studies.grid tau --data-dir DIR --workers 2 --out OUT
    python -m studies.grid allocation --network mlp-small-head --data-dir DIR --out OUT

methods: every method at every sparsity. nm: methods for N:M patterns. nm-settings: schedules and
gradients of PDP for them. channels: methods that prune channels. tau: PDP's temperatures and ramps.
schedules: warm-ups and ramps. allocation: how PDP's layers share the budget. finetune, finetune-nm,
finetune-channels and finetune-allocation: the same from a trained dense network, in a fifth of its
epochs. finetune-schedules: warm-ups, ramps and temperatures for that.

Each run adds a row to OUT/<study>.csv. Rows that exist are not run again, and a run that was
stopped goes on after its last epoch: the same command continues where it was stopped. All rows
of the device together make OUT/<study>.md and OUT/<study>.png.

A GPU serves many workers at once, and small networks need that: the host launches their kernels
more slowly than the GPU runs them. See gpu.sh.
"""

import argparse
import csv
import math
import multiprocessing
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from torch import nn

from studies.jobs import Job, make_jobs, make_pretrainings
from studies.methods import make_method
from studies.provenance import shown_command
from studies.settings import STUDIES
from studies.tables import Row, plot_by_setting, plot_by_sparsity, read_rows, write_table
from studies.training import Outcome, Task, train
from studies.workloads import WORKLOADS

Result = TypeVar("Result")
SCRATCH = "running"  # the folder of checkpoints in OUT
REPORT_INTERVAL = 10.0  # seconds between lines that tell the progress

_task: Task | None = None  # of this worker process
_epochs: Synchronized | None = None  # done by all worker processes


def start_worker(network: str, folder: Path | None, device: str, epochs: Synchronized) -> None:
    """Prepare a worker process: one thread, subnormals flushed to zero, the data loaded."""
    global _task, _epochs
    _epochs = epochs
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(1)
    # Products of small weights and small soft masks are subnormal: with tau = 1e-4 an epoch of the
    # MLP took 44 s instead of 1.5 s.
    torch.set_flush_denormal(True)
    workload = WORKLOADS[network]
    _task = workload.make_task(folder, workload.recipe, device)


def run_job(job: Job, out: Path) -> Row:
    """Train in a worker process."""
    outcome, _ = train_job(job, out)
    scores = outcome.score, outcome.soft_score, outcome.own_sparsity
    return Row(*job.key, *scores, round(outcome.seconds, 1), job.commit)


def pretrain(job: Job, out: Path) -> None:
    """Train a dense network in a worker process, and write its weights."""
    _, model = train_job(job, out)
    path = out / "trained" / f"{job.folder}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def train_job(job: Job, out: Path) -> tuple[Outcome, nn.Module]:
    """Train, from the checkpoint of an earlier call if there is one."""
    torch.manual_seed(job.seed)
    model = WORKLOADS[job.network].make_network(_task)
    if job.trained is not None:
        model.load_state_dict(torch.load(job.trained, map_location="cpu", weights_only=True))
    options = dict(job.setting.options)
    if job.trained is not None and job.setting.method == "pdp":
        options["finetuning"] = True
    method = make_method(job.setting.method, model, job.budget(), **options)
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
        after_epoch=count_epoch,
    )
    return outcome, model


def count_epoch() -> None:
    with _epochs.get_lock():
        _epochs.value += 1


class TimeLimitError(Exception):
    """The time limit has passed."""


class Progress:
    """Runs jobs, and prints on stderr what is done and how long the rest will take.

    Args:
        jobs: All jobs that will run.
        workers: The number of jobs that run at once.
        epochs: The number of epochs that the worker processes have done.
        time_limit: Seconds until no more results are awaited.
    """

    def __init__(self, jobs: list[Job], workers: int, epochs: Synchronized, time_limit: float):
        self.workers = workers
        self.epochs = epochs
        self.total = sum(job.epochs for job in jobs)
        self.runs, self.done = len(jobs), 0
        self.failed: list[Job] = []
        self.began = self.shown = time.monotonic()
        self.end = self.began + time_limit

    def results(
        self,
        pool: ProcessPoolExecutor,
        call: Callable[[Job, Path], Result],
        jobs: list[Job],
        out: Path,
    ) -> Iterator[Result]:
        """Call it for each job, and yield each result when it is there.

        A job that fails costs the others nothing: it is printed, and remembered.

        Raises:
            TimeLimitError: Time has passed, and jobs are left.
        """
        waiting = {pool.submit(call, job, out): job for job in jobs}
        while waiting:
            now = time.monotonic()
            if now >= self.end:
                raise TimeLimitError
            timeout = min(self.shown + REPORT_INTERVAL, self.end) - now
            finished, _ = wait(waiting, max(0.0, timeout), FIRST_COMPLETED)
            for future in finished:
                job = waiting.pop(future)
                self.done += 1
                if (error := future.exception()) is not None:
                    traceback.print_exception(error)
                    self.failed.append(job)
                    continue
                yield future.result()
                shutil.rmtree(out / SCRATCH / job.folder)
            if time.monotonic() >= self.shown + REPORT_INTERVAL:
                self.show()

    def show(self, note: str = "") -> None:
        """Print a line."""
        self.shown = time.monotonic()
        seconds, epochs = self.shown - self.began, self.epochs.value
        waiting = max(0, self.runs - self.done - self.workers)
        left = f"{seconds * (self.total / epochs - 1):.0f} s left" if epochs else "starting"
        print(
            f"{seconds:.0f} s: {self.done} of {self.runs} runs, {waiting} waiting, "
            f"{epochs} of {self.total} epochs, {left}{note}",
            file=sys.stderr,
            flush=True,
        )


def run_jobs(jobs: list[Job], path: Path, arguments: argparse.Namespace) -> list[Job]:
    """Run the jobs, and append the row of each to the file as soon as it is done.

    Returns:
        The jobs that failed.
    """
    if not jobs:
        return []
    out, device = arguments.out, arguments.device
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(",".join(Row._fields) + "\n")
    pretrainings: list[Job] = []
    if STUDIES[arguments.study].finetunes:
        pretrainings, jobs = make_pretrainings(jobs, out)
    context = multiprocessing.get_context("spawn")
    epochs = context.Value("q", 0)
    progress = Progress([*pretrainings, *jobs], arguments.workers, epochs, arguments.time_limit)
    with TemporaryDirectory() as temporary:
        folder = WORKLOADS[arguments.network].prepare(
            arguments.data_dir, arguments.prepared or Path(temporary)
        )
        with (
            ProcessPoolExecutor(
                arguments.workers,
                context,
                start_worker,
                (arguments.network, folder, device, epochs),
            ) as pool,
            open(path, "a", newline="") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            try:
                for _ in progress.results(pool, pretrain, pretrainings, out):
                    pass
                for row in progress.results(pool, run_job, jobs, out):
                    writer.writerow(row)
                    file.flush()
                    progress.show(
                        f"; {row.setting}, {row.column}, seed {row.seed}: {row.score:.4f}"
                    )
            except TimeLimitError:
                # In this order: a killed worker may hold the lock of the count that is shown.
                progress.show("; stopped by the time limit: the same command continues")
                for worker in multiprocessing.active_children():
                    worker.kill()
    return progress.failed


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
    add("--redraw", action="store_true", help="make table and plot of the rows so far; train none")
    add("--pretraining-epochs", type=int, help="of the networks that finetune starts from")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--time-limit",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="stop all runs after this time, and make the table of those that are done",
    )
    add(
        "--prepared",
        type=Path,
        help="folder for the images in the form that workers load, 740 MB of CIFAR-10; grids may "
        "share it (default: a temporary one)",
    )
    arguments = parser.parse_args()
    for name in ("seeds", "workers"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(arguments, name)}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    path = arguments.out / f"{arguments.study}.csv"
    jobs = make_jobs(arguments)
    present = {row.key for row in read_rows(path)}
    missing = [] if arguments.redraw else [job for job in jobs if job.key not in present]
    failed = run_jobs(missing, path, arguments)
    # Rows of other devices are left out: their random numbers and rounding differ.
    order = {job.key: number for number, job in enumerate(jobs)}
    rows = sorted((row for row in read_rows(path) if row.key in order), key=lambda r: order[r.key])
    if not rows:
        sys.exit("no run is done")
    study = STUDIES[arguments.study]
    write_table(rows, path.with_suffix(".md"), shown_command("studies.grid"), study.reference)
    plot = plot_by_sparsity if study.by_sparsity else plot_by_setting
    plot(rows, path.with_suffix(".png"))
    print(path.with_suffix(".md").read_text(), end="")
    if failed:
        sys.exit("failed: " + ", ".join(job.folder for job in failed))


if __name__ == "__main__":
    main()
