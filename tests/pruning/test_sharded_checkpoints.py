"""Checkpoints of sharded models resume on other numbers of ranks; a broken one does not count."""

import os

import torch
from torch import nn

from pdp_kernels import PDPPruner
from tests.support.ranks import (
    DIED,
    results_on_mortal_ranks,
    results_on_ranks,
)
from tests.support.sharded import assert_same_bits
from tests.support.sharded_training import (
    STEPS,
    batches,
    config,
    fully_sharded,
    mesh_of,
    network,
    outcome,
    sgd,
    train,
)


def save(rank, folder):
    import torch.distributed.checkpoint as dcp

    model = fully_sharded(network(), mesh_of(rank, (4,)))
    pruner, optimizer, data = PDPPruner(model, config()), sgd(model), batches()
    train(model, pruner, optimizer, data, (rank, 4), range(6))
    dcp.save({"model": model.state_dict(), "pruner": pruner}, checkpoint_id=f"{folder}/checkpoint")
    return pruner.state_dict()


def resume(rank, folder):
    import torch.distributed.checkpoint as dcp

    model = fully_sharded(network(), mesh_of(rank, (2,)))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    pruner = PDPPruner(model, config())
    weights = model.state_dict()
    dcp.load({"model": weights, "pruner": pruner}, checkpoint_id=f"{folder}/checkpoint")
    model.load_state_dict(weights)
    resumed = pruner.state_dict()
    data = batches()
    thresholds = train(model, pruner, sgd(model), data, (rank, 2), range(6, STEPS))
    return resumed, outcome(model, pruner, thresholds, data)


def test_a_checkpoint_of_four_ranks_resumes_on_two(tmp_path):
    states = results_on_ranks(save, 4, tmp_path)
    results = results_on_ranks(resume, 2, tmp_path)
    for state in states:
        for resumed, _ in results:
            assert str(resumed) == str(state)  # bit for bit, but for digits that are not printed
            for name, t in state["thresholds"].items():
                assert_same_bits(resumed["thresholds"][name], t, name)
    # The optimizer began anew, so that the comparison is a training that does so too.
    model = network()
    pruner, data = PDPPruner(model, config()), batches()
    train(model, pruner, sgd(model), data, steps=range(6))
    thresholds = train(model, pruner, sgd(model), data, steps=range(6, STEPS))
    expected = outcome(model, pruner, thresholds, data)
    for name in ("thresholds", "weights"):
        torch.testing.assert_close(results[0][1][name], expected[name], rtol=1e-4, atol=1e-6)


def die_while_saving(rank, folder):
    import torch.distributed.checkpoint as dcp

    model = fully_sharded(network(), mesh_of(rank, (2,)))
    pruner = PDPPruner(model, config())
    state = {"model": model.state_dict(), "pruner": pruner}
    dcp.save(state, checkpoint_id=f"{folder}/first")
    if rank == 1:
        os._exit(1)
    try:
        dcp.save(state, checkpoint_id=f"{folder}/second")
    except Exception as error:
        return type(error).__name__
    raise AssertionError("the checkpoint was saved without the other rank")


def test_a_checkpoint_that_breaks_off_does_not_count(tmp_path):
    survivor, lost = results_on_mortal_ranks(die_while_saving, 2, tmp_path)
    assert lost is DIED
    assert isinstance(survivor, str)
    assert (tmp_path / "first" / ".metadata").exists()
    assert not (tmp_path / "second" / ".metadata").exists()
