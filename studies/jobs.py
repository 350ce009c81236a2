"""The trainings of a grid."""

import argparse
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch

from studies.command_line import budget_of
from studies.methods.base import Budget
from studies.provenance import checkout_commit
from studies.settings import STUDIES, Setting
from studies.training import Recipe
from studies.workloads import WORKLOADS


class Job(NamedTuple):
    """One training of the grid."""

    network: str
    setting: Setting
    pattern: str
    sparsity: float
    seed: int
    epochs: int
    device: str
    commit: str = "unknown"  # of the code
    has_data: bool = True  # or the samples that need no download
    pretraining_epochs: int = 0  # of the training that the network starts from
    trained: Path | None = None  # where its weights are

    @property
    def key(self) -> tuple[str, ...]:
        """The cells of the CSV file that identify the training."""
        network = self.network if self.has_data else f"{self.network} on samples"
        before = f"{self.pretraining_epochs}+" if self.pretraining_epochs else ""
        return (
            network,
            self.setting.name,
            self.pattern,
            f"{self.sparsity:g}",
            str(self.seed),
            f"{before}{self.epochs}",
            device_name(self.device),
        )

    @property
    def folder(self) -> str:
        """The name of the folder of its checkpoint."""
        return re.sub(r"[ :/]", "-", "_".join(self.key)).replace(",", "")

    @property
    def recipe(self) -> Recipe:
        recipe = WORKLOADS[self.network].recipe
        recipe = recipe if self.trained is None else recipe.finetuning()
        return recipe._replace(epochs=self.epochs)

    def budget(self) -> Budget:
        """Return what is pruned and when.

        Raises:
            ValueError: A number is out of range, or the network has nothing to prune so.
        """
        workload = WORKLOADS[self.network]
        times = (self.setting.warmup, self.setting.ramp)
        warmup, ramp = (None if time is None else time * self.epochs for time in times)
        return budget_of(
            self.sparsity,
            self.pattern,
            self.epochs,
            warmup,
            ramp,
            workload.exclude,
            workload.narrowed,
            finetuning=self.trained is not None,
        )


def device_name(device: str) -> str:
    """Return the name by which rows tell devices apart: cpu, or that of the GPU."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def make_jobs(arguments: argparse.Namespace) -> list[Job]:
    """Return all trainings of the grid, seed by seed. Dense ones serve all sparsities."""
    study = STUDIES[arguments.study]
    settings = [
        setting
        for setting in study.settings()
        if any(fnmatchcase(setting.name, glob) for glob in arguments.settings)
    ]
    if not settings:
        raise ValueError(
            f"settings match none of the study {arguments.study}: {arguments.settings}"
        )
    recipe = WORKLOADS[arguments.network].recipe
    before = 0
    if study.finetunes:
        before = arguments.pretraining_epochs or recipe.epochs
        recipe = recipe._replace(epochs=before).finetuning()
    epochs = arguments.epochs or recipe.epochs
    if study.prunes == "groups":
        columns = [(pattern, 0.0) for pattern in arguments.patterns]
    else:
        pattern = "channel" if study.prunes == "channels" else "unstructured"
        columns = [(pattern, sparsity) for sparsity in arguments.sparsities]
    jobs = []
    commit = checkout_commit()
    has_data = arguments.data_dir is not None
    for seed in range(arguments.seeds):
        for setting in settings:
            for pattern, sparsity in columns[:1] if setting.method == "dense" else columns:
                if setting.method == "dense":
                    pattern, sparsity = "unstructured", 0.0
                run = (setting, pattern, sparsity, seed, epochs, arguments.device, commit)
                jobs.append(Job(arguments.network, *run, has_data, before))
                jobs[-1].budget()  # raises before anything runs
    return jobs


def make_pretrainings(jobs: list[Job], out: Path) -> tuple[list[Job], list[Job]]:
    """Return the dense trainings that these jobs start from, and the jobs that start there."""
    dense = {
        job.seed: job._replace(
            setting=Setting("trained", "dense", {}),
            pattern="unstructured",
            sparsity=0.0,
            epochs=job.pretraining_epochs,
            pretraining_epochs=0,
        )
        for job in jobs
    }
    starts = {seed: out / "trained" / f"{job.folder}.pt" for seed, job in dense.items()}
    trainings = [job for seed, job in dense.items() if not starts[seed].exists()]
    return trainings, [job._replace(trained=starts[job.seed]) for job in jobs]
