"""PDPPruner follows Algorithm 1, prunes the chosen weights, and meets the sparsity exactly."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pdp_kernels import (
    PDPConfig,
    PDPPruner,
    hard_mask,
    hard_mask_channel,
    hard_mask_nm,
    pdp_mask,
    pdp_mask_channel,
    pdp_mask_nm,
)
from tests.support.models import AT_ONCE, mlp, train, weights_of, zeros_of
from tests.support.weights import DTYPES


def test_algorithm_1_step_by_step():
    """Weights and thresholds equal those of a literal transcription in float64."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 8)).double()
    layers = [model[0], model[2]]
    weights = [layer.weight.detach().clone().requires_grad_() for layer in layers]
    b = [layer.bias.detach().clone().requires_grad_() for layer in layers]
    s, epsilon, tau, r, epochs, lr = 2, 0.2, 1e-2, 0.8, 9, 0.1
    config = PDPConfig.paper(r, warmup=s, epsilon=epsilon, tau=tau)
    pruner = PDPPruner(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    batches = torch.randn(epochs, 3, 16, 24, dtype=torch.float64)
    targets = torch.randn(epochs, 3, 16, 8, dtype=torch.float64)

    t = [torch.tensor(-math.inf, dtype=torch.float64)] * 2
    r_i = None
    for e in range(epochs):
        for inputs, target in zip(batches[e], targets[e], strict=True):
            functional.mse_loss(model(inputs), target).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step(e)

            # Lines 18-25: the forward, the backward and the update.
            w_hat = [
                w if threshold == -math.inf else torch.sigmoid((w**2 - threshold**2) / tau) * w
                for w, threshold in zip(weights, t, strict=True)
            ]
            hidden = torch.tanh(inputs @ w_hat[0].T + b[0])
            loss = ((hidden @ w_hat[1].T + b[1] - target) ** 2).mean()
            grads = torch.autograd.grad(loss, weights + b)
            with torch.no_grad():
                for parameter, grad in zip(weights + b, grads, strict=True):
                    parameter -= lr * grad
                if e >= s and r_i is None:  # lines 8-9
                    every = torch.cat([w.abs().flatten() for w in weights]).sort().values
                    k = math.floor(r * len(every) + 0.5)
                    r_i = [float((w.abs() <= every[k - 1]).sum()) / w.numel() for w in weights]
                t = []
                for i, w in enumerate(weights):  # lines 10-16
                    r_hat = min(1, epsilon * (e - s)) * r_i[i] if e >= s else 0
                    v = w.abs().flatten().sort().values
                    k = math.floor(r_hat * w.numel() + 0.5)
                    t.append((v[k - 1] + v[k]) / 2 if k else torch.tensor(-math.inf).double())

            for layer, w, threshold in zip(layers, weights, t, strict=True):
                torch.testing.assert_close(
                    layer.weight.detach(), w.detach(), rtol=1e-12, atol=1e-14
                )
                mask = layer.pdp_masks["weight"]
                torch.testing.assert_close(mask.threshold, threshold, rtol=1e-12, atol=0)
    assert all(0.5 < ratio < 1 for ratio in r_i) and r_i[0] != r_i[1]
    pruner.finalize()
    pruned = [float((layer.weight == 0).double().mean()) for layer in layers]
    assert pruned == r_i


PATTERNS = {"unstructured": 0.9, "2:4": None, "1:8": None, "channel": 0.5}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sparsity_is_met_exactly(dtype, pattern, scope, device):
    model = mlp(dtype, device)
    config = PDPConfig(PATTERNS[pattern], scope=scope, pattern=pattern, warmup=1, ramp=2)
    pruner = PDPPruner(model, config)
    train(model, pruner, [0.5, 1, 1.5, 2, 2.5, 3, 3.5])
    pruner.finalize()
    sizes = [weight.numel() for weight in weights_of(model)]
    if pattern == "unstructured":
        expected = [math.floor(0.9 * size + 0.5) for size in sizes]
        total = math.floor(0.9 * sum(sizes) + 0.5)
    elif pattern == "channel":
        dead = [int((weight == 0).all(1).sum()) for weight in weights_of(model)]
        assert zeros_of(model) == [
            count * weight.shape[1] for count, weight in zip(dead, weights_of(model), strict=True)
        ]
        assert sum(dead) == 28
        if scope == "layer":
            assert dead == [16, 8, 4]
        return
    else:
        n, m = map(int, pattern.split(":"))
        expected = [size // m * (m - n) for size in sizes]
        total = sum(expected)
        for weight in weights_of(model):
            assert torch.all((weight != 0).unflatten(1, (-1, m)).sum(2) == n)
    assert sum(zeros_of(model)) == total
    if scope == "layer" or pattern != "unstructured":
        assert zeros_of(model) == expected


def test_ties_do_not_spoil_the_sparsity():
    model = nn.Linear(10, 10, bias=False)
    nn.init.constant_(model.weight, 0.5)
    pruner = PDPPruner(model, PDPConfig(0.37, **AT_ONCE))
    pruner.finalize()
    assert zeros_of(model) == [37]
    assert torch.all(model.weight.flatten()[:37] == 0)


def test_training_mode_is_soft_and_evaluation_mode_is_hard(device):
    model = nn.Linear(64, 32, bias=False, device=device)
    pruner = PDPPruner(model, PDPConfig(0.7, relative_tau=0.3, **AT_ONCE))
    inputs = torch.eye(64, device=device)
    weight = model.weight.detach()
    threshold = model.pdp_masks["weight"].threshold
    soft = pdp_mask(weight, threshold=threshold, relative_tau=0.3)
    hard = weight * hard_mask(weight, 0.7)
    model.train()
    assert torch.equal(model(inputs), functional.linear(inputs, soft))
    model.eval()
    assert torch.equal(model(inputs), functional.linear(inputs, hard))
    pruner.finalize()
    assert torch.equal(model.weight, hard)
    model.train()
    assert torch.equal(model(inputs), functional.linear(inputs, hard))


@pytest.mark.parametrize("dim", ["output", "input"])
def test_channels_use_the_channel_mask(dim):
    model = nn.Conv2d(6, 8, 3, bias=False)
    config = PDPConfig(0.5, pattern="channel", channel_dim=dim, relative_tau=0.2, **AT_ONCE)
    PDPPruner(model, config)
    inputs, weight = torch.randn(2, 6, 9, 9), model.weight.detach()
    at = ["output", "input"].index(dim)
    soft = pdp_mask_channel(weight, 0.5, dim=at, relative_tau=0.2, norm="rms")
    assert torch.equal(model(inputs), functional.conv2d(inputs, soft))
    kept = hard_mask_channel(weight, 0.5, dim=at).view((-1, 1, 1, 1) if at == 0 else (1, -1, 1, 1))
    assert torch.equal(model.eval()(inputs), functional.conv2d(inputs, weight * kept))


def test_groups_lie_along_the_inputs_and_their_pruned_members_ramp_up():
    model = nn.Conv2d(8, 4, 3, bias=False)
    pruner = PDPPruner(
        model, PDPConfig(pattern="1:4", relative_tau=0.1, warmup=1, ramp=3, ramp_shape="linear")
    )
    inputs, weight = torch.randn(2, 8, 9, 9), model.weight.detach()
    for progress, pruned in ((0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (9, 3)):
        pruner.step(progress)
        soft = pdp_mask_nm(weight, 1, 4, dim=1, pruned=pruned, relative_tau=0.1)
        assert torch.equal(model.train()(inputs), functional.conv2d(inputs, soft))
    hard = weight * hard_mask_nm(weight, 1, 4, dim=1)
    assert torch.equal(model.eval()(inputs), functional.conv2d(inputs, hard))


def test_before_the_warm_up_ends_training_is_that_of_the_dense_model():
    model, dense = mlp(), mlp()
    dense.load_state_dict(model.state_dict())

    class Nothing:
        step = staticmethod(lambda progress: None)

    train(model, PDPPruner(model, PDPConfig(0.9, warmup=5, ramp=2)), [1, 2, 3, 4, 4.9])
    train(dense, Nothing, range(5))
    for own, other in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(own, other)


def test_the_budget_is_allocated_when_the_warm_up_ends():
    model = mlp()
    pruner = PDPPruner(model, PDPConfig(0.9, warmup=1, ramp=2))
    assert pruner.prune_counts is None
    train(model, pruner, [0.5, 1.0])
    allocated = dict(pruner.prune_counts)
    assert sum(allocated.values()) == math.floor(
        0.9 * sum(w.numel() for w in weights_of(model)) + 0.5
    )
    train(model, pruner, [2, 3, 4])
    assert pruner.prune_counts == allocated
    pruner.finalize()
    assert zeros_of(model) == list(allocated.values())


def test_a_reallocated_budget_follows_the_weights():
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 16))
    pruner = PDPPruner(model, PDPConfig(0.8, warmup=1, ramp=2, reallocate=1))
    pruner.step(1)
    first = dict(pruner.prune_counts)
    with torch.no_grad():
        model[0].weight.mul_(3)
    pruner.step(1.9)
    assert pruner.prune_counts == first
    pruner.step(2)
    again = dict(pruner.prune_counts)
    assert again["0.weight"] < first["0.weight"]
    assert sum(again.values()) == sum(first.values()) == 1024
    pruner.step(3)
    with torch.no_grad():
        model[1].weight.mul_(9)
    pruner.step(4)  # after the end of the ramp nothing moves any more
    assert pruner.prune_counts == again
    pruner.finalize()
    assert zeros_of(model) == list(again.values())


def test_no_layer_is_pruned_beyond_the_cap():
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    pruner = PDPPruner(model, PDPConfig(0.8, max_layer_sparsity=0.95, **AT_ONCE))
    pruner.finalize()
    zeros, total = zeros_of(model), sum(weight.numel() for weight in weights_of(model))
    assert zeros[1] == math.floor(0.95 * 512)
    assert sum(zeros) == math.floor(0.8 * total + 0.5)


def test_sparsities_may_be_given_by_layer_and_overridden():
    model = mlp()
    by_layer = PDPConfig({"0": 0.5, "*": 0.25}, scope="layer", **AT_ONCE)
    PDPPruner(model, by_layer).finalize()
    assert zeros_of(model) == [384, 128, 32]
    model = mlp()
    overrides = {"0.weight": None, "2": {"sparsity": 0.75}, "4": {"pattern": "2:4"}}
    PDPPruner(model, PDPConfig(0.9, overrides=overrides, **AT_ONCE)).finalize()
    assert zeros_of(model) == [0, 384, 64]


def test_an_overridden_layer_is_not_part_of_the_global_budget():
    model = mlp()
    PDPPruner(model, PDPConfig(0.5, overrides={"0": {"sparsity": 0.25}}, **AT_ONCE)).finalize()
    first, *others = zeros_of(model)
    assert first == 192
    assert sum(others) == math.floor(0.5 * (512 + 128) + 0.5)


def test_layers_of_several_dtypes_share_one_budget():
    model = nn.Sequential(
        nn.Linear(16, 16).double(), nn.Linear(16, 16).bfloat16(), nn.Linear(16, 8)
    )
    pruner = PDPPruner(model, PDPConfig(0.6, warmup=0, ramp=1))
    pruner.step(0.5)
    dtypes = [layer.pdp_masks["weight"].threshold.dtype for layer in model]
    assert dtypes == [torch.float64, torch.float32, torch.float32]
    for layer in model:
        layer(torch.randn(2, 16, dtype=layer.weight.dtype)).sum().backward()
    pruner.step(1)
    pruner.finalize()
    assert sum(zeros_of(model)) == 384


def test_other_bad_arguments_raise():
    with pytest.raises(TypeError, match="config must be a PDPConfig, got dict"):
        PDPPruner(mlp(), {"sparsity": 0.9})
    pruner = PDPPruner(mlp(), PDPConfig(0.9))
    for progress, error, message in (
        (-1, ValueError, "progress must be at least 0 and finite, got -1"),
        (math.nan, ValueError, "progress.*got nan"),
        ("1", TypeError, "progress must be a number, got str"),
    ):
        with pytest.raises(error, match=message):
            pruner.step(progress)
    assert pruner.progress == 0
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.1)
    with pytest.raises(
        TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got Sequential"
    ):
        pruner.attach(pruner.model, 10)
    with pytest.raises(ValueError, match="steps_per_epoch must be positive and finite, got 0"):
        pruner.attach(optimizer, 0)
    with pytest.raises(RuntimeError, match="call finalize first"):
        pruner.freeze(optimizer)


