"""A pruner resumes from its state bit for bit, and refuses the state of another."""

import copy
from itertools import permutations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from pdp_kernels import PDPConfig, PDPPruner
from tests.support.models import mlp, train

CONFIGS = {
    "global": PDPConfig(0.9, warmup=2, ramp=4),
    "reallocated": PDPConfig(0.9, warmup=2, ramp=3, reallocate=0.5),
    "paper": PDPConfig.paper(0.9, warmup=2, epsilon=0.3, tau=1e-2),
    "channel": PDPConfig(0.5, pattern="channel", warmup=2, ramp=4, anneal=6),
    "2:4": PDPConfig(pattern="2:4", warmup=2, ramp=4),
}


@pytest.mark.parametrize("stop", [1, 2, 5, 12])
@pytest.mark.parametrize("name", CONFIGS)
def test_resuming_equals_the_uninterrupted_run_bitwise(name, stop, tmp_path):
    progresses = [step / 3 for step in range(1, 19)]

    def start():
        torch.manual_seed(0)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, PDPPruner(model, CONFIGS[name])

    def go(run, part):
        model, optimizer, pruner = run
        for progress in part:
            train(model, pruner, [progress], optimizer, seed=round(progress * 3))

    whole = start()
    go(whole, progresses)
    first = start()
    go(first, progresses[:stop])
    torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
    second = start()
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for part, state in reversed(list(zip(second, states, strict=True))):  # in any order
        part.load_state_dict(state)
    go(second, progresses[stop:])
    for run in (whole, second):
        run[2].finalize()
    for own, other in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(own, other)


def test_a_state_of_another_pruner_is_refused_and_changes_nothing():
    pruner = PDPPruner(mlp(), PDPConfig(0.9, warmup=0, ramp=1))
    pruner.step(0.5)
    before = copy.deepcopy(pruner.state_dict())
    other_config = PDPPruner(mlp(), PDPConfig(0.8, warmup=0, ramp=1)).state_dict()
    other_model = PDPPruner(mlp()[:3], PDPConfig(0.9, warmup=0, ramp=1)).state_dict()
    for state, error, message in (
        ([], TypeError, "state_dict must be a mapping, got list"),
        ({}, ValueError, "state_dict must have keys"),
        (other_config, ValueError, "configuration with sparsity = 0.9, got 0.8"),
        (other_model, ValueError, "must have the weights"),
        (before | {"thresholds": {}}, ValueError, "must have thresholds of"),
    ):
        with pytest.raises(error, match=message):
            pruner.load_state_dict(state)
    after = pruner.state_dict()
    assert torch.equal(after.pop("prune_counts"), before.pop("prune_counts"))
    assert after == before


MAPPINGS = {
    "overrides": [{}, {"0": {"sparsity": 0.5}}, {"0": {"sparsity": 0.5}, "2": {"tau": 1e-3}}],
    "sparsity": [0.9, {"*": 0.9}, {"0": 0.5, "*": 0.9}],
}


@pytest.mark.parametrize(
    ("field", "saved", "own"),
    [(field, *pair) for field, values in MAPPINGS.items() for pair in permutations(values, 2)],
)
def test_a_distributed_checkpoint_of_another_configuration_is_refused(field, saved, own, tmp_path):
    """Where it has entries that this one does not have, too."""
    settings = {"sparsity": 0.9, "scope": "layer", "warmup": 0, "ramp": 1}
    pruners = [PDPPruner(mlp(), PDPConfig(**settings | {field: each})) for each in (saved, own)]
    dcp.save({"pruner": pruners[0]}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match=f"state_dict must be of a configuration with {field} = "):
        dcp.load({"pruner": pruners[1]}, checkpoint_id=tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_distributed_checkpoint_can_be_converted_to_a_file(name, tmp_path):
    pruner = PDPPruner(mlp(), CONFIGS[name])
    pruner.step(3.0)
    dcp.save({"pruner": pruner}, checkpoint_id=tmp_path)
    dcp_to_torch_save(tmp_path, tmp_path / "converted.pt")
    other = PDPPruner(mlp(), CONFIGS[name])
    other.load_state_dict(torch.load(tmp_path / "converted.pt", weights_only=True)["pruner"])
    assert str(other.state_dict()) == str(pruner.state_dict())


WRONG_VALUES = {
    "config": [None, [1]],
    "progress": ["a", -1.0, float("nan")],
    "prune_counts": [
        [1, 2, 3],
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([1, 2]),
        torch.tensor([[1, 2, 3]]),
        torch.tensor([[-1, -1, -1]]),
        torch.tensor([100_000, 2, 3]),
        torch.tensor([-7, 2, 3]),
        torch.tensor([-1, 2, 3]),
    ],
    "thresholds": [
        None,
        dict.fromkeys(["0.weight", "2.weight", "4.weight"], 0.1),
        dict.fromkeys(["0.weight", "2.weight", "4.weight"], torch.ones(1)),
    ],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG_VALUES.items() for value in values]
)
def test_a_state_with_values_that_no_pruner_has_is_refused_and_changes_nothing(key, value):
    model = mlp()
    pruner = PDPPruner(model, CONFIGS["global"])
    train(model, pruner, [1.0, 3.0])
    before = copy.deepcopy(pruner.state_dict())
    with pytest.raises((TypeError, ValueError), match=f"state_dict.*{key}"):
        pruner.load_state_dict({**before, key: value})
    after = pruner.state_dict()
    assert after["progress"] == before["progress"]
    for name in ("prune_counts", "thresholds"):
        assert str(after[name]) == str(before[name])


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_going_back_to_the_warm_up_takes_the_masks_off(name, again):
    model = mlp()
    pruner = PDPPruner(model, CONFIGS[name])
    state = copy.deepcopy(pruner.state_dict())
    train(model, pruner, [1.0, 2.0, 3.0, 6.0])
    if again:  # a copy's masks hold their own tensors until its first step
        pruner = copy.deepcopy(pruner)
        model = pruner.model
    pruner.load_state_dict(state)
    pruner.step(0.5)
    fresh = PDPPruner(copy.deepcopy(model), CONFIGS[name])
    fresh.step(0.5)
    inputs = torch.randn(4, 24)
    for is_training in (True, False):
        expected = fresh.model.train(is_training)(inputs)
        assert torch.equal(model.train(is_training)(inputs), expected)
    assert pruner.report().pruned == 0
    pruner.step(6.0)  # and the ramp comes again
    assert pruner.report().pruned > 0


def test_finalize_leaves_the_progress():
    model = mlp()
    pruner = PDPPruner(model, PDPConfig.for_epochs(0.9, 20))
    pruner.step(20.0)
    pruner.finalize()
    assert pruner.progress == pruner.report().progress == 20.0


def test_a_state_of_weights_that_are_not_numbers_is_taken_up():
    model = mlp()
    pruner = PDPPruner(model, CONFIGS["global"])
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    pruner.step(3.0)
    state = copy.deepcopy(pruner.state_dict())
    assert state["thresholds"]["0.weight"].isnan()
    again = PDPPruner(model, CONFIGS["global"])
    again.load_state_dict(state)
    assert again.prune_counts == pruner.prune_counts
