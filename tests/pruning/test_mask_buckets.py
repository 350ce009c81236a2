"""Layers of a model take their masked weights from buckets, and compute what each alone does."""

import copy
import weakref

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner
from pdp_kernels.pruning import bucket, mask_buckets
from tests.support.mask_buckets import CONFIG, LISTS, Calls, Chain, prepared
from tests.support.models import mlp, small_model


@pytest.fixture
def alone(monkeypatch):
    """Let no weight be in a bucket, once it is called."""
    return lambda: monkeypatch.setattr(bucket, "MAX_ELEMENTS", 0)


class Mixed(nn.Module):
    """Convolutions, a frozen layer, an unused one, and one of another dtype."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.unused = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.low = nn.Linear(8, 8).to(torch.bfloat16)
        self.head = nn.Linear(8, 5)
        self.to(memory_format=torch.channels_last)

    def forward(self, inputs):
        hidden = self.grouped(self.conv(inputs).relu()).mean((2, 3))
        hidden = self.frozen(hidden).relu()
        hidden = hidden + self.low(hidden.to(torch.bfloat16)).to(hidden.dtype)
        return self.head(hidden)


class Tied(nn.Module):
    """Layers that share a weight, and one that runs twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.twice = (nn.Linear(8, 8) for _ in range(3))
        self.second.weight = self.first.weight
        self.double()

    def forward(self, inputs):
        return self.twice(self.second(self.twice(self.first(inputs).tanh())).tanh())


