"""PDPPruner prunes models sharded by FSDP2 or tensor parallelism as it does on one process."""

import math

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner, prune_one_shot
from tests.support.ranks import BACKENDS, device_of, results_on_ranks
from tests.support.sharded import assert_same_bits, with_collectives
from tests.support.sharded_training import (
    BATCH,
    PATTERNS,
    batches,
    config,
    fully_sharded,
    global_weights,
    mesh_of,
    network,
    outcome,
    sgd,
    sharded,
    tensor_parallel,
    thresholds_of,
    train,
)


def trained(pattern, device, rank=0, ranks=1, how=None, pruner_first=False):
    model, part, data = network(device), (0, 1), batches(device)
    if pruner_first:
        pruner = PDPPruner(model, config(pattern))
    if how is not None:
        model, part = sharded(model, rank, ranks, how)
    if not pruner_first:
        pruner = PDPPruner(model, config(pattern))
    return outcome(model, pruner, train(model, pruner, sgd(model), data, part), data)


HOWS = {
    2: ["FSDP", "FSDP that keeps global weights after a forward", "tensor parallelism"],
    3: ["FSDP"],
    4: ["FSDP", "replicas of FSDP", "tensor parallelism", "FSDP of tensor parallelism"],
}


def cases(ranks):
    """Every pattern, sharded in every way; the pruner is made before or after, by turns."""
    for i, how in enumerate(HOWS[ranks]):
        for j, pattern in enumerate(PATTERNS):
            # 36 columns on 4 ranks are cut through groups of 2.
            if not (pattern == "N:M" and how == "tensor parallelism" and ranks == 4):
                yield pattern, how, (i + j) % 2 == 0


def trainings(rank, ranks):
    return {
        (pattern, how, first): trained(pattern, device_of(rank), rank, ranks, how, first)
        for pattern, how, first in cases(ranks)
    }


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(scope="module", params=HOWS)
def by_rank(request, backend):
    return results_on_ranks(trainings, request.param, request.param, backend=backend)


@pytest.fixture(scope="module")
def one_device(backend):
    return "cuda" if backend == "nccl" else "cpu"


@pytest.fixture(scope="module")
def alone(one_device):
    return {pattern: trained(pattern, one_device) for pattern in PATTERNS}


def test_all_ranks_find_the_same_thresholds(by_rank):
    for case, first in by_rank[0].items():
        assert case[0] == "N:M" or first["thresholds"][-1][0] > 0
        for other in by_rank[1:]:
            for step, pairs in enumerate(
                zip(first["thresholds"], other[case]["thresholds"], strict=True)
            ):
                for pair in zip(*pairs, strict=True):
                    assert_same_bits(*pair, (case, step))


def test_training_is_that_of_one_process(by_rank, alone):
    """Only the order in which gradients are summed differs."""
    for case, found in by_rank[0].items():
        expected = alone[case[0]]
        for name in ("thresholds", "outputs", "weights"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_the_same_weights_are_pruned(by_rank, alone):
    for case, found in by_rank[0].items():
        expected = alone[case[0]]
        assert found["prune counts"] == expected["prune counts"]
        for weight, other in zip(found["weights"], expected["weights"], strict=True):
            assert torch.equal(weight == 0, other == 0), case


def test_reports_count_global_weights(by_rank, alone):
    for found_by_case in by_rank:
        for case, found in found_by_case.items():
            for name in ("pruned", "soft", "flipped", "histogram"):
                assert found[name] == alone[case[0]][name], (case, name)


def test_nothing_is_left_behind(by_rank):
    for case, found in by_rank[0].items():
        assert not any("Masked" in name for name in found["classes"]), case
        assert ("FSDPLinear" in found["classes"]) == ("FSDP" in case[1])


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )

    def forward(self, hidden):
        mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1], hidden.device)
        return self.layer(hidden, mask, is_causal=True)


class GPT(nn.Module):
    def __init__(self, vocabulary=40, width=32, context=16):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        return self.head(self.blocks(self.tokens(tokens) + self.places))


def train_gpt_on_rank(rank, ranks):
    return train_gpt(device_of(rank), rank, ranks)