def test_a_second_pruner_takes_the_model_over():
    model = mlp()
    first = PDPPruner(model, PDPConfig(0.9, **AT_ONCE))
    second = PDPPruner(model, PDPConfig(0.5, **AT_ONCE))
    for call in (lambda: first.step(1), first.finalize, lambda: first.load_state_dict({})):
        with pytest.raises(RuntimeError, match=r"0\.weight no longer has the masks of this pruner"):
            call()
    second.finalize()
    assert sum(zeros_of(model)) == math.floor(0.5 * sum(w.numel() for w in weights_of(model)) + 0.5)


def test_a_weight_that_changes_its_shape_is_not_pruned():
    model = mlp()
    pruner = PDPPruner(model, PDPConfig(0.9, **AT_ONCE))
    model[0].weight = nn.Parameter(model[0].weight.detach()[:3])
    for call in (lambda: pruner.step(1), pruner.finalize):
        with pytest.raises(RuntimeError, match=r"0\.weight had shape \(\d+, \d+\) and now"):
            call()


def test_finalize_before_the_end_of_the_schedule_warns_and_meets_the_sparsity():
    model = mlp()
    pruner = PDPPruner(model, PDPConfig(0.9, warmup=4, ramp=4))
    train(model, pruner, [1, 2])
    with pytest.warns(UserWarning, match="progress 2 with 0% of the sparsity reached"):
        pruner.finalize()
    assert sum(zeros_of(model)) == math.floor(0.9 * sum(w.numel() for w in weights_of(model)) + 0.5)


