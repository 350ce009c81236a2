"""Replicas that drift are named, and a lost rank is an error."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from pdp_kernels import PDPPruner
from tests.support.ranks import (
    BACKENDS,
    DIED,
    TIMEOUT,
    device_of,
    results_on_mortal_ranks,
    results_on_ranks,
)
from tests.support.sharded_training import (
    config,
    fully_sharded,
    mesh_of,
    network,
    sharded,
)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def drift(rank, how):
    model = network(device_of(rank))
    if how == "replicas of FSDP":
        model, _ = sharded(model, rank, 4, how)
    pruner = PDPPruner(model, config())
    pruner.step(1.0)
    pruner.verify_replicas()
    with torch.no_grad():
        if rank == 2:
            weight = model[2].weight
            (weight.to_local() if hasattr(weight, "to_local") else weight)[0, 0] += 0.5
    pruner.step(1.5)
    with pytest.raises(RuntimeError) as caught:
        pruner.verify_replicas()
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("data parallel", "2.weight is not the same on ranks [0, 1, 3] and [2]"),
        ("replicas of FSDP", "shard (0,) of 2.weight is not the same on ranks [0] and [2]"),
    ],
)
def test_a_replica_that_drifts_is_named(backend, how, expected):
    messages = results_on_ranks(drift, 4, how, backend=backend)
    assert len(set(messages)) == 1
    assert expected in messages[0]
    assert "0.weight" not in messages[0]


def test_one_process_has_no_replicas():
    PDPPruner(network(), config()).verify_replicas()


def lose_a_rank(rank, what):
    model = fully_sharded(network(), mesh_of(rank, (2,)))
    pruner = PDPPruner(model, config())
    pruner.step(1.0)
    if rank == 1 and what == "dies":
        os._exit(1)
    if rank == 1:
        time.sleep(TIMEOUT)  # until it is killed
    if what == "does not answer":
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    try:
        pruner.step(1.5)
    except RuntimeError as error:
        return type(error).__name__
    raise AssertionError("the step went on without the other rank")


@pytest.mark.parametrize("what", ["dies", "does not answer"])
def test_a_lost_rank_is_an_error_of_the_process_group(what):
    survivor, lost = results_on_mortal_ranks(lose_a_rank, 2, what, awaited=[0])
    assert lost is DIED
    assert survivor in ("RuntimeError", "DistBackendError", "DistNetworkError")
