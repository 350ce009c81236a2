"""A model with a pruner stays an ordinary model: copies, checkpoints, compilers, optimizers."""

import copy
import io
import pickle
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional

from pdp_kernels import PDPConfig, PDPPruner, hard_mask, pdp_mask
from tests.support.models import AT_ONCE, outputs, two_layers, two_pruned_layers


def assert_same_outputs(model, other):
    inputs = torch.randn(5, 24)
    for own, others in zip(outputs(model, inputs), outputs(other, inputs), strict=True):
        assert torch.equal(own, others)


def test_state_dict_keys_and_values_are_those_of_the_plain_model():
    plain = two_layers()
    expected = {name: value.clone() for name, value in plain.state_dict().items()}
    PDPPruner(plain, PDPConfig(0.7, **AT_ONCE))
    plain(torch.randn(3, 24))
    state = plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    two_layers().load_state_dict(state)


def test_loading_a_state_dict_by_assignment_is_followed():
    model, other = two_layers(), two_layers()
    pruner = PDPPruner(model, PDPConfig(0.7, scope="layer", **AT_ONCE))
    model.load_state_dict(other.state_dict(), assign=True)
    pruner.step(1)
    assert_same_outputs(model, PDPPruner(other, pruner.config).model)


def test_deepcopy_is_independent():
    model, pruner = two_pruned_layers()
    twin = copy.deepcopy(model)
    assert_same_outputs(model, twin)
    inputs = torch.randn(5, 24)
    before = outputs(twin, inputs)
    with torch.no_grad():
        model[0].weight.normal_()
    pruner.step(2)
    pruner.finalize()
    for now, then in zip(outputs(twin, inputs), before, strict=True):
        assert torch.equal(now, then)
    assert twin[0].weight is not model[0].weight


def test_pickled_and_saved_models_stay_masked():
    model, _ = two_pruned_layers()
    assert_same_outputs(model, pickle.loads(pickle.dumps(model)))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert_same_outputs(model, loaded)
    PDPPruner(loaded, PDPConfig(0.7, **AT_ONCE)).finalize()
    assert [type(layer) for layer in loaded] == [nn.Linear, nn.ReLU, nn.Linear]


def test_a_copy_or_a_loaded_model_can_be_pruned_on():
    model, pruner = two_pruned_layers()
    loaded = pickle.loads(pickle.dumps(model))
    goes_on = PDPPruner(loaded, pruner.config)
    goes_on.load_state_dict(pruner.state_dict())
    assert_same_outputs(model, loaded)
    pruner.finalize()
    goes_on.finalize()
    assert torch.equal(model[0].weight, loaded[0].weight)


class Tagged(nn.Linear):
    """A user's subclass of a layer, with its own forward and state."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        return functional.linear(inputs, self.weight * 2)


def test_subclasses_of_layers_keep_their_forward_and_their_pickle():
    model = Tagged(24, 8)
    PDPPruner(model, PDPConfig(0.5, relative_tau=0.1, **AT_ONCE))
    assert isinstance(model, Tagged)
    inputs = torch.randn(3, 24)
    soft = pdp_mask(model.weight, 0.5, relative_tau=0.1)
    assert torch.equal(model(inputs), functional.linear(inputs, soft * 2))
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded.calls == model.calls == 1
    assert torch.equal(loaded(inputs), model(inputs))


def test_the_masked_weight_is_seen_inside_forward_alone():
    model = nn.Linear(24, 8)
    PDPPruner(model, PDPConfig(0.5, **AT_ONCE))
    parameter, seen = model.weight, []
    model.register_forward_pre_hook(lambda *_: seen.append(model.weight))
    model.register_forward_hook(lambda *_: seen.append(model.weight))
    model(torch.randn(3, 24))
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 23))
    assert isinstance(parameter, nn.Parameter)
    assert all(weight is parameter for weight in (*seen, model.weight))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["joint", "separate"])
def test_attention_computes_with_masked_projections(kind, training):
    """Attention reads its output projection's weight without calling that layer."""
    torch.manual_seed(0)
    sizes = {"kdim": 6, "vdim": 10} if kind == "separate" else {}
    model = nn.MultiheadAttention(16, 2, batch_first=True, **sizes).train(training)
    expected = copy.deepcopy(model)
    pruner = PDPPruner(model, PDPConfig(0.5, scope="layer", relative_tau=0.1, **AT_ONCE))
    for name, weight in expected.named_parameters():
        if name in pruner.prune_counts:
            soft = pdp_mask(weight.detach(), 0.5, relative_tau=0.1)
            weight.data = soft if training else weight.detach() * hard_mask(weight, 0.5)
    inputs = [
        torch.randn(2, 5, size) for size in (16, sizes.get("kdim", 16), sizes.get("vdim", 16))
    ]
    assert len(pruner.prune_counts) == (2 if kind == "joint" else 4)
    torch.testing.assert_close(model(*inputs)[0], expected(*inputs)[0])
    with torch.no_grad():  # a path of its own in inference
        torch.testing.assert_close(model(*inputs)[0], expected(*inputs)[0])
    pruner.finalize()
    assert type(model.out_proj) is type(expected.out_proj)