def test_finalize_at_the_end_does_not_warn(recwarn):
    model = mlp()
    pruner = PDPPruner(model, PDPConfig(0.9, warmup=1, ramp=1))
    train(model, pruner, [1, 2])
    pruner.finalize()
    assert not [warning for warning in recwarn if "finalize" in str(warning.message)]


def test_after_finalize_nothing_is_left_behind():
    model = mlp()
    plain = {name: set(vars(layer)) for name, layer in model.named_modules()}
    classes = [type(layer) for layer in model.modules()]
    parameters = list(model.parameters())
    pruner = PDPPruner(model, PDPConfig(0.9, **AT_ONCE))
    assert [type(layer) for layer in model.modules()] != classes
    assert not pruner.finalized
    pruner.finalize()
    assert pruner.finalized
    assert [type(layer) for layer in model.modules()] == classes
    assert {name: set(vars(layer)) for name, layer in model.named_modules()} == plain
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for call in (lambda: pruner.step(1), pruner.finalize):
        with pytest.raises(RuntimeError, match="finalized"):
            call()


def test_a_step_is_the_same_number_of_calls_for_any_number_of_layers():
    class Calls(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is not torch.ops.aten.detach.default:  # a view, no work
                self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    called = []
    for depth in (2, 40):
        model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(depth)])
        pruner = PDPPruner(model, PDPConfig(0.9, warmup=0, ramp=2))
        pruner.step(1)
        with Calls() as calls:
            pruner.step(1.5)
        called.append(calls.names)
    assert called[0] == called[1]
    assert called[0].count("pdp.thresholds.default") == 1


