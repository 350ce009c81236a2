"""A pruner warns of a progress that counts optimizer steps, and of none that only looks so."""

import warnings

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner

COUNTS_STEPS = r"the ramp took 8 of the 1000 optimizer steps so far.*pass step / steps_per_epoch"
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters),
    "adamw, one by one": lambda parameters: torch.optim.AdamW(parameters, foreach=False),
    "muon": lambda parameters: torch.optim.Muon(parameters),
}
FOR_20_EPOCHS = PDPConfig.for_epochs(0.5, epochs=20)


def new_pruner(config=FOR_20_EPOCHS):
    return PDPPruner(nn.Linear(4, 2, bias=False), config)


@torch.no_grad()
def train(pruner, progresses, updates=1):
    """Update the weights so often before each step of the pruner, and return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for progress in progresses:
            for _ in range(updates):
                pruner.model.weight.mul_(0.9999)
            pruner.step(progress)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("first", [0, 1])
def test_a_step_count_as_progress_is_told_once(first):
    pruner = new_pruner()
    assert train(pruner, range(first, 1000)) == []
    with torch.no_grad():
        pruner.model.weight.mul_(0.9999)
    with pytest.warns(UserWarning, match=COUNTS_STEPS) as told:
        pruner.step(1000)
    assert told[0].filename == __file__
    assert train(pruner, range(1001, 2100)) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_an_optimizer_is_one_update(name):
    pruner = new_pruner()
    assert train(pruner, range(1, 998)) == []
    optimizer = OPTIMIZERS[name](pruner.model.parameters())
    pruner.attach(optimizer, steps_per_epoch=1)
    with pytest.warns(UserWarning, match=COUNTS_STEPS):
        for _ in range(3):
            pruner.model(torch.ones(1, 4)).sum().backward()
            optimizer.step()


def test_a_step_that_a_scaler_skips_delays_the_warning():
    pruner = new_pruner()
    assert train(pruner, [1, 2]) == [] and train(pruner, [3], updates=0) == []
    assert len(train(pruner, range(4, 1100))) == 1


WHOLE = range(1, 1200)
SILENT = {
    "fractions of epochs": (PDPConfig.for_epochs(0.5, 15), [step / 80 for step in WHOLE], 1),
    "one step for each epoch of several batches": (FOR_20_EPOCHS, WHOLE, 3),
    "full batches, as many as the schedule asks": (PDPConfig.for_epochs(0.5, 1200), WHOLE, 1),
    "a schedule in steps": (PDPConfig(0.5, warmup=100, ramp=400), WHOLE, 1),
    "pruning at once, on purpose": (PDPConfig(0.5, warmup=10, ramp=0), WHOLE, 1),
    "a short training of full batches": (PDPConfig(0.5, warmup=0, ramp=4), range(1, 300), 1),
    "no training": (FOR_20_EPOCHS, WHOLE, 0),
}


@pytest.mark.parametrize("case", SILENT)
def test_other_trainings_are_not_disturbed(case):
    config, progresses, updates = SILENT[case]
    assert train(new_pruner(config), progresses, updates) == []
