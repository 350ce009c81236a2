"""Copies and checkpoints of a pruner and its model hold what they should."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from pdp_kernels import PDPConfig, PDPPruner
from tests.support.models import CONFIG, small_model, train_to_the_end
from tests.support.ranks import results_on_ranks
from tests.support.sharded_training import mesh_of


def pickled(pruner):
    return pickle.loads(pickle.dumps(pruner))


def saved(pruner):
    buffer = io.BytesIO()
    torch.save(pruner, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class CopiesItself(nn.Module):
    """Copies itself as other code does too, without a call of its class."""

    def __deepcopy__(self, memo):
        cls = self.__class__
        copied = memo[id(self)] = cls.__new__(cls)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


class CopyingLinear(CopiesItself, nn.Linear):
    pass


class CopyingSequential(CopiesItself, nn.Sequential):
    pass


def test_modules_that_copy_themselves_keep_their_masks():
    model = CopyingSequential(CopyingLinear(16, 8), nn.ReLU(), CopyingLinear(8, 4))
    types = [type(each) for each in model.modules()]
    pruner = PDPPruner(model, PDPConfig(0.75, warmup=0, ramp=0))
    copied, inputs = copy.deepcopy(model), torch.randn(4, 16)
    assert [type(each) for each in copied.modules()] == [type(each) for each in model.modules()]
    for training in (True, False):
        expected = model.train(training)(inputs)
        assert torch.equal(copied.train(training)(inputs), expected)
    plain = pruner.pruned_copy()
    assert torch.equal(plain.eval()(inputs), expected)
    assert [type(each) for each in plain.modules()] == types


class PickledAsACall(nn.Linear):
    """Says that it is a call of its class, and its state."""

    def __reduce__(self):
        return type(self), (self.in_features, self.out_features), vars(self)


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy, saved])
def test_modules_that_are_pickled_as_calls_of_their_classes_keep_their_masks(copied):
    layers = nn.Sequential(PickledAsACall(16, 8), nn.ReLU(), PickledAsACall(8, 4))
    model = torch.compile(layers, backend="eager")  # whose wrapper is pickled so too
    PDPPruner(model, PDPConfig(0.75, warmup=0, ramp=0))
    other, inputs = copied(model), torch.randn(4, 16)
    assert type(other) is type(model)
    for training in (True, False):
        expected = model.train(training)(inputs)
        assert torch.equal(other.train(training)(inputs), expected)


def test_a_layer_whose_bias_is_parametrized_later_is_copied():
    model = small_model()
    pruner = PDPPruner(model, PDPConfig(0.75, warmup=0, ramp=0))
    parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    inputs = torch.randn(4, 16)
    assert torch.equal(pruner.pruned_copy().eval()(inputs), model.eval()(inputs))
    pruner.finalize()


@pytest.mark.parametrize("pattern", ["unstructured", "channel"])
@pytest.mark.parametrize("copied", [pickled, copy.deepcopy, saved])
def test_a_copied_pruner_prunes_its_own_model(copied, pattern):
    pruner = PDPPruner(small_model(), PDPConfig(0.75, warmup=0, ramp=4, pattern=pattern))
    pruner.step(1.0)
    other = copied(pruner)
    outputs = [each.model.eval()(torch.ones(16)) for each in (pruner, other)]
    assert torch.equal(*outputs)  # the thresholds of before, until its next step
    for name, threshold in pruner.state_dict()["thresholds"].items():
        assert torch.equal(other.state_dict()["thresholds"][name], threshold)
    sparsities = []
    for each in (other, pruner):  # the first must not change the second
        torch.manual_seed(1)
        each.model.train()
        sparsities.append(train_to_the_end(each))
    assert sparsities[0] == sparsities[1] > 0.7
    assert torch.equal(other.model[0].weight, pruner.model[0].weight)


def loading_run():
    """Return a pruner at the end of its schedule, and the checkpoint of an early step."""
    pruner = PDPPruner(small_model(), CONFIG)
    pruner.step(1.0)
    early = copy.deepcopy((pruner.model.state_dict(), pruner.state_dict()))
    pruner.step(4.0)
    return pruner, *early


def test_finalizing_an_early_checkpoint_warns():
    pruner, weights, _ = loading_run()
    pruner.model.load_state_dict(weights)
    with pytest.warns(UserWarning, match="loaded after the last step.*before progress 4"):
        pruner.finalize()


def test_finalizing_an_early_checkpoint_with_its_pruner_warns_of_the_schedule():
    pruner, weights, state = loading_run()
    pruner.model.load_state_dict(weights)
    pruner.load_state_dict(state)
    with pytest.warns(UserWarning, match="at progress 1 with .* of the sparsity reached"):
        pruner.finalize()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pruner_first", [False, True])  # as torch.distributed.checkpoint loads
def test_finalizing_a_resumed_training_is_silent(pruner_first):
    pruner, _, _ = loading_run()
    states = copy.deepcopy([pruner.model.state_dict(), pruner.state_dict()])
    loads = list(zip([pruner.model, pruner], states, strict=True))
    for part, state in reversed(loads) if pruner_first else loads:
        part.load_state_dict(state)
    pruner.finalize()
    pruner, weights, state = loading_run()
    pruner.model.load_state_dict(weights)
    pruner.load_state_dict(state)
    pruner.step(4.0)  # trains on
    pruner.finalize()


@pytest.mark.parametrize("resumed", ["weights first", "pruner first and a step"])
def test_weights_that_are_loaded_after_a_resumed_training_warn(resumed):
    pruner, weights, _ = loading_run()
    states = copy.deepcopy([pruner.model.state_dict(), pruner.state_dict()])
    if resumed == "weights first":
        pruner.model.load_state_dict(states[0])
        pruner.load_state_dict(states[1])
    else:
        pruner.load_state_dict(states[1])
        pruner.model.load_state_dict(states[0])
        pruner.step(4.0)
    pruner.model.load_state_dict(weights)
    with pytest.warns(UserWarning, match="loaded after the last step"):
        pruner.finalize()


@pytest.mark.parametrize("pattern", ["unstructured", "channel", "2:4"])
def test_a_pruned_copy_is_plain_and_computes_what_the_model_evaluates(pattern):
    sparsity = None if pattern == "2:4" else 0.75
    pruner = PDPPruner(small_model(), PDPConfig(sparsity, warmup=0, ramp=4, pattern=pattern))
    pruner.step(2.0)
    before = copy.deepcopy(pruner.model.state_dict())
    pruned = pruner.pruned_copy()
    inputs = torch.randn(4, 16)
    assert torch.equal(pruned(inputs), pruner.model.eval()(inputs))
    assert [type(layer) for layer in pruned] == [nn.Linear, nn.ReLU, nn.Linear]
    assert (pruned[0].weight == 0).any()
    for name, value in pruner.model.state_dict().items():
        assert torch.equal(value, before[name])
    pruner.step(4.0)
    pruner.finalize()


def test_a_pruned_copy_exports_without_operators_of_this_package():
    pruner = PDPPruner(small_model(), CONFIG)
    pruner.step(2.0)
    exported = torch.export.export(pruner.pruned_copy().eval(), (torch.randn(4, 16),))
    assert "pdp" not in str(exported.graph)


def copy_under_fsdp(rank, ranks):
    from torch.distributed.fsdp import fully_shard

    model = small_model()
    fully_shard(model, mesh=mesh_of(rank, (ranks,)))
    pruner = PDPPruner(model, CONFIG)
    with pytest.raises(RuntimeError, match="one under fully_shard is none"):
        pruner.pruned_copy()
    pruner.step(4.0)
    return True


def test_a_pruned_copy_under_fsdp_is_refused():
    assert results_on_ranks(copy_under_fsdp, 2, 2) == [True, True]


def test_a_training_is_extended_with_a_new_schedule():
    short = PDPPruner(small_model(), PDPConfig.for_epochs(0.8, epochs=10))
    short.step(5.0)
    model = small_model()
    model.load_state_dict(short.model.state_dict())
    long = PDPPruner(model, PDPConfig.for_epochs(0.8, epochs=20))
    with pytest.raises(ValueError, match="new_schedule=True goes on with this pruner's schedule"):
        long.load_state_dict(short.state_dict())
    long.load_state_dict(short.state_dict(), new_schedule=True)
    assert long.progress == 5.0 and long.prune_counts == short.prune_counts
    thresholds = [each.state_dict()["thresholds"]["0.weight"] for each in (long, short)]
    assert torch.equal(*thresholds)
    long.step(20.0)
    long.finalize()
    with pytest.raises(ValueError, match=r"configuration with sparsity = 0\.9, got 0\.8$"):
        other = PDPPruner(small_model(), PDPConfig.for_epochs(0.9, epochs=10))
        other.load_state_dict(short.state_dict(), new_schedule=True)


def test_a_state_from_before_a_field_of_the_configuration_loads():
    pruner = PDPPruner(small_model(), CONFIG)
    state = pruner.state_dict()
    del state["config"]["allocation"]
    pruner.load_state_dict(state)
    other = PDPPruner(small_model(), PDPConfig(0.8, warmup=0, ramp=4, allocation="erk"))
    state = other.state_dict()
    del state["config"]["allocation"]
    with pytest.raises(ValueError, match="allocation = 'erk', got 'magnitude'"):
        other.load_state_dict(state)
