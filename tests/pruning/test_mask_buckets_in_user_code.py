"""Buckets of masked weights change nothing for what users do with a model and its layers."""

import copy
import gc
import inspect
import pickle
import threading
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pdp_kernels import PDPConfig, PDPPruner
from pdp_kernels.pruning import bucket, mask_buckets
from tests.support.mask_buckets import CONFIG, LISTS, Calls, Chain, prepared
from tests.support.models import AT_ONCE, small_model


@pytest.fixture
def alone(monkeypatch):
    """Let no weight be in a bucket, once it is called."""
    return lambda: monkeypatch.setattr(bucket, "MAX_ELEMENTS", 0)


def without_gradients(layer, inputs):
    with torch.no_grad():
        return layer(inputs)


def without_autocast(layer, inputs):
    with torch.autocast("cpu", enabled=False):
        return layer(inputs.float())


def with_saved_tensors_elsewhere(layer, inputs):
    with torch.autograd.graph.save_on_cpu():
        return layer(inputs)


def changed_in_place(layer, inputs):
    with torch.no_grad():
        layer._parameters["weight"].mul_(2)
    return layer(inputs)


def given_other_data(layer, inputs):
    weight = layer._parameters["weight"]
    weight.data = weight.data * 2
    return layer(inputs)


def given_another_parameter(layer, inputs):
    layer.weight = nn.Parameter(layer.weight.detach() * 2)
    return layer(inputs)


def frozen(layer, inputs):
    outputs = layer.requires_grad_(False)(inputs)
    layer.requires_grad_(True)
    return outputs


def evaluated(layer, inputs):
    outputs = layer.eval()(inputs)
    w_hat = layer.train().pdp_masks["weight"].hard(layer._parameters["weight"])
    assert torch.equal(outputs, functional.linear(inputs, w_hat, layer.bias))
    return outputs


SURROUNDINGS = {
    "no_grad": without_gradients,
    "no autocast": without_autocast,
    "save_on_cpu": with_saved_tensors_elsewhere,
    "checkpoint": lambda layer, inputs: checkpoint(layer, inputs, use_reentrant=False),
    "reentrant checkpoint": lambda layer, inputs: checkpoint(layer, inputs, use_reentrant=True),
    "vmap": lambda layer, inputs: torch.vmap(layer)(inputs),
    "jvp": lambda layer, inputs: torch.func.jvp(layer, (inputs,), (inputs,))[1],
    "functional_call": lambda layer, inputs: torch.func.functional_call(
        layer, {"weight": layer.weight * 2}, inputs
    ),
    "compiled": lambda layer, inputs: torch.compile(layer, backend="eager", fullgraph=True)(inputs),
    "evaluation mode": evaluated,
    "frozen": frozen,
    "another version": changed_in_place,
    "other data": given_other_data,
    "another Parameter": given_another_parameter,
}


@pytest.mark.parametrize("case", SURROUNDINGS)
def test_a_layer_masks_its_own_weight_where_more_goes_on_around_it(alone, case):
    """The forward is that of masks on their own, for the layer that is in a bucket so far too."""
    model = Chain()
    other = copy.deepcopy(model)

    def results(model):
        prepared(model, torch.ones(4, 8)).run = SURROUNDINGS[case]
        found = []
        for seed in range(3):
            torch.manual_seed(seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=case == "no autocast"):
                outputs = model(torch.randn(4, 8))
            outputs.float().square().sum().backward()
            found.append(outputs.detach())
            found += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            model.zero_grad()
        return found

    with Calls() as calls:
        found = results(model)
    alone()
    expected = results(other)
    assert len(found) == len(expected) == 3 * 7
    for own, one in zip(found, expected, strict=True):
        assert (own is None) == (one is None)
        assert own is None or torch.equal(own, one)
    assert calls.of_masks()["soft_mask_list"] == 3  # of the other layers


