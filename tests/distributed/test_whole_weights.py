"""What needs whole weights says so where they are sharded."""

import pytest
import torch
from torch import nn

from pdp_kernels import (
    PDPConfig,
    PDPPruner,
    channel_report,
    check_nm,
    global_prune_counts,
    prune_one_shot,
    to_semi_structured,
)
from tests.support.ranks import results_on_ranks
from tests.support.sharded_training import fully_sharded, mesh_of

LAMP = PDPConfig(0.5, allocation="lamp", warmup=1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def refuse(rank):
    model = fully_sharded(network(), mesh_of(rank, (2,)))
    plain = r"0\.weight must be a plain tensor, got a DTensor"
    with pytest.raises(TypeError, match=plain):
        check_nm(model)
    with pytest.raises(TypeError, match=plain):
        channel_report(model)
    with pytest.raises(ValueError, match=r"0\.weight: is a DTensor: gather"):
        to_semi_structured(model)
    for make in (PDPPruner, prune_one_shot):  # before the training, not at the end of its warm-up
        with pytest.raises(ValueError, match=r"lamp.* a weight of shape .* that is sharded"):
            make(model, LAMP)
    assert type(model[0]).__name__ == "FSDPLinear"
    channels = PDPConfig(0.5, allocation="lamp", warmup=0, pattern="channel")
    return PDPPruner(model, channels).prune_counts


def test_functions_of_whole_weights_refuse_sharded_ones():
    """LAMP of channels compares norms, which every rank has."""
    expected = PDPPruner(
        network(), PDPConfig(0.5, allocation="lamp", warmup=0, pattern="channel")
    ).prune_counts
    assert results_on_ranks(refuse, 2) == [expected] * 2


def allocate_by_lamp(rank):
    model = fully_sharded(network(), mesh_of(rank, (1,)))
    return global_prune_counts([model[0].weight, model[2].weight], 0.5, allocation="lamp")


def test_lamp_takes_weights_that_a_mesh_of_one_rank_shards():
    weights = [layer.weight for layer in network()[::2]]
    expected = global_prune_counts(weights, 0.5, allocation="lamp")
    assert results_on_ranks(allocate_by_lamp, 1) == [expected]