def test_attach_steps_after_each_optimizer_step():
    model, by_hand = mlp(), mlp()
    by_hand.load_state_dict(model.state_dict())
    config = PDPConfig(0.9, warmup=1, ramp=1)

    class Nothing:
        step = staticmethod(lambda progress: None)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = PDPPruner(model, config)
    handle = pruner.attach(optimizer, steps_per_epoch=7)
    train(model, Nothing, range(20), optimizer)
    assert pruner.progress == 20 / 7
    train(by_hand, PDPPruner(by_hand, config), [step / 7 for step in range(1, 21)])
    for own, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(own, other)
    handle.remove()
    train(model, Nothing, range(1), optimizer)
    assert pruner.progress == 20 / 7


@pytest.mark.parametrize("has_masks", [False, True])
def test_a_pruner_that_cannot_be_made_leaves_the_model_as_it_was(has_masks):
    model = mlp()
    earlier = PDPPruner(model, PDPConfig(0.5, warmup=0, ramp=1)) if has_masks else None
    types = [type(each) for each in model.modules()]
    weight = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        PDPPruner(model, PDPConfig(0.5, warmup=0, ramp=0, allocation="lamp"))
    assert [type(each) for each in model.modules()] == types
    with torch.no_grad():
        model[0].weight.copy_(weight)
    if earlier is not None:
        earlier.step(1.0)
        earlier.finalize()


def test_weights_that_are_loaded_before_the_first_step_have_the_budget_of_such_weights():
    trained = mlp()
    with torch.no_grad():
        trained[0].weight.mul_(10)
    counts = []
    for is_late in (False, True):
        model = mlp()
        if not is_late:
            model.load_state_dict(trained.state_dict())
        pruner = PDPPruner(model, PDPConfig(0.5, warmup=0, ramp=1))
        assert pruner.prune_counts is None
        model.load_state_dict(trained.state_dict())
        pruner.step(0.5)
        counts.append(pruner.prune_counts)
    assert counts[0] == counts[1]
