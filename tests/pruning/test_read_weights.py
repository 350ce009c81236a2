"""Masked weights that the forward of a module around their layers reads, or writes."""

import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pdp_kernels import PDPConfig, PDPPruner
from tests.support.models import AT_ONCE, outputs


class Reader(nn.Module):
    """Reads the weight of a layer that it does not call, as the attention of Swin Transformers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, inputs):
        return self.last(functional.linear(inputs, self.layer.weight, self.layer.bias).tanh())


def product(inputs, layer):
    return functional.linear(inputs, layer.weight, layer.bias)


class ByAFunction(Reader):
    def forward(self, inputs):
        return self.last(product(inputs, self.layer).tanh())


class FromFarAbove(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh())])
        self.last = nn.Linear(8, 4)

    def forward(self, inputs):
        return self.last(product(inputs, self.blocks[0][0]).tanh())


class InAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(8, 8), torch.randn(4, 8)])

    def forward(self, inputs):
        for weight in self.weights:
            inputs = functional.linear(inputs, weight).tanh()
        return inputs


class InADict(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterDict({"a": torch.randn(8, 8), "b": torch.randn(4, 8)})

    def forward(self, inputs):
        hidden = functional.linear(inputs, self.weights["a"]).tanh()
        return functional.linear(hidden, self.weights["b"])


class Checkpointed(nn.Module):
    """Runs the reader again in the backward pass, where the forward of the model is over."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.reader = Reader()
        self.use_reentrant = use_reentrant

    def forward(self, inputs):
        return checkpoint(self.reader, inputs, use_reentrant=self.use_reentrant)


class CheckpointsItself(Reader):
    """Runs a method again in the backward pass, which reads the weight outside of any forward."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, inputs):
        return checkpoint(super().forward, inputs, use_reentrant=self.use_reentrant)


class WithAForwardOfItsOwn(Reader):
    """Has a forward on the instance, as accelerate sets one for mixed precision."""

    def __init__(self):
        super().__init__()
        self.forward = self.forward


class NotCalled(nn.Module):
    """Is the pruner's model, and calls another part of itself, as LightningModules do."""

    def __init__(self):
        super().__init__()
        self.net = Reader()

    def __call__(self, inputs):
        return self.net(inputs)


READERS = {
    "its own layer's": Reader,
    "by a function": ByAFunction,
    "from far above": FromFarAbove,
    "in a list": InAList,
    "in a dict": InADict,
    "checkpointed": lambda: Checkpointed(False),
    "checkpointed, reentrant": lambda: Checkpointed(True),
    "a checkpointed method's": lambda: CheckpointsItself(False),
    "a checkpointed method's, reentrant": lambda: CheckpointsItself(True),
    "a forward of its own": WithAForwardOfItsOwn,
    "of a part": NotCalled,
}
PATTERNS = {
    "unstructured": PDPConfig(0.5, include=["*"], relative_tau=0.3, **AT_ONCE),
    "2:4": PDPConfig(pattern="2:4", include=["*"], relative_tau=0.3, **AT_ONCE),
}


def soft_copy(pruner):
    """Return a plain copy of the model that holds the softly masked weights."""
    with torch.no_grad():
        softly = {
            target.name: mask.soft(target.weight)
            for target, mask in zip(pruner._weights.targets, pruner._weights.masks, strict=True)
        }
    plain = pruner.pruned_copy()
    for name, w_hat in softly.items():
        plain.get_parameter(name).data = w_hat
    return plain


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("reader", READERS)
def test_a_forward_reads_masked_weights(reader, pattern):
    model = READERS[reader]()
    pruner = PDPPruner(model, PATTERNS[pattern])
    inputs = torch.randn(5, 8, requires_grad=True)
    for _ in range(3):  # buckets are there from the second on
        softly, exactly = soft_copy(pruner), pruner.pruned_copy()
        for parameter in (*model.parameters(), inputs):
            parameter.grad = None
        model.train()(inputs).square().sum().backward()
        assert torch.equal(softly.train()(inputs), model(inputs))
        assert torch.equal(exactly.eval()(inputs), model.eval()(inputs))
        with torch.no_grad():
            assert torch.equal(exactly(inputs), model(inputs))
        softly(inputs).square().sum().backward()
        for target, mask in zip(pruner._weights.targets, pruner._weights.masks, strict=True):
            weight, gradient = target.weight, softly.get_parameter(target.name).grad
            (expected,) = torch.autograd.grad(mask.soft(weight), weight, gradient)
            torch.testing.assert_close(weight.grad, expected)
    pruner.finalize()
    assert torch.equal(exactly(inputs), model.eval()(inputs))


@pytest.mark.parametrize("reader", ["its own layer's", "by a function", "from far above"])
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_forward_reads_masked_weights(reader, training):
    torch._dynamo.reset()
    model = READERS[reader]()
    PDPPruner(model, PATTERNS["unstructured"])
    inputs = torch.randn(5, 8)
    compiled = torch.compile(model.train(training), backend="eager", fullgraph=True)
    assert torch.equal(compiled(inputs), model(inputs))


def test_outside_of_forwards_a_weight_is_the_parameter():
    model = Reader()
    weight = model.layer.weight
    PDPPruner(model, PATTERNS["unstructured"])
    model(torch.randn(5, 8)).sum().backward()
    assert model.layer.weight is weight
    with pytest.raises(ValueError, match="no"), torch.no_grad():
        model.register_forward_hook(interrupt)
        model(torch.randn(5, 8))
    assert model.layer.weight is weight


