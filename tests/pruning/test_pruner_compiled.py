"""torch.compile of parts of a training with a pruner: blocks, the optimizer, whole steps."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from pdp_kernels import PDPConfig, PDPPruner

CONFIG = PDPConfig(0.7, warmup=1, ramp=2)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.last = nn.Linear(16, 8)

    def forward(self, inputs):
        return inputs + self.last(self.first(inputs).relu())


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, inputs):
        for block in self.blocks:
            inputs = block(inputs)
        return inputs


def train(model, step, steps=8):
    """Return the losses of a training whose updates and pruner's steps the function takes."""
    generator = torch.Generator().manual_seed(0)
    losses = []
    for index in range(steps):
        # The first block's inputs are like those of the others: one graph serves all.
        inputs = torch.randn(5, 8, generator=generator, requires_grad=True)
        loss = model(inputs).square().mean()
        loss.backward()
        step(index / 2)
        losses.append(loss.detach())
    return torch.stack(losses)


def stepped(optimizer, pruner):
    def step(progress):
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(progress)

    return step


def training():
    torch.manual_seed(0)
    model = Network()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def expected_losses():
    model, optimizer = training()
    return train(model, stepped(optimizer, PDPPruner(model, CONFIG)))


@pytest.mark.parametrize("order", ["pruner first", "compiled first", "in place"])
def test_blocks_are_compiled_once_for_all_of_them(order):
    model, optimizer = training()
    counter = CompileCounter()
    pruner = PDPPruner(model, CONFIG) if order == "pruner first" else None
    for index, block in enumerate(model.blocks):
        if order == "in place":
            block.compile(backend=counter, fullgraph=True)
        else:
            model.blocks[index] = torch.compile(block, backend=counter, fullgraph=True)
    pruner = pruner or PDPPruner(model, CONFIG)
    torch.testing.assert_close(train(model, stepped(optimizer, pruner)), expected_losses())
    assert counter.frame_count == 1
    inputs = torch.randn(5, 8)
    expected = model.eval()(inputs)
    assert torch.equal(pruner.pruned_copy()(inputs), expected)
    pruner.finalize()
    assert torch.equal(model(inputs), expected)


@pytest.mark.parametrize("mode", ["default", "force_eager"])
def test_a_compiled_model_is_finalized(mode):
    model = Network()
    pruner = PDPPruner(model, CONFIG)
    compiled = torch.compile(model, backend="eager")
    pruner.step(3)
    inputs = torch.randn(5, 8)
    with torch.compiler.set_stance(mode):
        expected = compiled.eval()(inputs)
        pruner.finalize()
        assert torch.equal(compiled(inputs), expected)
    assert torch.equal(copy.deepcopy(model)(inputs), expected)


@pytest.mark.parametrize("layer", ["", "blocks.0", "blocks.0.first"])
def test_a_forward_that_code_holds_is_finalized(layer):
    model = Network()
    pruner = PDPPruner(model, CONFIG)
    patched = model.get_submodule(layer)
    patched.forward = functools.partial(patched.forward)  # as accelerate sets one of its own
    pruner.step(3)
    inputs = torch.randn(5, 8)
    expected = model.eval()(inputs)
    pruner.finalize()
    assert torch.equal(model(inputs), expected)


def test_a_pruner_steps_in_a_compiled_function():
    model, optimizer = training()
    counter = CompileCounter()
    step = torch.compile(stepped(optimizer, PDPPruner(model, CONFIG)), backend=counter)
    torch.testing.assert_close(train(model, step), expected_losses())
    graphs = counter.frame_count
    train(model, step)
    assert counter.frame_count == graphs  # none for each progress


def test_a_pruner_is_attached_to_a_compiled_optimizer():
    model, optimizer = training()
    pruner = PDPPruner(model, CONFIG)
    pruner.attach(optimizer, steps_per_epoch=2)
    optimizer_step = torch.compile(lambda: optimizer.step(), backend="eager")

    def step(_):
        optimizer_step()
        optimizer.zero_grad()

    train(model, step)
    assert pruner.progress == 4
    assert abs(pruner.report().sparsity - 0.7) < 1e-3


def test_checkpointed_blocks_are_compiled_with_the_setting_of_the_guide():
    model = Network()
    PDPPruner(model, PDPConfig(0.7, warmup=0, ramp=0))
    inputs = torch.randn(5, 8)
    weights = list(model.parameters())
    expected = torch.autograd.grad(model(inputs).square().sum(), weights)

    def checkpointed(inputs):
        for block in model.blocks:
            inputs = checkpoint(block, inputs, use_reentrant=False)
        return inputs.square().sum()

    compiled = torch.compile(checkpointed, backend="aot_eager", fullgraph=True)
    setting = {"skip_fwd_side_effects_in_bwd_under_checkpoint": True}
    with torch._dynamo.config.patch(setting):
        found = torch.autograd.grad(compiled(inputs), weights)
    torch.testing.assert_close(found, expected)


@torch.compiler.disable
def product(inputs, layer):
    return nn.functional.linear(inputs, layer.weight, layer.bias)


class ReadsInEagerCode(Block):
    def forward(self, inputs):
        return self.last(product(inputs, self.first).relu())


@pytest.mark.parametrize("training", [True, False])
def test_eager_code_in_a_compiled_forward_reads_masked_weights(training):
    model = ReadsInEagerCode().train(training)
    PDPPruner(model, PDPConfig(0.7, warmup=0, ramp=0))
    inputs = torch.randn(5, 8)
    assert torch.equal(torch.compile(model, backend="eager")(inputs), model(inputs))