def test_a_layer_that_is_compiled_on_its_own_is_compiled_once():
    torch._dynamo.reset()
    model, graphs = prepared(Chain(), torch.ones(4, 8)), []
    compiled = torch.compile(
        model.layers[1],
        fullgraph=True,
        backend=lambda graph, inputs: graphs.append(graph) or graph.forward,
    )
    model.run = lambda _, inputs: compiled(inputs)
    for _ in range(4):
        model(torch.randn(4, 8)).sum().backward()
    assert len(graphs) == 1


TRANSFORMS = {
    "vmap": lambda model, inputs: torch.vmap(model)(inputs),
    "grad": lambda model, inputs: torch.func.grad(lambda x: model(x).square().sum())(inputs),
    "trace": lambda model, inputs: torch.jit.trace(model, inputs)(inputs * 2),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", TRANSFORMS)
def test_a_model_that_is_transformed_takes_no_bucket(alone, case):
    model, inputs = prepared(small_model(), torch.ones(4, 16)), torch.randn(4, 16)
    with Calls() as calls:
        found = TRANSFORMS[case](model, inputs)
    assert calls.of_masks().keys() == {"soft_mask"}
    alone()
    assert torch.equal(found, TRANSFORMS[case](prepared(model, inputs), inputs))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_forward_leaves_nothing_behind(error):
    kept = []

    def interrupted(layer, inputs):
        weight = layer._parameters["weight"]
        masked = mask_buckets.bucketed(weight, layer.pdp_masks["weight"])
        kept.append(weakref.ref(masked))
        raise error

    model = prepared(Chain(), torch.ones(4, 8))
    model.run, run = interrupted, model.run
    with pytest.raises(error):
        model(torch.ones(4, 8))
    gc.collect()
    assert kept[0]() is None
    model.run = run
    with Calls() as calls:
        model(torch.ones(4, 8)).sum().backward()
        model.layers[1](torch.ones(4, 8)).sum().backward()
    # The forward that failed has not used the last layer, which does not count. A layer that is
    # called on its own masks its own weight.
    assert calls.of_masks() == {**LISTS, "soft_mask": 1, "soft_mask_backward": 1}


class StepsInForward(nn.Module):
    """A model whose forward trains it, as a training step of Lightning's does under DDP."""

    def __init__(self):
        super().__init__()
        self.net = small_model()

    def forward(self, inputs):
        losses = []
        for _ in range(3):
            loss = self.net(inputs).square().mean()
            loss.backward()
            torch.optim.AdamW(self.parameters(), lr=0.1, fused=True).step()  # changes no version
            self.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)


def test_weights_are_masked_again_after_a_backward_within_the_forward(alone):
    model, inputs = StepsInForward(), torch.randn(4, 16)
    other = copy.deepcopy(model)
    prepared(model, inputs)
    with Calls() as calls:
        found = model(inputs)
    alone()
    prepared(other, inputs)
    assert torch.equal(found, other(inputs))
    assert calls.of_masks() == {**LISTS, "soft_mask": 2 * 2, "soft_mask_backward": 2 * 2}


def test_a_forward_that_is_set_on_the_instance_takes_buckets_too():
    """As accelerate sets one, which runs under autocast."""
    model, inputs = prepared(small_model(), torch.ones(4, 16)), torch.ones(4, 16)
    forward = model.forward
    model.forward = lambda inputs: forward(inputs) * 2
    with Calls() as calls:
        model(inputs)
    assert calls.of_masks() == {"soft_mask_list": 1}


class Writing(nn.Linear):
    def forward(self, inputs):
        return functional.linear(inputs, self.weight.mul_(2), self.bias)