def train_gpt(device, rank=0, ranks=1):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = GPT().to(device)
    text = torch.randint(0, 40, (50, BATCH, 17)).to(device)
    text[:, :, 1::2] = text[:, :, ::2][:, :, :8]  # something to learn: every token comes twice
    part = slice(None)
    if ranks > 1:
        mesh = mesh_of(rank, (ranks,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        part = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    pruner = PDPPruner(model, PDPConfig.for_epochs(0.8, epochs=50))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    thresholds, losses = [], []
    for step in range(50):
        tokens = text[step][part]
        logits = model(tokens[:, :-1]).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(step + 1)
        thresholds.append(torch.stack(thresholds_of(pruner)))
        losses.append(loss.item())
    pruner.finalize()
    return thresholds, losses, global_weights(model)


def test_fifty_steps_of_a_gpt_under_fsdp(backend, one_device):
    by_rank = results_on_ranks(train_gpt_on_rank, 2, 2, backend=backend)
    thresholds, losses, weights = train_gpt(one_device)
    assert losses[-1] < 0.8 * losses[0]
    assert (thresholds[-1] > 0).all()
    for step, found in enumerate(zip(*(result[0] for result in by_rank), strict=True)):
        assert_same_bits(*found, step)
        torch.testing.assert_close(found[0], thresholds[step], rtol=1e-3, atol=1e-6)
    mean_losses = [sum(pair) / 2 for pair in zip(*(result[1] for result in by_rank), strict=True)]
    torch.testing.assert_close(mean_losses, losses, rtol=1e-3, atol=1e-4)
    pruned = sum(int((weight == 0).sum()) for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in by_rank[0][2]) == pruned
    flips = sum(
        int(((one == 0) != (other == 0)).sum())
        for one, other in zip(by_rank[0][2], weights, strict=True)
    )
    assert flips <= 0.001 * pruned  # weights at the threshold, moved by rounding


def train_in_special_ways(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    device = device_of(rank)
    mesh, data, results = mesh_of(rank, (2,)), batches(device), {}

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_sharded(network(device), mesh, mp_policy=policy)
    pruner = PDPPruner(model, config())
    seen = []
    model[0].register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    thresholds = train(model, pruner, sgd(model), data, (rank, 2))
    assert set(seen) == {torch.bfloat16}
    results["mixed precision"] = outcome(model, pruner, thresholds, data)

    model = fully_sharded(network(device), mesh)
    pruner = PDPPruner(model, config())
    thresholds = train(model, pruner, sgd(model), data, (rank, 2), microbatches=3)
    results["accumulation"] = outcome(model, pruner, thresholds, data)

    # What finalize leaves is trained further, and evaluated in between.
    optimizer = sgd(model)
    before = global_weights(model)
    frozen = pruner.freeze(optimizer)
    for step in range(3):
        nn.functional.mse_loss(model(data[0][step]), data[1][step]).backward()
        optimizer.step()
        with torch.no_grad():
            model(data[0][step])
    frozen.remove()
    results["frozen"] = before, global_weights(model)
    return results


@pytest.fixture(scope="module")
def special(backend):
    return results_on_ranks(train_in_special_ways, 2, backend=backend)


def test_thresholds_are_those_of_the_float32_shards_in_mixed_precision(special, alone):
    found = special[0]["mixed precision"]
    assert found["prune counts"].keys() == alone["unstructured"]["prune counts"].keys()
    assert sum(found["prune counts"].values()) == math.floor(0.7 * (20 + 24) * 36 + 0.7 * 168 + 0.5)
    assert {t.dtype for t in found["thresholds"][-1]} == {torch.float32}
    torch.testing.assert_close(
        found["thresholds"], alone["unstructured"]["thresholds"], rtol=0.05, atol=0.01
    )
    assert found["thresholds"] == special[1]["mixed precision"]["thresholds"]


def test_gradients_accumulate(special, alone):
    found = special[0]["accumulation"]
    torch.testing.assert_close(
        found["weights"], alone["unstructured"]["weights"], rtol=1e-4, atol=1e-6
    )


def test_frozen_zeros_stay_zero(special):
    for before, after in zip(*special[0]["frozen"], strict=True):
        assert torch.equal(before == 0, after == 0)
        assert not torch.equal(before, after)


def follow_after_a_forward(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = device_of(rank)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model, average = (
        fully_shard(network(device), mesh=mesh_of(rank, (2,)), mp_policy=policy) for _ in range(2)
    )
    pruner, optimizer = PDPPruner(model, config()), sgd(model)
    inputs = batches(device)[0][0]
    for each in (model, average):
        each(inputs)  # a root that has weights of its own keeps them gathered, in bfloat16
    pruner.attach(optimizer, steps_per_epoch=10).remove()
    model(inputs)
    pruner.follow(average)
    pruner.step(2.0)
    pruner.finalize()
    return [sum(int((w == 0).sum()) for w in global_weights(each)) for each in (model, average)]


def test_weights_may_be_gathered_when_a_follower_or_an_attached_optimizer_begins(backend):
    for zeros in results_on_ranks(follow_after_a_forward, 2, backend=backend):
        assert zeros[0] == zeros[1] > 0


def evaluate_in_inference_mode(rank):
    device, same = device_of(rank), {}
    for pattern in PATTERNS:
        model = tensor_parallel(network(device), mesh_of(rank, (2,))).eval()
        pruner = PDPPruner(model, config(pattern))
        pruner.step(1.0)
        inputs = batches(device)[0][0]
        with torch.no_grad():
            expected, pruned = model(inputs), pruner.report().pruned
        with torch.inference_mode():
            same[pattern] = torch.equal(model(inputs), expected), pruner.report().pruned == pruned
    return same


def test_evaluation_works_in_inference_mode(backend):
    expected = dict.fromkeys(PATTERNS, (True, True))
    assert results_on_ranks(evaluate_in_inference_mode, 2, backend=backend) == [expected] * 2


def prune_cut_groups(rank):
    layers = nn.Sequential(nn.Linear(20, 36), nn.Tanh(), nn.Linear(36, 24))  # 18 inputs a rank
    tensor_parallel(layers, mesh_of(rank, (2,)))
    model = nn.Sequential(nn.Linear(20, 20), *layers)
    refused = r"3\.weight must not be sharded through groups of 4 inputs"
    for prune in (PDPPruner, prune_one_shot):
        with pytest.raises(ValueError, match=refused):
            prune(model, PDPConfig(pattern="2:4"))
    return (model[0].weight != 0).all().item()


def test_shards_that_cut_groups_are_refused_before_anything_is_pruned():
    assert results_on_ranks(prune_cut_groups, 2) == [True, True]


def count_collectives(rank):
    model = fully_sharded(network(device_of(rank)), mesh_of(rank, (2,)))
    pruner = PDPPruner(model, PDPConfig.paper(0.9))
    pruner.step(17.0)
    return len(with_collectives(lambda: pruner.step(18.0))[1])


def test_a_step_takes_four_collectives(backend):
    assert results_on_ranks(count_collectives, 2, backend=backend) == [4, 4]
