"""A configuration chooses the weights that are pruned; a model that cannot be pruned raises."""

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner, prune_one_shot, sensitivity
from tests.support.models import AT_ONCE, mlp, zeros_of


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.conv = nn.Conv1d(4, 4, 3)
        self.up = nn.ConvTranspose2d(4, 4, 3)
        self.norm = nn.LayerNorm([4, 4])
        self.attention = nn.MultiheadAttention(16, 2)
        self.cross = nn.MultiheadAttention(16, 2, kdim=8, vdim=12, add_bias_kv=True)
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.head = nn.Linear(16, 10)


ALL_BY_DEFAULT = [
    "conv.weight",
    "up.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "cross.q_proj_weight",
    "cross.k_proj_weight",
    "cross.v_proj_weight",
    "cross.out_proj.weight",
    "head.weight",
]


@pytest.mark.parametrize(
    "choice, expected",
    [
        ({}, ALL_BY_DEFAULT),
        (
            {"exclude": ["*attention*", "cross*", nn.Conv2d]},
            ["conv.weight", "up.weight", "head.weight"],
        ),
        ({"exclude": [nn.MultiheadAttention]}, ["conv.weight", "up.weight", "head.weight"]),
        ({"exclude": [nn.Sequential, nn.Transformer]}, ALL_BY_DEFAULT),
        ({"exclude": ["MultiheadAttention", "*.weight"]}, None),
        ({"include": [nn.Embedding, "head"]}, ["embedding.weight", "head.weight"]),
        ({"include": ["_ConvNd"]}, ["conv.weight", "up.weight"]),
        ({"include": [nn.MultiheadAttention]}, ALL_BY_DEFAULT[2:8]),
        ({"include": ["bilinear"]}, ["bilinear.weight"]),
        (
            {"include": ["c*"], "exclude": ["cross.?_proj*"]},
            ["conv.weight", "cross.out_proj.weight"],
        ),
        ({"overrides": {"*": None}}, None),
    ],
)
def test_include_and_exclude_choose_the_weights(choice, expected):
    config = PDPConfig(0.5, **AT_ONCE, **choice)
    if expected is None:
        with pytest.raises(ValueError, match=r"model must have a weight.*got a Everything without"):
            PDPPruner(Everything(), config)
        return
    assert list(PDPPruner(Everything(), config).prune_counts) == expected


def test_shared_weights_are_pruned_once():
    model = mlp()
    model.append(nn.Linear(16, 8))
    model[-1].weight = model[4].weight
    model.append(model[0])
    pruner = PDPPruner(model, PDPConfig(0.5, scope="layer", **AT_ONCE))
    assert list(pruner.prune_counts) == ["0.weight", "2.weight", "4.weight"]
    model[5].bias = model[4].bias
    inputs = torch.randn(3, 16)
    assert torch.equal(model[4](inputs), model[5](inputs))
    pruner.finalize()
    assert model[5].weight is model[4].weight
    assert zeros_of(model) == [384, 256, 64]


def test_a_weight_shared_with_an_embedding_is_left_alone_unless_both_are_included():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 16)
            self.body = nn.Linear(16, 16)
            self.head = nn.Linear(16, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.body(self.embedding(tokens)))

    pruner = PDPPruner(Tied(), PDPConfig(0.5, **AT_ONCE))
    assert list(pruner.prune_counts) == ["body.weight"]
    with pytest.raises(ValueError, match=r"include must match all layers that share.*embedding"):
        PDPPruner(Tied(), PDPConfig(0.5, include=["head"], **AT_ONCE))
    model = Tied()
    pruner = PDPPruner(model, PDPConfig(0.5, include=["head", "embedding"], **AT_ONCE))
    tokens = torch.arange(10)
    before = model.eval()(tokens)
    pruner.finalize()
    assert torch.equal(model(tokens), before)
    assert zeros_of(model)[0] == 80


def lazy():
    return nn.Sequential(nn.LazyLinear(4))


def parametrized():
    return nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)))


def scripted():
    return nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Linear(8, 8)))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(4, 16, 8))


def patched():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda inputs: inputs
    return model


def complex_weights():
    return nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64))


def flattened():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.randn(16))
    return model


