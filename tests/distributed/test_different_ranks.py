"""Ranks outside the mesh of a weight may hold another weight, as in expert parallelism."""

import pytest
import torch
from torch import nn

from pdp_kernels import (
    PDPConfig,
    PDPPruner,
    channel_norms,
    global_prune_counts,
    hard_mask,
    hard_mask_channel,
    pdp_thresholds,
    pq_index,
)
from tests.support.ranks import BACKENDS, device_of, results_on_ranks
from tests.support.sharded import assert_same_bits, global_tensor

# Which mesh dimension chooses the expert: its ranks are 0 and 1, or 0 and 2, and so on.
EXPERT_DIMS = (0, 1)
MESH = (2, 2)


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


def expert_of(rank, expert_dim):
    return divmod(rank, MESH[1])[expert_dim]


def tensors(expert):
    """Return the weights of a rank: one that all share, one of its expert, and a plain one."""
    torch.manual_seed(0)
    shared, *experts, plain = torch.randn(4, 40, 8).unbind()
    return [shared, 100**expert * experts[expert], plain]


def distributed_tensors(rank, expert_dim, layout=(0, 0)):
    """Return them sharded: the expert on the other dimension of the mesh."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh(device_of(rank).type, MESH, mesh_dim_names=("a", "b"))
    shared, own, plain = (w.to(mesh.device_type) for w in tensors(expert_of(rank, expert_dim)))
    every = [Replicate() if dim is None else Shard(dim) for dim in layout]
    alone = mesh["ba"[expert_dim]]
    return [
        distribute_tensor(shared, mesh, every, src_data_rank=None),
        distribute_tensor(own, alone, [Shard(layout[0])], src_data_rank=None),
        plain,
    ]


def all_results(weights):
    return {
        "thresholds": [pdp_thresholds(weights, 0.5)],
        "hard masks": [global_tensor(hard_mask(weight, 0.5)) for weight in weights],
        "norms": [channel_norms(weight, 0) for weight in weights],
        "channel masks": [hard_mask_channel(weight, 0.5) for weight in weights],
        "PQ Index": [pq_index(weights), pq_index(weights, scope="global")],
        "PQ Index of rows": pq_index(weights, scope="neuron"),
        "counts of no values": [torch.tensor(global_prune_counts(weights, 0.5, allocation="erk"))],
    }


def results_of_rank(rank):
    return {
        (expert_dim, layout): {
            name: [global_tensor(value) for value in values]
            for name, values in all_results(distributed_tensors(rank, expert_dim, layout)).items()
        }
        for expert_dim in EXPERT_DIMS
        for layout in ((0, 0), (0, None))
    }


@pytest.fixture(scope="module")
def by_rank(backend):
    return results_on_ranks(results_of_rank, 4, backend=backend)


@pytest.mark.parametrize("name", all_results(tensors(0)))
def test_each_rank_finds_the_results_of_its_own_expert(by_rank, backend, name):
    device = "cuda" if backend == "nccl" else "cpu"
    for rank, results in enumerate(by_rank):
        for (expert_dim, layout), found in results.items():
            own = [weight.to(device) for weight in tensors(expert_of(rank, expert_dim))]
            expected = [global_tensor(value) for value in all_results(own)[name]]
            for values in zip(found[name], expected, strict=True):
                assert_same_bits(*values, (rank, expert_dim, layout))


def budgets_of_different_weights(rank):
    errors = []
    for expert_dim in EXPERT_DIMS:
        shared, own, plain = distributed_tensors(rank, expert_dim)
        differing = plain + (rank == 3)
        for weights in ([shared, own], [shared, plain, differing]):
            with pytest.raises(ValueError, match="must be the same on all ranks") as caught:
                global_prune_counts(weights, 0.5)
            errors.append(str(caught.value))
        # None of these ranks shares a weight with one that holds another expert.
        global_prune_counts([own, plain], 0.5)
    return errors


def test_a_budget_of_different_weights_is_an_error_on_every_rank(backend):
    for errors in results_on_ranks(budgets_of_different_weights, 4, backend=backend):
        assert "weights[1] of shape (40, 8)" in errors[0]
        assert "on the mesh of ranks [" in errors[0]
        assert "weights[2] of shape (40, 8)" in errors[1]
        assert "as a plain tensor" in errors[1]
        assert 'scope="layer"' in errors[1]


def test_one_budget_of_an_expert_and_what_it_shares_with_no_other_is_that_of_one_process(backend):
    for expert_dim in EXPERT_DIMS:
        found = results_on_ranks(budget_of_an_expert, 4, expert_dim, backend=backend)
        for rank, counts in enumerate(found):
            own = tensors(expert_of(rank, expert_dim))[1:]
            assert counts == global_prune_counts(own, 0.5)


def budget_of_an_expert(rank, expert_dim):
    return global_prune_counts(distributed_tensors(rank, expert_dim)[1:], 0.5)


class Network(nn.Module):
    def __init__(self, expert):
        super().__init__()
        torch.manual_seed(0)
        self.dense, self.head = nn.Linear(12, 16), nn.Linear(16, 4)
        self.expert = [nn.Linear(16, 16) for _ in range(2)][expert]
        with torch.no_grad():
            self.expert.weight.mul_(10.0**expert)

    def forward(self, x):
        return self.head(self.expert(self.dense(x).relu()).relu())


def experts_of_rank(rank, expert_dim):
    """Return the network of this rank under `fully_shard`, each expert on its own ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = device_of(rank).type
    mesh = init_device_mesh(device, MESH, mesh_dim_names=("a", "b"))
    model = Network(expert_of(rank, expert_dim)).to(device)
    fully_shard(model.expert, mesh=mesh["ba"[expert_dim]])
    return fully_shard(model, mesh=init_device_mesh(device, (4,)))


