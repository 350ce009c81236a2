"""In data-parallel training every rank prunes the weights that one process prunes."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from pdp_kernels import PDPConfig, PDPPruner, SAPPruner
from tests.support.ranks import results_on_ranks
from tests.support.sharded_training import mesh_of, tensor_parallel

STEPS = 9
RANKS = 2


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 8)).double()


def train(model, module, inputs, targets):
    """Train, and return the weights and the thresholds after each step."""
    pruner = PDPPruner(module, PDPConfig(0.8, warmup=1, ramp=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    thresholds = []
    for step in range(STEPS):
        nn.functional.mse_loss(model(inputs[step]), targets[step]).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step((step + 1) / 3)
        thresholds.append(list(pruner.state_dict()["thresholds"].values()))
    pruner.finalize()
    return [parameter.detach() for parameter in module.parameters()], thresholds


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(STEPS, 16, size, generator=generator, dtype=torch.float64) for size in (24, 8)
    ]


def train_on_rank(rank):
    module = network()
    model = nn.parallel.DistributedDataParallel(module)
    return train(model, module, *(batch.chunk(RANKS, dim=1)[rank] for batch in batches()))


def test_two_ranks_prune_as_one_process_does():
    (weights, thresholds), (others, other_thresholds) = results_on_ranks(train_on_rank, RANKS)
    assert thresholds == other_thresholds
    assert all(torch.equal(own, other) for own, other in zip(weights, others, strict=True))
    module = network()
    alone, alone_thresholds = train(module, module, *batches())
    for own, other in zip(weights, alone, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-14)
        assert torch.equal(own == 0, other == 0)
    torch.testing.assert_close(thresholds, alone_thresholds, rtol=1e-12, atol=0)
    assert all(threshold > 0 for threshold in thresholds[-1])


def begin_with_other_weights(rank):
    torch.manual_seed(rank)
    module = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 8)).double()
    model = nn.parallel.DistributedDataParallel(module)
    sap = SAPPruner(module)
    inputs, targets = (batch.chunk(RANKS, dim=1)[rank] for batch in batches())
    for step in range(3):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        nn.functional.mse_loss(model(inputs[step]), targets[step]).backward()
        optimizer.step()
        optimizer.zero_grad()
        sap.step()
    rewound = [parameter.detach().clone() for parameter in module.parameters()]
    pruner = PDPPruner(module, PDPConfig(0.8, warmup=0, ramp=0))
    counts = pruner.prune_counts
    pruner.verify_replicas()
    return sap.history, rewound, counts


def test_ranks_that_begin_with_other_weights_prune_alike_after_ddp():
    own, other = results_on_ranks(begin_with_other_weights, RANKS)
    assert own[0] == other[0]
    assert all(torch.equal(*pair) for pair in zip(own[1], other[1], strict=True))
    assert own[2] == other[2]


def begin_without_ddp(rank):
    torch.manual_seed(rank)
    module = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 8))
    pruner = PDPPruner(module, PDPConfig(0.8, warmup=0, ramp=0))
    nn.parallel.DistributedDataParallel(module)
    with pytest.raises(RuntimeError) as caught:
        pruner.verify_replicas()
    return str(caught.value)


def test_budgets_of_other_weights_are_noticed_before_anything_is_pruned():
    for message in results_on_ranks(begin_without_ddp, RANKS):
        for name in ("0.weight", "2.weight"):
            assert f"the prune count of {name} differs on ranks [0] and [1]" in message


def flatten(module, use_orig_params):
    return FullyShardedDataParallel(
        module, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )


def prune_flattened(rank, use_orig_params):
    refused = pytest.raises((ValueError, RuntimeError), match="fully_shard")
    module = network()
    PDPPruner(module, PDPConfig(0.8))
    with refused:
        flatten(module, use_orig_params)
    module = network()
    model = flatten(module, use_orig_params)
    with refused:
        PDPPruner(module, PDPConfig(0.8))
        model(batches()[0][0])  # on one rank a weight has its shape until the forward


@pytest.mark.parametrize("ranks", [1, RANKS])
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_weights_that_the_older_fsdp_flattens_are_refused(use_orig_params, ranks):
    results_on_ranks(prune_flattened, ranks, use_orig_params)


def replicate_a_tensor_parallel_model(rank):
    mesh = mesh_of(rank, (1, RANKS), ("data", "tensor"))
    module = tensor_parallel(nn.Sequential(*network(), nn.Linear(8, 8)), mesh["tensor"])
    model = nn.parallel.DistributedDataParallel(module, device_mesh=mesh["data"])
    PDPPruner(module, PDPConfig(0.8))
    with pytest.raises(RuntimeError, match="DDP over tensor parallelism"):
        model(torch.randn(4, 24))


def test_ddp_over_tensor_parallelism_is_refused():
    """It makes plain tensors of the shards, and DTensors of them during each forward."""
    results_on_ranks(replicate_a_tensor_parallel_model, RANKS)
