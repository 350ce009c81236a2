"""Under DDP, layers in buckets train as layers that mask their own weights, and send as early."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pdp_kernels import PDPConfig, PDPPruner
from pdp_kernels.pruning import bucket
from tests.support.mask_buckets import Calls
from tests.support.ranks import results_on_ranks

RANKS = 2
STEPS = 6


class Branches(nn.Module):
    """Layers in a row, of which each forward may leave some out."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, inputs, left_out=()):
        for index, layer in enumerate(self.layers):
            if index not in left_out:
                inputs = layer(inputs).tanh()
        return inputs


def trained_on_rank(rank, max_elements, left_out, options):
    """Return gradients and weights of a training on this rank, and the number of layers alone."""
    bucket.MAX_ELEMENTS, before = max_elements, bucket.MAX_ELEMENTS
    try:
        module = Branches().double()
        model = DistributedDataParallel(module, **options)
        pruner = PDPPruner(module, PDPConfig(0.6, relative_tau=0.3, warmup=0, ramp=STEPS))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        found = []
        for step in range(STEPS):
            inputs = torch.randn(RANKS, 4, 8, dtype=torch.float64)[rank]
            model(inputs, left_out[rank][step]).square().mean().backward()
            found += [None if p.grad is None else p.grad.clone() for p in module.parameters()]
            optimizer.step()
            optimizer.zero_grad()
            pruner.step(step + 1)
        in_buckets = len(module.pdp_buckets._buckets)
        return [*found, *module.state_dict().values()], in_buckets
    finally:
        bucket.MAX_ELEMENTS = before


def compare(left_out, **options):
    (found, in_buckets), (other, _) = results_on_ranks(
        trained_on_rank, RANKS, bucket.MAX_ELEMENTS, left_out, options
    )
    (expected, alone), _ = results_on_ranks(trained_on_rank, RANKS, 0, left_out, options)
    assert len(found) == len(other) == len(expected) > STEPS
    for own, others, one in zip(found, other, expected, strict=True):
        assert (own is None) == (others is None) == (one is None)
        assert own is None or (torch.equal(own, one) and torch.equal(own, others))
    assert alone == 0
    return in_buckets


ALL = [[()] * STEPS] * RANKS


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bucket_cap_mb": 1e-4},
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"find_unused_parameters": True},
    ],
    ids=str,
)
def test_a_training_is_that_of_layers_that_mask_their_own_weights(options):
    assert compare(ALL, **options) == 4


NEVER = [[(2,)] * STEPS] * RANKS
LATER = [[()] * 3 + [(2,)] * 3] * RANKS
ON_ONE = [[(), (), (2,), (), (1, 2), ()], [()] * STEPS]


@pytest.mark.parametrize(("left_out", "in_buckets"), [(NEVER, 3), (LATER, 3), (ON_ONE, 2)])
def test_layers_that_are_not_used(left_out, in_buckets):
    assert compare(left_out, find_unused_parameters=True) == in_buckets


def test_a_static_graph_without_a_layer():
    assert compare(NEVER, static_graph=True) == 3


def events_on_rank(rank):
    """Return the order in which the last backward passes layers and sends gradients."""
    bucket.BUCKET_BYTES, before = 1, bucket.BUCKET_BYTES
    try:
        # Each weight is above 1 MB, the size of DDP's first bucket.
        module = nn.Sequential(*(nn.Linear(600, 600, bias=False) for _ in range(3)))
        PDPPruner(module, PDPConfig(0.5, warmup=0, ramp=0))
        model = DistributedDataParallel(module, bucket_cap_mb=1)
        events = []

        def send(state, bucket):
            events.append("send")
            return default_hooks.allreduce_hook(None, bucket)

        model.register_comm_hook(None, send)
        for index, layer in enumerate(module):
            layer.register_full_backward_hook(lambda *_, index=index: events.append(index))
        for _ in range(3):
            events.clear()
            model(torch.randn(4, 600, requires_grad=True)).sum().backward()
        return events
    finally:
        bucket.BUCKET_BYTES = before


def test_gradients_are_sent_while_earlier_layers_are_differentiated():
    events, others = results_on_ranks(events_on_rank, RANKS)
    assert events == others
    assert [event for event in events if event != "send"] == [2, 1, 0]
    assert events.count("send") == 3
    assert events.index("send") < events.index(0)


def shard_and_train(rank):
    """Return how many lists of weights each step masks, of which the third shards the model."""
    module = Branches()
    PDPPruner(module, PDPConfig(0.6, warmup=0, ramp=0))
    lists = []
    for step in range(5):
        if step == 2:
            fully_shard(module, mesh=init_device_mesh("cpu", (RANKS,)))
        with Calls() as calls:
            module(torch.randn(4, 8)).sum().backward()
        module.zero_grad()
        lists.append(calls.of_masks()["soft_mask_list"])
    return lists


def test_weights_that_fsdp_shards_are_in_no_bucket():
    """It frees and gathers the weights of a model group by group."""
    assert results_on_ranks(shard_and_train, RANKS) == [[0, 1, 0, 0, 0]] * RANKS


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, inputs):
        return [head(inputs).square().sum() for head in self.heads]


def backward_by_parts(rank):
    module = Heads()
    PDPPruner(module, PDPConfig(0.6, warmup=0, ramp=0))
    model = DistributedDataParallel(module)
    for _ in range(3):
        with Calls() as calls:
            for loss in model(torch.randn(4, 8)):
                loss.backward()
    return calls.of_masks()


def test_parts_may_have_backward_passes_of_their_own():
    """DDP accepts one gradient for each weight, also an absent one."""
    expected = {"soft_mask_list": 2, "soft_mask_list_backward": 2}
    assert results_on_ranks(backward_by_parts, RANKS) == [expected] * RANKS