def config(**settings):
    return PDPConfig(warmup=0.25, ramp=0.5, tau=1e-3, **settings)


def pruned(model, settings):
    """Return a network's thresholds, report and finalized weights, by name."""
    pruner = PDPPruner(model, config(**settings))
    pruner.step(0.5)
    pruner.step(1.0)
    pruner.verify_replicas()
    report = {layer.name: (layer.weights, layer.pruned) for layer in pruner.report().layers}
    thresholds = {name: t.item() for name, t in pruner.state_dict()["thresholds"].items()}
    pruner.finalize()
    weights = {name: global_tensor(weight.detach()) for name, weight in model.named_parameters()}
    return thresholds, report, weights


LAYERWISE = {
    "unstructured": {"sparsity": 0.5, "scope": "layer"},
    "channel": {"sparsity": 0.5, "scope": "layer", "pattern": "channel"},
    "N:M": {"pattern": "2:4"},
}


def pruned_on_ranks(rank, expert_dim, pattern):
    return pruned(experts_of_rank(rank, expert_dim), LAYERWISE[pattern])


@pytest.mark.parametrize("expert_dim", EXPERT_DIMS)
@pytest.mark.parametrize("pattern", LAYERWISE)
def test_the_pruner_prunes_each_expert_by_its_own_threshold(backend, pattern, expert_dim):
    found = results_on_ranks(pruned_on_ranks, 4, expert_dim, pattern, backend=backend)
    for rank, (thresholds, report, weights) in enumerate(found):
        alone = Network(expert_of(rank, expert_dim))
        expected_thresholds, expected_report, expected_weights = pruned(alone, LAYERWISE[pattern])
        assert report == expected_report
        assert thresholds == pytest.approx(expected_thresholds, rel=1e-6)
        for name, weight in expected_weights.items():
            assert torch.equal(weights[name], weight), (rank, name)


def global_budget_on_ranks(rank, pattern):
    pruner = PDPPruner(experts_of_rank(rank, 0), config(sparsity=0.5, pattern=pattern))
    with pytest.raises(ValueError, match="must be the same on all ranks"):
        pruner.step(0.5)


@pytest.mark.parametrize("pattern", ["unstructured", "channel"])
def test_the_pruner_refuses_one_budget_over_different_experts(backend, pattern):
    results_on_ranks(global_budget_on_ranks, 4, pattern, backend=backend)


def drifting_expert(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Two experts, each of which two ranks hold as replicas.
    device = device_of(rank).type
    mesh = init_device_mesh(device, (2, 2, 1), mesh_dim_names=("expert", "replicas", "shard"))
    model = Network(rank // 2).to(device)
    fully_shard(model.expert, mesh=mesh["replicas", "shard"])
    pruner = PDPPruner(model, config(sparsity=0.5, scope="layer"))
    pruner.step(0.5)
    pruner.verify_replicas()
    if rank == 3:
        with torch.no_grad():
            model.expert.weight.to_local()[0, 0] += 0.5
    with pytest.raises(RuntimeError) as caught:
        pruner.verify_replicas()
    return str(caught.value)


def test_replicas_of_an_expert_are_compared_with_each_other_alone(backend):
    for message in results_on_ranks(drifting_expert, 4, backend=backend):
        assert message == "replicas differ: expert.weight is not the same on ranks [2] and [3]"
