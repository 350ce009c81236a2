"""Copies of a model, such as averages of its weights, that follow its pruner."""

import copy
import warnings

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner, hard_mask
from tests.support.models import outputs, two_layers, two_pruned_layers


def test_an_average_of_weights_follows_the_schedule_and_is_finalized():
    model = two_layers()
    pruner = PDPPruner(model, PDPConfig(0.7, warmup=0, ramp=1))
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    pruner.follow(average.module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(1, 13):
        model(torch.randn(5, 24)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
        pruner.step(step / 12)
    weight = average.module[0].weight.detach().clone()
    sparsity = pruner.prune_counts["0.weight"] / weight.numel()
    inputs = torch.randn(5, 24)
    evaluated = average.eval()(inputs)
    pruner.finalize()
    assert torch.equal(average.module[0].weight, weight * hard_mask(weight, sparsity))
    assert not torch.equal(average.module[0].weight, model[0].weight)
    assert torch.equal(average(inputs), evaluated)
    assert type(average.module[0]) is nn.Linear
    total = sum(int((average.module[index].weight == 0).sum()) for index in (0, 2))
    assert total == round(0.7 * (24 * 32 + 32 * 8))


def test_update_bn_sees_the_pruned_average():
    """Its training mode is not the soft one: batch norm learns what evaluation will give it."""
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    pruner = PDPPruner(model, PDPConfig(0.7, warmup=0, ramp=1))
    average = torch.optim.swa_utils.AveragedModel(model)
    pruner.follow(average.module)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # its thresholds say nothing of the average's weights
    pruner.step(1.0)
    batches = [torch.randn(64, 8)]
    torch.optim.swa_utils.update_bn(batches, average)
    pruner.finalize()
    own = copy.deepcopy(average.module[1])
    torch.optim.swa_utils.update_bn(batches, average)
    assert torch.equal(own.running_mean, average.module[1].running_mean)
    assert torch.equal(own.running_var, average.module[1].running_var)


def test_only_a_copy_can_follow():
    _, pruner = two_pruned_layers()
    with pytest.raises(ValueError, match="copy must have the weights"):
        pruner.follow(nn.Sequential(nn.Linear(24, 32)))


def test_a_follower_that_moves_leaves_the_model_as_it_is():
    model, pruner = two_pruned_layers()
    average = copy.deepcopy(model)
    pruner.follow(average)
    pruner.step(0.5)
    expected = outputs(model, torch.ones(1, 24))
    average.double()
    for now, then in zip(outputs(model, torch.ones(1, 24)), expected, strict=True):
        assert torch.equal(now, then)
    inputs = torch.ones(1, 24, dtype=torch.float64)
    for now in outputs(average, inputs):
        torch.testing.assert_close(now.float(), expected[1])
    for progress in (0.75, 1.0):  # it goes on following
        pruner.step(progress)
        _, their_hard = outputs(model, torch.ones(1, 24))
        for own in outputs(average, inputs):
            torch.testing.assert_close(own.float(), their_hard)
    pruner.finalize()
    for index in (0, 2):
        assert torch.equal(average[index].weight == 0, model[index].weight == 0)


def test_loading_into_a_follower_says_nothing_of_the_model():
    model, pruner = two_pruned_layers()
    average = copy.deepcopy(model)
    pruner.follow(average)
    pruner.step(1.0)
    average.load_state_dict(average.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.finalize()


FOLLOWER_CHANGES = {
    "another layer": (lambda copy: copy.__setitem__(0, nn.Linear(24, 32)), "no longer has the lay"),
    "another pruner": (lambda copy: PDPPruner(copy, PDPConfig(0.1)), "no longer has the masks"),
    "a tie": (lambda copy: copy.append(nn.Linear(24, 32)), None),
}


@pytest.mark.parametrize("change", FOLLOWER_CHANGES)
def test_a_changed_follower_is_an_error_before_anything_is_pruned(change):
    make, message = FOLLOWER_CHANGES[change]
    model = two_layers()
    pruner = PDPPruner(model, PDPConfig(0.7, warmup=0, ramp=1))
    follower = copy.deepcopy(model)
    pruner.follow(follower)
    pruner.step(1.0)
    make(follower)
    if message is None:
        follower[3].weight = follower[0].weight
        message = "are one weight now"
    with pytest.raises(RuntimeError, match=message):
        pruner.finalize()
    assert not pruner.finalized
    assert (model[0].weight != 0).all()


def test_nothing_follows_a_finalized_model():
    model, pruner = two_pruned_layers()
    other = copy.deepcopy(model)
    pruner.step(1.0)
    pruner.finalize()
    with pytest.raises(RuntimeError, match="the pruner is finalized"):
        pruner.follow(other)
