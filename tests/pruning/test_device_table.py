"""The constants of all masks are in few tensors, which a step writes in few operations."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pdp_kernels import PDPConfig, PDPPruner
from pdp_kernels.pruning.masks import GroupMask, SelectedMask
from tests.support.models import small_model

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MIXED = PDPConfig(
    0.5,
    warmup=0,
    ramp=4,
    relative_tau=(1.0, 0.02),
    overrides={
        "1": {"pattern": "2:4"},
        "2": {"tau": 1e-3},
        "4": {"pattern": "channel", "sparsity": 0.5},
        "5": {"tau": 1e-2},
        "6": {"pattern": "1:4", "tau": 1e-2},
    },
)


def layers(count, dtypes=(torch.float32,)):
    dtype = itertools.cycle(dtypes)
    return nn.Sequential(*[nn.Linear(16, 16, dtype=next(dtype)) for _ in range(count)])


def tables_of(pruner):
    return pruner._weights._tables.tables


def masks_of(model):
    return [layer.pdp_masks["weight"] for layer in model]


def test_addresses_of_constants_are_divisible_by_16():
    model = layers(24, DTYPES)
    PDPPruner(model, MIXED).step(1.0)
    for mask in masks_of(model):
        constants = [mask.tau, mask.threshold] if isinstance(mask, SelectedMask) else [mask.tau]
        assert [constant.data_ptr() % 16 for constant in constants] == [0] * len(constants)


def test_masks_hold_slices_of_their_table():
    model = layers(24, DTYPES)
    pruner = PDPPruner(model, MIXED)
    pruner.step(1.0)
    tables = tables_of(pruner)
    assert sum(len(table.masks) for table in tables) == 24
    for table in tables:
        assert table.thresholds.stride(0) * table.thresholds.itemsize == 16
        assert table.taus.stride(0) * table.taus.itemsize == 16
        assert len(table.taus) == len(table.masks) == len(table.targets)
        for index, (mask, target) in enumerate(zip(table.masks, table.targets, strict=True)):
            assert mask is target.holders[0].layer.pdp_masks["weight"]
            assert torch.equal(mask.tau, table.taus[index])
            start, end = target.plan.temperatures
            assert mask.tau.item() == pytest.approx(start**0.75 * end**0.25)
            if index < len(table.thresholds):
                assert mask.threshold.data_ptr() == table.thresholds[index].data_ptr()
            else:
                assert not isinstance(mask, SelectedMask)
        kinds = [key for key, _ in itertools.groupby((type(m), m.relative) for m in table.masks)]
        assert len(kinds) == len(set(kinds))


class Operations(TorchDispatchMode):
    """The names of the operations that do work: no views, and no allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).partition(".")[2]
        if not name.startswith(("detach", "empty")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


FILL, SELECT = ["fill_.Scalar"], ["thresholds.default", "copy_.default"]
COUNT = ["mul.out", "add_.Tensor", "copy_.default"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, FILL + COUNT + SELECT),
        ({"1": {"relative_tau": 0.5}, "7": {"relative_tau": 0.5}}, 2 * FILL + COUNT + SELECT),
        ({"*": {"pattern": "2:4"}}, 3 * FILL),
        ({"*": {"pattern": "2:4", "gradient_tau": 0}}, 2 * FILL),
    ],
    ids=["one temperature", "two temperatures", "N:M", "N:M, Eq. 2 of the mask"],
)
def test_the_operations_of_a_step(overrides, expected):
    pruner = PDPPruner(layers(30), PDPConfig(0.5, warmup=0, ramp=4, overrides=overrides))
    pruner.step(1.0)
    with Operations() as operations:
        pruner.step(1.5)
    assert operations.names == expected


def test_a_state_holds_no_more_than_its_values():
    """A slice of a table would be saved with all of the table."""
    pruner = PDPPruner(layers(30), PDPConfig(0.5, warmup=0, ramp=4))
    pruner.step(1.0)
    for threshold in pruner.state_dict()["thresholds"].values():
        assert threshold.untyped_storage().nbytes() == threshold.itemsize


@pytest.mark.parametrize("pattern", ["unstructured", "channel", "2:4"])
def test_masks_of_a_model_that_moved_away_and_back_follow_the_schedule(pattern):
    """As a model does that goes to the CPU to be saved."""
    sparsity = None if pattern == "2:4" else 0.5
    models = small_model(), small_model()
    models[1].load_state_dict(models[0].state_dict())
    config = PDPConfig(sparsity, pattern=pattern, warmup=0, ramp=4)
    pruners = [PDPPruner(model, config) for model in models]
    for progress in (1.0, 4.0):
        models[1].double().float()
        for pruner in pruners:
            pruner.step(progress)
        for mode in (True, False):
            outputs = [model.train(mode)(torch.ones(16)) for model in models]
            assert torch.equal(*outputs)


@pytest.mark.parametrize("pattern", ["unstructured", "channel", "2:4"])
def test_a_training_follows_a_pruner_that_begins_in_inference_mode(pattern):
    sparsity = None if pattern == "2:4" else 0.5
    config = PDPConfig(sparsity, pattern=pattern, warmup=0, ramp=4)
    model = small_model()
    with torch.inference_mode():
        pruner = PDPPruner(model, config)
    model(torch.ones(16)).sum().backward()
    pruner.step(1.0)
    own = copy.deepcopy(pruner)
    with torch.inference_mode():
        own.step(2.0)
    own.model(torch.ones(16)).sum().backward()


def test_masks_of_groups_that_prune_as_many_hold_one_count():
    model = layers(24)
    pruner = PDPPruner(model, MIXED)
    pruner.step(0.0)
    counts = {
        n: [mask.pruned for mask in masks_of(model) if isinstance(mask, GroupMask) and mask.n == n]
        for n in (1, 2)
    }
    for n, prunable in ((1, 3), (2, 2)):
        for progress, fraction in ((0.0, 0.0), (4.0, 1.0)):
            pruner.step(progress)
            assert counts[n][0] == fraction * prunable
        assert all(count is counts[n][0] for count in counts[n])


@pytest.mark.parametrize("pattern", ["unstructured", "channel", "2:4"])
def test_a_step_between_forward_and_backward_is_an_error(pattern):
    """The backward computes the mask again, and would compute that of the next step."""
    model = layers(2)
    sparsity = {} if pattern == "2:4" else {"sparsity": 0.5}
    pruner = PDPPruner(model, PDPConfig(**sparsity, pattern=pattern, warmup=0, ramp=4))
    pruner.step(1.0)
    loss = model(torch.randn(3, 16)).sum()
    pruner.step(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
