"""A configuration chooses the weights that are pruned; a model that cannot be pruned raises."""

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner
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
    "parametrized": (parametrized(), {}, ValueError, "must hold 0.weight as a parameter"),
    "flattened": (flattened(), {}, ValueError, "0.weight must have two dimensions or more"),
    "patched": (patched(), {}, ValueError, "layer '0' must have the forward of its class"),
    "complex": (complex_weights(), {}, TypeError, "model's 0.weight must have dtype.*complex64"),
    "lstm": (nn.LSTM(4, 4), {"include": [nn.LSTM]}, ValueError, "LSTM keeps its weights in a list"),
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