BAD_MODELS = {
    "nothing": (nn.Sequential(nn.ReLU()), {}, ValueError, "model must have a weight.*Sequential"),
    "only empty": (nn.Linear(0, 4), {}, ValueError, "model must have a weight"),
    "no model": ([], {}, TypeError, "model must be a torch.nn.Module, got list"),
    "lazy": (lazy(), {}, ValueError, "0.weight must have its shape: run the lazy layer"),
    "parametrized": (parametrized(), {}, ValueError, "must hold 0.weight as parameters"),
    "flattened": (flattened(), {}, ValueError, "0.weight must have two dimensions or more"),
    "patched": (patched(), {}, ValueError, "layer '0' must have the forward of its class"),
    "complex": (complex_weights(), {}, TypeError, "model's 0.weight must have dtype.*complex64"),
    "lstm": (nn.LSTM(4, 4), {"include": [nn.LSTM]}, ValueError, "LSTM keeps its weights in a list"),
    "scripted": (
        scripted(),
        {"include": ["*"]},
        ValueError,
        "1.weight cannot be pruned:.*forward of a torch.jit.ScriptModule",
    ),
    "N:M of experts": (
        Experts(),
        {"pattern": "2:4", "sparsity": None, "include": ["gate_up"]},
        ValueError,
        r"gate_up must have the pattern .unstructured.*\(4, 16, 8\) in a Experts: exclude=",
    ),
    "channels of experts": (
        Experts(),
        {"pattern": "channel", "include": ["gate_up"]},
        ValueError,
        "gate_up must have the pattern .unstructured.*inputs and outputs",
    ),
    "groups of 3": (
        nn.Linear(6, 4),
        {"pattern": "2:4", "sparsity": None},
        ValueError,
        "divisible by M = 4",
    ),
    "grouped": (
        nn.Conv2d(4, 4, 3, groups=2),
        {"pattern": "channel", "channel_dim": "input"},
        ValueError,
        "grouped convolution.*exclude=.* leaves out what does not fit",
    ),
    "include": (mlp(), {"include": ["fc*"]}, ValueError, "include must match layers.*'fc\\*'"),
    "include type": (mlp(), {"include": [nn.Conv2d]}, ValueError, "include must match layers"),
    "exclude": (mlp(), {"exclude": ["head"]}, ValueError, "exclude must match layers.*'head'"),
    "exclude around": (
        nn.Sequential(mlp(), nn.Linear(8, 4)),
        {"exclude": [nn.Sequential]},
        ValueError,
        r"exclude must match layers.*Sequential.*: \['\*', '0\.\*'\] match those inside others",
    ),
    "name around": (
        nn.Sequential(mlp(), nn.Linear(8, 4)),
        {"exclude": ["0"]},
        ValueError,
        r"exclude must match layers.*'0' without any: \['0\.\*'\] match those inside others",
    ),
    "override": (mlp(), {"overrides": {"head": None}}, ValueError, "overrides must match.*'head'"),
    "fraction": (
        mlp(),
        {"sparsity": {"7": 1, "*": 0}, "scope": "layer"},
        ValueError,
        "sparsity must match.*'7'",
    ),
    "no fraction": (
        mlp(),
        {"sparsity": {"0": 1}, "scope": "layer"},
        ValueError,
        "a fraction for 2.weight",
    ),
    "cap": (mlp(), {"max_layer_sparsity": 0.4}, ValueError, "max_layer_sparsity must leave 704"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_that_cannot_be_pruned_raises_and_stays(case):
    model, changes, error, message = BAD_MODELS[case]
    config = PDPConfig(**({"sparsity": 0.5} | AT_ONCE | changes))
    before = [type(layer) for layer in model.modules()] if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        PDPPruner(model, config)
    if before is not None:
        assert [type(layer) for layer in model.modules()] == before


def test_layers_of_torchscript_are_left_alone():
    inputs = torch.randn(3, 8)
    for exclude in ((), ["1"]):
        model = scripted()
        pruner = PDPPruner(model, PDPConfig(0.5, exclude=exclude, **AT_ONCE))
        assert list(pruner.prune_counts) == ["0.weight"]
        assert pruner.report().unpruned == [("1", 64)]
        model(inputs).sum().backward()
        before = model.eval()(inputs)
        torch.testing.assert_close(pruner.pruned_copy()(inputs), before)
        pruner.finalize()
        torch.testing.assert_close(model(inputs), before)
    assert prune_one_shot(scripted(), 0.5).pruned == 32
    assert list(sensitivity(scripted(), lambda model: 1.0, [0.5]).values) == ["0.weight"]


def spectral():
    normed = [nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)) for _ in range(2)]
    return nn.Sequential(*normed, nn.Linear(8, 8), nn.Linear(8, 4))


def test_all_parametrized_layers_are_named_with_what_leaves_them_out():
    with pytest.raises(ValueError, match=r"0\.weight, 1\.weight as parameters") as error:
        PDPPruner(spectral(), PDPConfig(0.5, exclude=["3"], **AT_ONCE))
    assert "exclude=['3', '0.weight', '1.weight'] leaves out" in str(error.value)
    config = PDPConfig(0.5, exclude=["3", "0.weight", "1.weight"], **AT_ONCE)
    assert list(PDPPruner(spectral(), config).prune_counts) == ["2.weight"]


def test_the_original_of_a_spectral_norm_is_pruned_exactly():
    torch.manual_seed(0)
    model = spectral()
    config = PDPConfig(0.5, warmup=0, ramp=1, include=["*parametrizations.weight"])
    pruner = PDPPruner(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(16, 8)
    for progress in (0.5, 1.0):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(progress)
    expected = pruner.pruned_copy().eval()(inputs)
    assert torch.equal(model.eval()(inputs), expected)
    pruner.finalize()
    assert torch.equal(model(inputs), expected)
    for layer in model[:2]:
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert sum(int((layer.weight == 0).sum()) for layer in model[:2]) == 64


def test_a_name_with_the_characters_of_a_glob_stands_for_itself():
    model = nn.ModuleDict({"a[0]": nn.Linear(6, 4), "b": nn.Linear(8, 4)})
    with pytest.raises(ValueError, match=r"exclude=\['a\[0\]\.weight'\] leaves out"):
        PDPPruner(model, PDPConfig(None, pattern="2:4", **AT_ONCE))
    for name in ("a[0]", "a[0].weight"):
        pruner = PDPPruner(model, PDPConfig(0.5, exclude=[name], **AT_ONCE))
        assert list(pruner.prune_counts) == ["b.weight"]
