"""Wanda prunes the weights of least |W_ij| ||X_j|| in each row, as the paper's equation says."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from pdp_kernels import (
    PDPConfig,
    hard_mask,
    hard_mask_nm,
    prune_one_shot,
)
from tests.support.activations import normal
from tests.support.models import mlp


def columns_of(scores, count):
    """Return the columns of the least scores, by a loop: equal scores in order."""
    return sorted(range(len(scores)), key=lambda column: (scores[column], column))[:count]


def transcription(weight, inputs, sparsity):
    """Return a weight (outputs, inputs) as the paper prunes it, given inputs (vectors, inputs)."""
    weight, inputs = weight.detach().clone(), inputs.double()
    count = math.floor(sparsity * weight.shape[1] + 0.5)
    for row in weight:
        scores = [abs(w.item()) * x.norm(2).item() for w, x in zip(row, inputs.T, strict=True)]
        row[columns_of(scores, count)] = 0
    return weight


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (24,)])
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 1])
def test_wanda_of_a_linear_layer_is_the_paper_equation(shape, sparsity):
    model = nn.Linear(24, 7)
    by_magnitude = hard_mask(model.weight, sparsity)
    batches = [normal(*shape, seed=seed) for seed in range(3)]
    together = torch.cat([batch.reshape(-1, 24) for batch in batches])
    expected = transcription(model.weight, together, sparsity)
    report = prune_one_shot(model, sparsity, method="wanda", calibration=iter(batches))
    assert torch.equal(model.weight, expected)
    assert report.sparsity == pytest.approx(sparsity)
    assert sparsity == 1 or not torch.equal(model.weight != 0, by_magnitude)


def test_each_layer_is_measured_behind_unpruned_ones():
    model = mlp()
    inputs = normal(16, 24)
    hidden = model[1](model[0](inputs))
    expected = [transcription(model[0].weight, inputs, 0.5)]
    expected.append(transcription(model[2].weight, hidden, 0.5))
    prune_one_shot(model, 0.5, method="wanda", calibration=[inputs])
    assert torch.equal(model[0].weight, expected[0])
    assert torch.equal(model[2].weight, expected[1])


def test_a_rest_is_pruned_where_the_next_score_is_least():
    model = nn.Linear(4, 3, bias=False)
    weight = [[1.0, 2.0, 3.0, 4.0], [1.0, -0.5, 5.0, 6.0], [9.0, 7.0, -8.0, 7.5]]
    model.weight.data = torch.tensor(weight)
    # Of 12 weights 5 are pruned: one of each row, and two more where the second score is 1 and 2.
    prune_one_shot(model, 5 / 12, method="wanda", calibration=[torch.ones(2, 4)])
    zeros = [[0, 0, 3, 4], [0, 0, 5, 6], [9, 0, -8, 7.5]]
    assert model.weight.tolist() == zeros


def test_equal_scores_are_pruned_in_order_of_columns_and_rows():
    model = nn.Linear(4, 4, bias=False)
    nn.init.constant_(model.weight, 3.0)
    prune_one_shot(model, 6 / 16, method="wanda", calibration=[torch.ones(1, 4)])
    assert (model.weight == 0).tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [True, False, False, False],
        [True, False, False, False],
    ]


def test_a_dead_input_is_pruned_first():
    model = nn.Linear(4, 2, bias=False)
    inputs = torch.ones(3, 4)
    inputs[:, 2] = 0
    prune_one_shot(model, 0.25, method="wanda", calibration=[inputs])
    assert (model.weight == 0).tolist() == [[False, False, True, False]] * 2


def test_inputs_whose_norms_overflow_are_refused():
    with pytest.raises(ValueError, match="norms are finite in their own dtype"):
        prune_one_shot(nn.Linear(4, 2), 0.5, method="wanda", calibration=[torch.full((4, 4), 2e38)])


def test_a_batch_without_vectors_adds_nothing():
    expected, inputs = mlp(), normal(16, 24)
    model = copy.deepcopy(expected)
    prune_one_shot(expected, 0.5, method="wanda", calibration=[inputs])
    prune_one_shot(model, 0.5, method="wanda", calibration=[inputs[:0], inputs])
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


def test_groups_along_the_inputs_keep_the_largest_scores():
    model, inputs = nn.Linear(24, 8), normal(30, 24)
    scores = model.weight.detach().double().abs() * inputs.double().norm(dim=0)
    expected = model.weight.detach() * hard_mask_nm(scores, 2, 4)
    prune_one_shot(model, PDPConfig(pattern="2:4"), method="wanda", calibration=[inputs])
    assert torch.equal(model.weight, expected)


def test_it_keeps_the_output_better_than_magnitude_where_inputs_differ_in_scale():
    inputs = normal(64, 24)
    errors = {}
    for method in ("magnitude", "wanda"):
        torch.manual_seed(0)
        layer = nn.Linear(24, 32)
        before = layer(inputs)
        given = {"calibration": [inputs]} if method == "wanda" else {}
        prune_one_shot(layer, PDPConfig(0.5, scope="layer"), method=method, **given)
        errors[method] = (layer(inputs) - before).norm().item()
    assert errors["wanda"] < 0.5 * errors["magnitude"]


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3),
    "strides, padding and dilation": nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 1), (1, 3)),
    "same": nn.Conv2d(4, 6, (5, 3), padding="same", dilation=(1, 2)),
    "reflect": nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
    "circular": nn.Conv1d(4, 6, 5, padding=3, stride=2, padding_mode="circular"),
    "groups": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 8, (3, 2), padding=1, groups=4),
    "1d": nn.Conv1d(4, 6, 3, 2, 1),
    "3d": nn.Conv3d(4, 6, 2, 2, 1),
    "transposed": nn.ConvTranspose2d(4, 6, 3, 2, 1),
    "transposed, groups": nn.ConvTranspose2d(4, 6, 3, (2, 1), 1, (1, 0), 2, dilation=(1, 2)),
    "transposed 1d": nn.ConvTranspose1d(4, 6, 4, 3, 2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_wanda_of_a_convolution_takes_patches_for_inputs(name):
    """A weight multiplies some inputs: the gradient of the outputs' sum, at squared inputs."""
    model = copy.deepcopy(CONVOLUTIONS[name])
    batches = [normal(2, 4, *[7] * len(model.kernel_size), scale_dim=1, seed=s) for s in (0, 1)]
    doubled = copy.deepcopy(model).double()
    for batch in batches:
        doubled(batch.double().square()).sum().backward()
    weight = model.weight.detach().clone()
    scores = weight.abs().double() * doubled.weight.grad.sqrt()
    if model.transposed:  # as the rows of a plain convolution
        g = model.groups
        by_group = scores.view(g, 4 // g, 6 // g, -1), weight.view(g, 4 // g, 6 // g, -1)
        rows = [(s[:, o], w[:, o]) for s, w in zip(*by_group, strict=True) for o in range(6 // g)]
    else:
        rows = list(zip(scores, weight, strict=True))
    count = math.floor(0.5 * weight.numel() + 0.5)
    for row, of_weight in rows:
        pruned = columns_of(row.flatten().tolist(), count // len(rows))
        values = of_weight.flatten()
        values[pruned] = 0
        of_weight.copy_(values.view(of_weight.shape))
    assert count % len(rows) == 0
    report = prune_one_shot(model, 0.5, method="wanda", calibration=batches)
    assert report.pruned == count
    assert torch.equal(model.weight, weight)


def test_patches_are_those_of_unfold():
    model = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    inputs = normal(2, 4, 8, 8, scale_dim=1)
    patches = functional.unfold(inputs, 3, stride=2, padding=1).transpose(1, 2).reshape(-1, 36)
    expected = transcription(model.weight.flatten(1), patches, 0.5)
    prune_one_shot(model, 0.5, method="wanda", calibration=[inputs])
    assert torch.equal(model.weight.flatten(1), expected)


def test_a_convolution_takes_one_image_without_a_batch_dimension():
    model, inputs = nn.Conv2d(4, 6, 3), normal(1, 4, 8, 8, scale_dim=1)
    other = copy.deepcopy(model)
    prune_one_shot(model, 0.5, method="wanda", calibration=[inputs[0]])
    prune_one_shot(other, 0.5, method="wanda", calibration=[inputs])
    assert torch.equal(model.weight, other.weight)


def attended(attention, query, key, value):
    """Return the inputs of the output projection, (vectors, embed_dim)."""
    if attention.in_proj_weight is not None:
        weights = attention.in_proj_weight.chunk(3)
    else:
        weights = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    biases = attention.in_proj_bias.chunk(3)
    heads = (
        functional.linear(x, w, b).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    joined = functional.scaled_dot_product_attention(*heads).transpose(1, 2)
    return joined.reshape(-1, attention.embed_dim)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 8, "vdim": 12}])
@pytest.mark.parametrize("by_name", [False, True])
def test_projections_of_an_attention_have_their_own_inputs(sizes, by_name):
    model = nn.MultiheadAttention(16, 2, batch_first=True, **sizes)
    nn.init.normal_(model.in_proj_bias)
    inputs = [
        normal(2, 5, 16),
        normal(2, 6, model.kdim, seed=1),
        normal(2, 6, model.vdim, seed=2),
    ]
    with torch.no_grad():
        before = attended(model, *inputs)
    if sizes:
        names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        parts = [getattr(model, name).detach() for name in names]
    else:
        parts = list(model.in_proj_weight.detach().chunk(3))
    flat = [each.flatten(0, 1) for each in inputs]
    expected = [transcription(w, x, 0.5) for w, x in zip(parts, flat, strict=True)]
    out = transcription(model.out_proj.weight, before, 0.5)
    named = dict(zip(("query", "key", "value"), inputs, strict=True))
    prune_one_shot(model, 0.5, method="wanda", calibration=[named if by_name else tuple(inputs)])
    got = [getattr(model, name) for name in names] if sizes else [model.in_proj_weight]
    assert torch.equal(
        torch.cat([w.flatten() for w in got]), torch.cat([w.flatten() for w in expected])
    )
    assert torch.equal(model.out_proj.weight, out)


def test_the_fused_encoder_layer_is_measured_too():
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True)
    inputs = normal(2, 5, 16)
    expected = transcription(model.self_attn.in_proj_weight, inputs.flatten(0, 1), 0.5)
    report = prune_one_shot(model, 0.5, method="wanda", calibration=[inputs])
    assert len(report.layers) == 4 and report.sparsity == 0.5
    assert torch.equal(model.self_attn.in_proj_weight, expected)
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(layer.training for layer in model.modules())


def test_a_shared_weight_has_the_inputs_of_all_its_layers():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    model[2].weight = model[0].weight
    model.append(model[0])
    inputs = normal(9, 8)
    with torch.no_grad():
        first = model[:2](inputs)
        second = model[:4](inputs)
    expected = transcription(model[0].weight, torch.cat([inputs, first, second]), 0.5)
    prune_one_shot(model, 0.5, method="wanda", calibration=[inputs])
    assert torch.equal(model[0].weight, expected)
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_exactly(dtype):
    """The squares overflow float16, and in a sum of 16 bits the difference is lost."""
    model = nn.Linear(2, 1, bias=False).to(dtype)
    model.weight.data.copy_(torch.tensor([[1.0, 1.0]]))
    inputs = torch.full((65, 2), 300.0, dtype=dtype)
    inputs[0, 0] = 298.0 if dtype == torch.bfloat16 else 299.0
    prune_one_shot(model, 0.5, method="wanda", calibration=[inputs])
    assert model.weight.tolist() == [[0, 1]] and model.weight.dtype == dtype


def test_a_model_that_is_compiled_and_has_run_is_measured():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    inputs = torch.randn(32, 8)
    compiled.eval()(inputs)
    with torch.no_grad():
        compiled(inputs)
    for each in (compiled, plain):
        prune_one_shot(each, 0.5, method="wanda", calibration=[inputs])
    assert torch.equal(model[0].weight, plain[0].weight)
    assert torch.equal(model[2].weight, plain[2].weight)