def trained(model, batches, autocast=False):
    """Return the losses and gradients of each step of a training with two microbatches a step."""
    pruner = PDPPruner(model, PDPConfig(0.6, relative_tau=0.3, warmup=0, ramp=4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results = []
    for step, batch in enumerate(batches):
        for inputs in batch.chunk(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(inputs).float().square().mean()
            loss.backward()
            results.append(loss.detach())
        results += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(step + 1)
    return results


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("size", [bucket.BUCKET_BYTES, 300])
def test_a_training_is_that_of_layers_that_mask_their_own_weights(
    monkeypatch, alone, autocast, size
):
    model = Mixed()
    batches = torch.randn(4, 8, 3, 6, 6)
    monkeypatch.setattr(bucket, "BUCKET_BYTES", size)
    with Calls() as calls:
        found = trained(copy.deepcopy(model), batches, autocast)
    alone()
    with Calls() as calls_alone:
        expected = trained(model, batches, autocast)
    assert len(found) == len(expected) == 4 * (2 + 8)
    assert all(map(torch.equal, found, expected))
    # The first of 8 forwards takes no bucket. Of 5 weights one is frozen.
    buckets = 1 if size > 300 else 3
    assert calls.of_masks() == {
        "soft_mask": 5,
        "soft_mask_backward": 4,
        "soft_mask_list": 7 * (buckets + 1),
        "soft_mask_list_backward": 7 * buckets,
    }
    assert calls_alone.of_masks() == {"soft_mask": 5 * 8, "soft_mask_backward": 4 * 8}


def test_a_weight_that_is_used_twice_is_masked_once(alone):
    model = Tied()
    batches = torch.randn(4, 8, 8, dtype=torch.float64)
    with Calls() as calls:
        found = trained(copy.deepcopy(model), batches)
    alone()
    for own, expected in zip(found, trained(model, batches), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-14)
    assert calls.of_masks()["soft_mask_list"] == calls.of_masks()["soft_mask_list_backward"] == 7


def test_a_bucket_is_one_call_forward_and_one_backward():
    model, inputs = prepared(mlp(), torch.randn(4, 24)), torch.randn(4, 24)
    with Calls() as calls:
        model(inputs).sum().backward()
    assert calls.of_masks() == LISTS


class Backwards(nn.Sequential):
    """Layers that run in the order opposite to that of their names."""

    def forward(self, inputs):
        for layer in reversed(self):
            inputs = layer(inputs).tanh()
        return inputs


def test_constants_are_not_copied_for_layers_that_run_in_another_order(alone):
    model = Backwards(*(nn.Linear(8, 8) for _ in range(3)))
    other, inputs = copy.deepcopy(model), torch.randn(4, 8)
    with Calls() as calls:
        found = prepared(model, inputs)(inputs)
    assert "aten::stack" not in calls.names and calls.of_masks()["soft_mask_list"] == 1
    alone()
    assert torch.equal(found, prepared(other, inputs)(inputs))


def test_gradients_of_late_layers_do_not_wait_for_early_ones(monkeypatch):
    monkeypatch.setattr(bucket, "BUCKET_BYTES", 1)
    model, inputs = prepared(mlp(), torch.randn(4, 24)), torch.randn(4, 24)
    loss = model(inputs).sum()
    with Calls() as calls:
        loss.backward()
    steps = [name for name in calls.names if name in ("aten::mm", "soft_mask_list_backward")]
    last, middle, first = ["aten::mm"] * 2, ["aten::mm"] * 2, ["aten::mm"]
    mask = ["soft_mask_list_backward"]
    assert steps == [*last, *mask, *middle, *mask, *first, *mask]


def test_the_masked_weights_end_with_the_graph():
    model, seen = prepared(Chain(), torch.ones(4, 8)), []

    def run(layer, inputs):
        masked = mask_buckets.bucketed(layer._parameters["weight"], layer.pdp_masks["weight"])
        seen.append(weakref.ref(masked))
        return layer(inputs)

    model.run = run
    outputs = model(torch.ones(4, 8))
    assert seen[0]() is not None
    outputs.sum().backward()
    assert seen[0]() is None  # the layer's own node has let it go


def test_forwards_without_gradients_and_evaluation_take_no_bucket():
    model, inputs = prepared(small_model(), torch.ones(4, 16)), torch.ones(4, 16)
    with Calls() as calls:
        with torch.no_grad():
            model(inputs)
        with torch.inference_mode():
            model(inputs)
        model.eval()(inputs)
    assert calls.of_masks() == {"soft_mask": 4}
    with Calls() as calls:
        model.train()(inputs).sum().backward()
    assert calls.of_masks() == LISTS


class Recursive(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, inputs, depth=2):
        hidden = self.inner(inputs).tanh()
        return self.outer(self(hidden, depth - 1) if depth else hidden)


def test_a_model_that_calls_itself_masks_its_weights_once():
    model = prepared(Recursive(), torch.ones(4, 8))
    with Calls() as calls:
        model(torch.ones(4, 8)).sum().backward()
    assert calls.of_masks() == LISTS


def test_a_layer_that_a_forward_leaves_out_is_in_no_bucket_again():
    model = Chain()
    run, model.run = model.run, lambda layer, inputs: inputs
    prepared(model, torch.ones(4, 8)).run = run
    expected = [(1, 1), (1, 0), (1, 0), (1, 1), (1, 1)]  # lists, and weights on their own
    steps = [run, run, lambda layer, inputs: inputs, run, run]
    for step, (lists, single) in zip(steps, expected, strict=True):
        model.run = step
        with Calls() as calls:
            model(torch.ones(4, 8)).sum().backward()
        assert calls.of_masks()["soft_mask_list"] == lists
        assert calls.of_masks()["soft_mask"] == single


class Heads(nn.Module):
    """Two networks of two layers each, with a loss each."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(mlp()[:4] for _ in range(2))

    def forward(self, inputs):
        return [head(inputs).square().sum() for head in self.heads]


def test_several_backward_passes_may_each_reach_a_part():
    heads = prepared(Heads(), torch.ones(2, 24))
    expected = torch.autograd.grad(sum(heads(torch.ones(2, 24))), list(heads.parameters()))
    with Calls() as calls:
        first, second = heads(torch.ones(2, 24))
        first.backward()
        assert heads.heads[1][0].weight.grad is None
        second.backward()
    assert calls.of_masks() == {"soft_mask_list": 1, "soft_mask_list_backward": 2}
    for parameter, gradient in zip(heads.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_gradients_that_came_in_passes_of_their_own_get_buckets_of_their_own():
    heads = Heads()
    PDPPruner(heads, CONFIG)
    for expected in ({"soft_mask": 4, "soft_mask_backward": 4}, dict.fromkeys(LISTS, 2)):
        with Calls() as calls:
            for loss in heads(torch.ones(2, 24)):
                loss.backward()
        assert calls.of_masks() == expected


def test_weights_that_no_gradient_reaches_are_in_no_bucket():
    heads = Heads()
    PDPPruner(heads, CONFIG)
    for masks in ({"soft_mask": 4, "soft_mask_backward": 2}, {**LISTS, "soft_mask": 2}):
        with Calls() as calls:
            heads(torch.ones(2, 24))[0].backward()
        assert calls.of_masks() == masks


def test_weights_that_change_before_the_backward_are_an_error():
    model = prepared(small_model(), torch.ones(4, 16))
    loss = model(torch.ones(4, 16)).sum()
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: .*\(32, 16\)"):
        loss.backward()


def test_a_second_derivative_is_an_error():
    model = prepared(small_model(), torch.ones(4, 16))
    weight = model[0].weight
    loss = model(torch.randn(4, 16)).square().sum()
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


def test_large_weights_mask_themselves(monkeypatch):
    monkeypatch.setattr(bucket, "MAX_ELEMENTS", 32 * 16)
    model = prepared(nn.Sequential(small_model(), nn.Linear(8, 8)), torch.ones(4, 16))
    with Calls() as calls:
        model(torch.ones(4, 16)).sum().backward()
    assert calls.of_masks() == {**LISTS, "soft_mask": 1, "soft_mask_backward": 1}