def test_attention_may_have_an_output_projection_that_is_not_pruned():
    model = nn.MultiheadAttention(16, 2, batch_first=True)
    expected = copy.deepcopy(model)
    PDPPruner(model, PDPConfig(0.5, exclude=["out_proj"], relative_tau=0.1, **AT_ONCE))
    with torch.no_grad():
        expected.in_proj_weight.copy_(pdp_mask(expected.in_proj_weight, 0.5, relative_tau=0.1))
    inputs = torch.randn(2, 5, 16)
    torch.testing.assert_close(
        model(inputs, inputs, inputs)[0], expected(inputs, inputs, inputs)[0]
    )


def test_an_encoder_layer_is_masked_in_its_inference_path_too():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    pruner = PDPPruner(model, PDPConfig(0.5, **AT_ONCE))
    inputs = torch.randn(2, 5, 16)
    model.eval()
    with_gradients = model(inputs)
    with torch.no_grad():
        without = model(inputs)
    torch.testing.assert_close(without, with_gradients)
    pruner.finalize()
    assert type(model) is nn.TransformerEncoderLayer
    torch.testing.assert_close(model(inputs), with_gradients)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), with_gradients)


@pytest.mark.parametrize("layer", [nn.ConvTranspose1d(6, 4, 3), nn.Conv1d(6, 4, 3)])
def test_convolutions_and_their_transposes_are_masked(layer):
    expected = copy.deepcopy(layer)
    expected.weight.data = pdp_mask(layer.weight.detach(), 0.5, relative_tau=0.1)
    PDPPruner(layer, PDPConfig(0.5, relative_tau=0.1, **AT_ONCE))
    inputs = torch.randn(2, 6, 9)
    assert torch.equal(layer(inputs), expected(inputs))


def test_hugging_faces_conv1d_is_a_linear_with_a_transposed_weight(monkeypatch):
    """A copy of the class, so that the test needs no transformers."""

    class Conv1D(nn.Module):
        def __init__(self, outputs, inputs):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(inputs, outputs))
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight)

    Conv1D.__module__ = "transformers.pytorch_utils"
    module = types.ModuleType("transformers.pytorch_utils")
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
    model = nn.Sequential(Conv1D(6, 8))
    pruner = PDPPruner(model, PDPConfig(pattern="2:4", **AT_ONCE))
    pruner.finalize()
    assert torch.all((model[0].weight != 0).unflatten(0, (-1, 4)).sum(1) == 2)


def test_functional_call_computes_with_what_it_is_given():
    model, _ = two_pruned_layers()
    replaced = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    inputs = torch.randn(3, 24)
    threshold = model[0].pdp_masks["weight"].threshold
    given = torch.func.functional_call(model, replaced, inputs)
    masked = [
        pdp_mask(
            replaced[f"{index}.weight"],
            threshold=model[index].pdp_masks["weight"].threshold,
            relative_tau=model[index].pdp_masks["weight"].tau,
        )
        for index in (0, 2)
    ]
    hidden = functional.relu(functional.linear(inputs, masked[0], replaced["0.bias"]))
    assert torch.equal(given, functional.linear(hidden, masked[1], replaced["2.bias"]))
    assert torch.isfinite(threshold)


@pytest.mark.parametrize("pattern", ["unstructured", "channel"])
def test_a_compiled_training_step_is_one_graph_for_all_of_the_schedule(pattern):
    torch._dynamo.reset()
    model = two_layers()
    config = PDPConfig(0.7, pattern=pattern, warmup=1, ramp=2)
    pruner = PDPPruner(model, config)
    reference = copy.deepcopy(model)
    follows = PDPPruner(reference, config)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for step in range(12):
        inputs = torch.randn(5, 24)
        loss, expected = compiled(inputs).square().mean(), reference(inputs).square().mean()
        torch.testing.assert_close(loss, expected)
        for each, its_loss, its_pruner in ((model, loss, pruner), (reference, expected, follows)):
            its_loss.backward()
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
            its_pruner.step(step / 3)
    assert len(graphs) == 1
    assert pruner.config.ramp_at(pruner.progress) == 1


def test_a_compiled_n_m_step_is_compiled_once():
    torch._dynamo.reset()
    model = two_layers()
    pruner = PDPPruner(model, PDPConfig(pattern="2:4", warmup=1, ramp=4, ramp_shape="linear"))
    graphs = []
    compiled = torch.compile(
        model, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward
    )
    for step in range(20):
        inputs = torch.randn(5, 24)
        found = compiled(inputs)
        assert torch.equal(found, model(inputs))
        found.sum().backward()
        pruner.step(step / 3)
    assert len(graphs) == 1
    assert pruner.report().sparsity == 0.5