def interrupt(*_):
    raise ValueError("no")


def test_modules_around_masked_layers_keep_their_names_and_signatures():
    model = nn.Sequential(Reader(), nn.ModuleList([Reader()])[0])
    types = [type(each) for each in model.modules()]
    pruner = PDPPruner(model, PATTERNS["unstructured"])
    assert [type(each).__name__ for each in model] == ["Reader", "Reader"]
    assert isinstance(model[0], Reader) and type(model[0]).__module__ == __name__
    again = pickle.loads(pickle.dumps(model))
    for reader in (model[0], again[0], copy.deepcopy(model)[0]):
        assert (
            type(reader) is not Reader and "inputs" in inspect.signature(reader.forward).parameters
        )
    for changed in (pruner.pruned_copy(), model):
        if changed is model:
            pruner.finalize()
        assert [type(each) for each in changed.modules()] == types


class Pickled(Reader):
    """Says itself how it is pickled."""

    def __reduce_ex__(self, protocol):
        make, args, state, *rest = super().__reduce_ex__(protocol)
        return make, args, {**state, "pickled": True}, *rest


def test_modules_around_masked_layers_are_pickled_as_their_classes_say():
    model = Pickled()
    pruner = PDPPruner(model, PATTERNS["unstructured"])
    assert pickle.loads(pickle.dumps(model)).pickled and copy.deepcopy(model).pickled
    pruner.finalize()
    assert type(model) is Pickled


class MaxNorm(nn.Linear):
    """A constraint that the layer imposes on its own weight."""

    def forward(self, inputs):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(inputs)


class MaxNormOfAChild(Reader):
    def forward(self, inputs):
        self.last.weight.data = torch.renorm(self.last.weight.data, 2, 0, 0.5)
        return super().forward(inputs)


class InPlaceOnAChild(Reader):
    def forward(self, inputs):
        with torch.no_grad():
            self.last.weight.clamp_(-0.1, 0.1)
        return super().forward(inputs)


def test_a_layer_that_writes_into_its_masked_weight_is_told():
    model = nn.Sequential(MaxNorm(8, 8), nn.Linear(8, 4))
    PDPPruner(model, PATTERNS["unstructured"])
    with pytest.warns(UserWarning, match="weight of a MaxNorm .* exclude the layer"):
        model(torch.randn(5, 8))
    embedding = nn.Embedding(8, 4, max_norm=0.1)
    PDPPruner(embedding, PATTERNS["unstructured"])
    with pytest.warns(UserWarning, match="weight of a Embedding"):
        embedding(torch.arange(8))


@pytest.mark.parametrize("cls", [MaxNormOfAChild, InPlaceOnAChild])
def test_a_module_cannot_write_into_the_masked_weight_of_another(cls):
    model = cls()
    before = copy.deepcopy(model.state_dict())
    PDPPruner(model, PATTERNS["unstructured"])
    with pytest.raises(RuntimeError, match="writes into the weight of a Linear"):
        model(torch.randn(5, 8))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model = cls()
    PDPPruner(model, PDPConfig(0.5, exclude=["last"], **AT_ONCE))
    model(torch.randn(5, 8))
    assert model.last.weight.abs().amax() <= 0.5


def test_new_modules_of_a_masked_class_are_plain():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(Reader(), nn.Tanh()))
    pruner = PDPPruner(model, PATTERNS["unstructured"])
    part = model[:2]
    assert type(part) is nn.Sequential and part[0] is model[0]
    part.train()(torch.randn(5, 8)).sum().backward()
    inner = model[2][:1]
    assert type(inner[0]) is type(model[2][0])
    new = type(model[0])(8, 4, bias=False)
    assert type(new) is nn.Linear and new(torch.randn(5, 8)).shape == (5, 4)
    reader = type(model[2][0])()
    assert type(reader) is Reader
    assert outputs(reader, torch.ones(1, 8))[0].shape == (1, 4)
    pruner.finalize()
    assert type(part[0]) is nn.Linear


def test_classes_with_registries_and_arguments_can_be_masked():
    registry = []

    class Registered(nn.Linear):
        def __init_subclass__(cls, key, **kwargs):
            super().__init_subclass__(**kwargs)
            registry.append(key)

    class Named(Registered, key="named"):
        pass

    model = nn.Sequential(nn.Linear(8, 8), Named(8, 4))
    pruner = PDPPruner(model, PATTERNS["unstructured"])
    model(torch.randn(5, 8)).sum().backward()
    assert registry == ["named"]
    pruner.finalize()
    assert type(model[1]) is Named


def test_classes_of_models_that_are_gone_are_let_go():
    def trial():
        held = torch.ones(8)

        class Local(Reader):
            def forward(self, inputs):
                return super().forward(inputs + held)

        model = Local()
        pruner = PDPPruner(model, PATTERNS["unstructured"])
        model(torch.ones(1, 8)).sum().backward()
        pruner.finalize()
        return weakref.ref(Local), weakref.ref(held)

    held = [each for _ in range(2) for each in trial()]
    gc.collect()  # the masked classes
    gc.collect()  # and what they were made from
    assert [each() for each in held] == [None] * 4