def test_a_layer_may_write_into_the_weight_that_it_is_shown(alone):
    model = nn.Sequential(nn.Linear(8, 8), Writing(8, 8))
    model.append(model[1])
    other, inputs = copy.deepcopy(model), torch.randn(4, 8)
    with Calls() as calls, pytest.warns(UserWarning, match="writes into the weight"):
        found = prepared(model, inputs)(inputs)
    alone()
    with pytest.warns(UserWarning, match="writes into the weight"):
        assert torch.equal(found, prepared(other, inputs)(inputs))
    assert calls.of_masks()["soft_mask_list"] == 1


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_weights_see_their_gradients_alone(register):
    model, seen = prepared(Chain(), torch.ones(4, 8)), []
    model(torch.ones(4, 8)).sum().backward()
    getattr(model.layers[1].weight, register)(seen.append)
    model.run = lambda layer, inputs: layer(inputs).detach()
    for _ in range(2):
        model(torch.ones(4, 8)).sum().backward()
    assert not seen
    model.run = lambda layer, inputs: layer(inputs)
    model(torch.ones(4, 8)).sum().backward()
    assert len(seen) == 1 and torch.isfinite(seen[0]).all()


def test_weights_that_are_replaced_are_let_go():
    model = prepared(small_model(), torch.ones(4, 16))
    old = weakref.ref(model[0].weight)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    for _ in range(2):
        model(torch.ones(4, 16)).sum().backward()
    gc.collect()
    assert old() is None


def test_buckets_follow_weights_that_move_freeze_and_load():
    model = prepared(small_model(), torch.ones(4, 16))
    changes = [
        lambda: model.double(),
        lambda: model[0].requires_grad_(False),
        lambda: model[0].requires_grad_(True),
        lambda: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
        lambda: model.float(),
    ]
    for change in changes:
        change()
        inputs = torch.ones(4, 16, dtype=model[0].weight.dtype)
        expected = model[2](functional.relu(model[0](inputs)))
        outputs = model(inputs)
        outputs.sum().backward()
        with Calls() as calls:
            assert torch.equal(model(inputs), outputs)
        assert torch.equal(outputs, expected)
        assert calls.of_masks().keys() == {"soft_mask_list"}


class Documented(nn.Sequential):
    """A user's model."""

    subclasses: ClassVar = []

    def __init_subclass__(cls, name):
        cls.subclasses.append(name)

    def forward(self, inputs: torch.Tensor, scale: float = 1.0):
        return super().forward(inputs) * scale


def test_code_that_looks_at_the_class_of_the_model_finds_what_it_was():
    model = Documented(nn.Linear(4, 4), nn.Linear(4, 4))
    pruner = PDPPruner(model, CONFIG)
    assert isinstance(model, Documented) and type(model).__name__ == "Documented"
    assert not Documented.subclasses
    assert (type(model).__module__, type(model).__doc__) == (__name__, "A user's model.")
    assert inspect.signature(model.forward) == inspect.signature(Documented().forward)
    inputs = torch.ones(2, 4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        outputs = twin(inputs, scale=2.0)
        assert torch.equal(outputs, model(inputs, scale=2.0))
        outputs.sum().backward()
        with Calls() as calls:
            twin(inputs)
        assert calls.of_masks() == {"soft_mask_list": 1}
    assert type(pruner.pruned_copy()) is Documented
    pruner.finalize()
    assert type(model) is Documented and vars(model).keys() == vars(Documented()).keys()


@pytest.mark.parametrize("pattern", ["2:4", "channel"])
def test_other_patterns_leave_the_class_of_the_model_alone(pattern):
    model = small_model()
    PDPPruner(model, PDPConfig(None if pattern == "2:4" else 0.5, pattern=pattern, **AT_ONCE))
    assert type(model) is nn.Sequential


def test_a_graph_module_keeps_its_class():
    model = torch.fx.symbolic_trace(small_model())
    cls, inputs = type(model), torch.randn(4, 16)
    pruner = PDPPruner(model, CONFIG)
    expected = model(inputs)
    assert type(model) is cls
    model.recompile()
    assert torch.equal(model(inputs), expected)
    pruner.finalize()


def test_a_run_in_another_thread_takes_nothing():
    model = prepared(Chain(), torch.ones(4, 8))
    taken = []

    def run(layer, inputs):
        thread = threading.Thread(
            target=lambda: taken.append(
                mask_buckets.bucketed(layer.weight, layer.pdp_masks["weight"])
            )
        )
        thread.start()
        thread.join()
        return layer(inputs)

    model.run = run
    model(torch.ones(4, 8))
    assert taken == [None]