def test_inductor_compiles_training_and_evaluation():
    torch._dynamo.reset()
    model, pruner = two_pruned_layers()
    compiled = torch.compile(model, fullgraph=True)
    inputs = torch.randn(5, 24)
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(compiled(inputs), model(inputs))
    compiled(inputs).sum().backward()
    assert model[0].weight.grad is not None
    pruner.finalize()
    torch.testing.assert_close(compiled(inputs), model(inputs))


def test_the_finalized_model_exports():
    model, pruner = two_pruned_layers()
    pruner.finalize()
    inputs = torch.randn(5, 24)
    exported = torch.export.export(model.eval(), (inputs,)).module()
    torch.testing.assert_close(exported(inputs), model(inputs))
    assert not [node for node in exported.graph.nodes if "pdp" in str(node.target)]


def test_autocast_masks_in_the_low_precision(device):
    model = two_layers().to(device)
    PDPPruner(model, PDPConfig(0.7, **AT_ONCE))
    seen = []
    matmul = functional.linear

    def linear(inputs, weight, bias=None):
        seen.append(weight.dtype)
        return matmul(inputs, weight, bias)

    with pytest.MonkeyPatch.context() as patch, torch.autocast(device, torch.bfloat16):
        patch.setattr(functional, "linear", linear)
        model(torch.randn(5, 24, device=device)).sum().backward()
    assert seen == [torch.bfloat16] * 2
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_a_step_that_a_grad_scaler_skips_does_not_count(device):
    model = two_layers().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = PDPPruner(model, PDPConfig(0.7, warmup=0, ramp=1))
    pruner.attach(optimizer, steps_per_epoch=10)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    for overflows, steps in ((False, 1), (True, 1), (False, 2)):
        inputs = torch.full((5, 24), float("inf")) if overflows else torch.randn(5, 24)
        with torch.autocast(device, torch.bfloat16):
            loss = model(inputs.to(device)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert pruner.progress == steps / 10


def test_gradients_accumulate_over_microbatches():
    model, _ = two_pruned_layers()
    inputs = torch.randn(8, 24, dtype=torch.float64)
    model.double()
    expected = torch.autograd.grad(model(inputs).sum(), list(model.parameters()))
    for microbatch in inputs.split(2):
        model(microbatch).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_several_optimizers_may_step():
    model = two_layers()
    pruner = PDPPruner(model, PDPConfig(0.7, warmup=0, ramp=1))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    last = torch.optim.AdamW(model[2].parameters(), lr=0.01)
    pruner.attach(last, steps_per_epoch=4)
    for _ in range(4):
        model(torch.randn(5, 24)).square().mean().backward()
        first.step()
        last.step()
        # The thresholds are those of the weights after both.
        fresh = PDPPruner(copy.deepcopy(model), pruner.config)
        fresh.load_state_dict(pruner.state_dict())
        fresh.step(pruner.progress)
        assert_same_outputs(fresh.model, model.train())
    assert pruner.progress == 1


def test_a_model_that_moves_takes_its_masks_along(device):
    model, pruner = two_pruned_layers()
    expected = outputs(model, torch.ones(1, 24))
    model.to(device, torch.float64)
    inputs = torch.ones(1, 24, dtype=torch.float64, device=device)
    for now, then in zip(outputs(model, inputs), expected, strict=True):
        torch.testing.assert_close(now.cpu().float(), then)
    pruner.step(1)
    assert model[0].pdp_masks["weight"].threshold.dtype == torch.float64
    pruner.finalize()
    assert sum(int((model[index].weight == 0).sum()) for index in (0, 2)) == 717


def test_checkpointed_layers_are_masked_when_they_run_again():
    from torch.utils.checkpoint import checkpoint

    model, _ = two_pruned_layers()
    inputs = torch.randn(5, 24)
    plain = torch.autograd.grad(model(inputs).sum(), list(model.parameters()))
    again = torch.autograd.grad(
        checkpoint(model, inputs, use_reentrant=False).sum(), list(model.parameters())
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    ("trace", "refusal"),
    [
        (torch.jit.script, r"torch\.jit\.script cannot compile.*pruned_copy\(\)"),
        (torch.fx.symbolic_trace, r"torch\.fx cannot trace.*pruned_copy\(\)"),
    ],
)
def test_masks_cannot_be_traced(trace, refusal):
    model, pruner = two_pruned_layers()
    with pytest.raises(RuntimeError, match=refusal):
        trace(model)
    traced = trace(pruner.pruned_copy())
    inputs = torch.ones(1, 24)
    assert torch.equal(traced(inputs), model.eval()(inputs))
    assert len(list(traced.parameters())) == len(list(model.parameters()))
