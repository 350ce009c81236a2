"""Pruned weights stay zero while the model is trained further."""

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner, freeze_zeros, prune_one_shot
from tests.support.models import lbfgs_training

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "fused adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
    "muon": lambda parameters: torch.optim.Muon(parameters, lr=0.02),
}


def train(model, optimizer, steps=5):
    for _ in range(steps):
        loss = model(torch.randn(16, 24)).sub(1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_with_any_optimizer_and_its_momentum(name):
    model = nn.Sequential(nn.Linear(24, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False))
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = PDPPruner(model, PDPConfig(0.8, warmup=0, ramp=0))
    train(model, optimizer)  # momentum of the weights that are pruned, too
    pruner.finalize()
    zeros = [weight == 0 for weight in model.parameters()]
    before = [weight.detach().clone() for weight in model.parameters()]
    pruner.freeze(optimizer)
    for weight, zero in zip(model.parameters(), zeros, strict=True):
        for value in optimizer.state[weight].values():
            if value.shape == weight.shape:
                assert torch.all(value[zero] == 0) and torch.any(value[~zero] != 0)
    train(model, optimizer)
    for weight, zero, then in zip(model.parameters(), zeros, before, strict=True):
        assert torch.equal(weight == 0, zero)
        assert torch.any(weight.detach() != then)


def test_unfrozen_zeros_are_revived_by_momentum():
    model = nn.Linear(24, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = PDPPruner(model, PDPConfig(0.8, warmup=0, ramp=0))
    train(model, optimizer)
    pruner.finalize()
    train(model, optimizer, steps=1)
    assert torch.all(model.weight != 0)


def test_gradients_of_zeros_can_be_kept_out_of_clipping():
    weight = nn.Parameter(torch.tensor([0.0, 2.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    frozen = freeze_zeros([weight], optimizer)
    (weight * torch.tensor([30.0, 4.0])).sum().backward()
    frozen.mask_gradients()
    assert torch.nn.utils.clip_grad_norm_([weight], 2.0) == 4
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.0, 0.0]))


@pytest.mark.parametrize("steps_before", [0, 5])
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_lowers_the_loss_of_the_model_with_its_zeros(line_search, steps_before):
    model, optimizer, closure = lbfgs_training(line_search)
    for _ in range(steps_before):  # directions of all weights, which the optimizer keeps
        optimizer.step(closure)
    prune_one_shot(model, 0.7)
    weights = [model[0].weight, model[2].weight]
    zeros = [weight == 0 for weight in weights]
    freeze_zeros(weights, optimizer)
    losses = [closure().item()]
    for _ in range(8):
        optimizer.step(closure=closure)
        losses.append(closure().item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(weight == 0, zero) for weight, zero in zip(weights, zeros, strict=True))


def test_gradients_that_a_closure_makes_are_masked():
    weight = nn.Parameter(torch.tensor([0.0, 2.0]))
    optimizer = torch.optim.Adam([weight], lr=0.5)
    freeze_zeros([weight], optimizer)
    loss = weight.square().sum() + weight.sum()
    assert optimizer.step(lambda: (loss.backward(), loss)[1]) is loss
    assert weight.grad.tolist() == [0, 5]
    assert optimizer.state[weight]["exp_avg"][0] == 0


@pytest.mark.parametrize("coalesced", [True, False])
def test_zeros_of_an_embedding_with_sparse_gradients_stay(coalesced):
    embedding = nn.Embedding(6, 2, sparse=True)
    embedding.weight.data = torch.arange(12.0).view(6, 2) % 3
    zeros = embedding.weight == 0
    before = embedding.weight.detach().clone()
    optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=0.1)
    freeze_zeros([embedding.weight], optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        embedding(torch.tensor([1, 3, 3, 0])).sum().backward()
        if coalesced:
            embedding.weight.grad = embedding.weight.grad.coalesce()
        optimizer.step()
    assert torch.equal(embedding.weight == 0, zeros)
    assert not optimizer.state[embedding.weight]["exp_avg"][zeros].any()
    trained = torch.tensor([True, True, False, True, False, False])
    assert torch.equal((embedding.weight != before).any(1), trained)


def test_frozen_zeros_follow_a_model_to_another_device(device):
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[0.0, 2.0, 0.0, 1.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    freeze_zeros([model.weight], optimizer)
    model.to(device)
    model(torch.ones(1, 4, device=device)).sum().backward()
    optimizer.step()
    assert model.weight.tolist() == [[0.0, 1.5, 0.0, 0.5]]


def test_each_optimizer_keeps_the_zeros_of_its_own_weights():
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8), nn.Linear(8, 2))
    pruner = PDPPruner(model, PDPConfig(0.8, warmup=0, ramp=0, exclude=["3"]))
    pruner.finalize()
    zeros = [model[0].weight == 0, model[2].weight == 0]
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[2])]
    for optimizer in optimizers:
        pruner.freeze(optimizer)
    model(torch.randn(16, 24)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(model[0].weight == 0, zeros[0])
    assert torch.equal(model[2].weight == 0, zeros[1])
    with pytest.raises(
        ValueError, match=r"optimizer must have a weight that the pruner prunes, such as 0\.weight"
    ):
        pruner.freeze(torch.optim.SGD(model[3].parameters(), lr=0.1))


def test_an_infinite_gradient_of_a_zero_is_dropped():
    weight = nn.Parameter(torch.tensor([0.0, 2.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    freeze_zeros([weight], optimizer)
    weight.grad = torch.tensor([float("inf"), 1.0])
    optimizer.step()
    assert weight.tolist() == [0.0, 1.0]


def test_removed_zeros_may_grow():
    weight = nn.Parameter(torch.tensor([0.0, 2.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    frozen = freeze_zeros([weight], optimizer)
    for expected in (0.0, -1.0):
        weight.grad = torch.ones(2)
        optimizer.step()
        assert weight[0] == expected
        frozen.remove()


def test_a_weight_without_gradient_is_no_error():
    weight = nn.Parameter(torch.tensor([0.0, 2.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    freeze_zeros([weight], optimizer)
    optimizer.step()
    assert weight.tolist() == [0.0, 2.0]


def test_bad_arguments_raise():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got list"):
        freeze_zeros([weight], [])
    with pytest.raises(TypeError, match=r"weights\[0\] must be a torch.nn.Parameter, got str"):
        freeze_zeros(["weight"], optimizer)
    with pytest.raises(ValueError, match=r"weights\[1\] must be a parameter of the optimizer"):
        freeze_zeros([weight, nn.Parameter(torch.ones(3))], optimizer)


class Quantized(torch.Tensor):
    """A tensor subclass, as torchao's 8-bit optimizers keep as their state."""


@pytest.mark.parametrize(
    "quantized",
    [lambda w: torch.full(w.shape, 7, dtype=torch.uint8), lambda w: (w + 7).as_subclass(Quantized)],
)
def test_a_quantized_state_stays_and_so_do_the_zeros(quantized):
    weight = torch.nn.Parameter(torch.tensor([0.0, 2.0]))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    state = quantized(weight.detach())
    optimizer.state[weight]["codes"] = state
    before = state.as_subclass(torch.Tensor).clone()
    freeze_zeros([weight], optimizer)
    assert torch.equal(state.as_subclass(torch.Tensor), before)
    weight.sum().backward()
    optimizer.step()
    assert weight.tolist() == [0.0, 1.5]
