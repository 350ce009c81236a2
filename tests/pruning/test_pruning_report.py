"""A report counts pruned weights, soft masks, flips and multiply-accumulates."""

import json
import math
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from pdp_kernels import PDPConfig, PDPPruner, pdp_mask


def pruned(model, **settings):
    return PDPPruner(model, PDPConfig(**({"warmup": 0, "ramp": 0} | settings)))


def test_every_layer_and_the_total_are_counted(device):
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 8)).to(device)
    pruner = pruned(model, sparsity=0.75, relative_tau=0.2)
    report = pruner.report()
    for layer, module in zip(report.layers, model, strict=True):
        weight = module.weight.detach()
        threshold = module.pdp_masks["weight"].threshold
        _, mask = pdp_mask(weight, threshold=threshold, relative_tau=0.2, return_mask=True)
        assert layer.shape == tuple(weight.shape) and layer.weights == weight.numel()
        assert layer.pruned == pruner.prune_counts[layer.name] == int((mask < 0.5).sum())
        assert layer.threshold == float(threshold)
        assert layer.soft == pytest.approx(float(((mask > 0.1) & (mask < 0.9)).double().mean()))
        assert (layer.flipped, layer.macs, layer.kept_macs) == (None, None, None)
    assert report.weights == 1024 and report.pruned == 768 and report.sparsity == 0.75
    assert sum(report.mask_histogram) == 1024
    assert report.mask_histogram[0] > 0 and report.mask_histogram[-1] > 0
    pruner.finalize()
    after = pruner.report()
    assert [layer.pruned for layer in after.layers] == [layer.pruned for layer in report.layers]
    assert [layer.flipped for layer in after.layers] == [0, 0]
    assert all(layer.threshold is None and layer.soft is None for layer in after.layers)
    assert after.mask_histogram == []


def test_flips_are_counted_since_the_report_before():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    pruner = pruned(model, sparsity=0.5)
    assert pruner.report().flips == []
    pruner.step(1)
    assert pruner.report().layers[0].flipped == 0
    model.weight.data = torch.tensor([[3.0, 2.0, 1.0, 4.0]])
    pruner.step(2)
    report = pruner.report()
    assert report.layers[0].flipped == 2
    assert report.flips == [(1, 0.0), (2, 0.5)]


def test_flips_are_counted_across_a_move_to_another_device(device):
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    pruner = pruned(model, sparsity=0.5)
    pruner.report()
    model.to(device)
    model.weight.data = torch.tensor([[3.0, 2.0, 1.0, 4.0]], device=device)
    pruner.step(1)
    assert pruner.report().layers[0].flipped == 2
    pruner.finalize()
    model.to("cpu")
    assert pruner.report().layers[0].flipped == 0


@pytest.mark.parametrize("pattern", ["channel", "1:4"])
def test_channels_and_groups_count_weights(pattern):
    model = nn.Conv2d(8, 4, 3)
    report = pruned(model, sparsity=0.5 if pattern == "channel" else None, pattern=pattern).report()
    (layer,) = report.layers
    assert layer.pattern == pattern
    assert layer.pruned == (144 if pattern == "channel" else 216)
    assert (layer.threshold is None) == (pattern == "1:4")
    assert sum(report.mask_histogram) == 288


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 2)
        self.linear = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, images, keys, values):
        features = self.up(self.conv(images)).flatten(2).transpose(1, 2)
        tokens = self.norm(self.linear(features))
        tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.cross(tokens, keys, value=values, need_weights=False)[0]


def test_multiply_accumulates_equal_those_by_hand():
    model = Network()
    pruner = pruned(model, sparsity=0.5, scope="layer")
    inputs = torch.randn(3, 2, 9, 9), torch.randn(3, 5, 6), torch.randn(3, 5, 2)
    report = pruner.report(inputs)
    tokens, positions = 5 * 5, 4 * 4
    macs = {
        "conv.weight": 3 * positions * 4 * 1 * 9,
        "up.weight": 3 * positions * 4 * 6 * 4,
        "linear.weight": 3 * tokens * 6 * 8,
        "attention.in_proj_weight": 3 * tokens * 3 * 8 * 8,
        "attention.out_proj.weight": 3 * tokens * 8 * 8,
        "cross.q_proj_weight": 3 * tokens * 8 * 8,
        "cross.k_proj_weight": 3 * 5 * 6 * 8,
        "cross.v_proj_weight": 3 * 5 * 2 * 8,
        "cross.out_proj.weight": 3 * tokens * 8 * 8,
    }
    assert {layer.name: layer.macs for layer in report.layers} == macs
    attention = 3 * 2 * tokens * 8 * tokens + 3 * 2 * tokens * 8 * 5
    assert report.macs == sum(macs.values()) + attention
    assert report.kept_macs == sum(macs.values()) // 2 + attention
    assert model.training and model.cross.training
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_looked_up_embedding_multiplies_nothing():
    model = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 4))
    pruner = pruned(model, sparsity=0.5, scope="layer", include=[nn.Embedding, nn.Linear])
    report = pruner.report(torch.arange(6))
    assert [layer.macs for layer in report.layers] == [0, 6 * 16 * 4]


class Pair(nn.Bilinear):
    def forward(self, x):
        return super().forward(x, x)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return x @ self.matrix.T, self.matrix.sum()


class Experts(nn.Module):
    """Sends each vector to two of four experts, by a grouped product of torch."""

    def __init__(self):
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(4, 6, 8))

    def forward(self, x):
        ends = torch.tensor([2, 2, 7, 10], dtype=torch.int32)
        return functional.grouped_mm(x.repeat(2, 1), self.matrices.mT, offs=ends)[: len(x)]


class Pooling(nn.Module):
    """Multiplies a matrix with a vector."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(30, 8))

    def forward(self, x):
        return (self.matrix @ x[0]).view(5, 6)


@pytest.mark.parametrize(
    ("layer", "products"),
    [
        (Experts(), 2 * 8 * 6),
        (Pooling(), 8 * 6),
        (Pair(8, 8, 6), 8 * 8 * 6),
        (nn.LSTMCell(8, 6), 4 * 6 * (8 + 6)),
        (nn.GRUCell(8, 6), 3 * 6 * (8 + 6)),
        (Scaled(), 8 * 6),
    ],
)
def test_layers_of_other_types_count_their_products(layer, products):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            hidden = self.layer(x)
            return self.head(hidden[0] if isinstance(hidden, tuple) else hidden)

    include = [nn.Linear, type(layer)]
    pruner = pruned(Network(), sparsity=0.5, scope="layer", include=include)
    report = pruner.report(torch.randn(5, 8))
    assert sum(layer.macs for layer in report.layers) == 5 * (products + 6 * 4)
    assert report.macs == 2 * report.kept_macs == 5 * (products + 6 * 4)


def test_grouped_products_count_as_their_groups_do():
    class Groups(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 4)

        def forward(self, a, b, ends):
            offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
            return functional.grouped_mm(a, b, offs=offsets)

    pruner = pruned(Groups(), sparsity=0.5)
    rows = torch.randn(12, 8), torch.randn(3, 8, 4), [2, 9, 12]
    columns = torch.randn(3, 4, 8), torch.randn(8, 12), [4, 8, 12]
    summed = torch.randn(4, 16), torch.randn(16, 8), [8, 8, 16]
    batch = torch.randn(3, 4, 8), torch.randn(3, 8, 4), None
    products = [pruner.report(inputs).macs for inputs in (rows, columns, summed, batch)]
    assert products == [12 * 8 * 4, 4 * 8 * 12, 4 * 16 * 8, 3 * 4 * 8 * 4]


def test_a_layer_may_be_called_with_a_part_of_a_parameter():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(6, 8)
            self.project = nn.Linear(8, 4)

        def forward(self, x):
            return x @ self.project(self.embedding.weight[0:6, :]).T

    report = pruned(Positions(), sparsity=0.5).report(torch.randn(3, 4))
    assert report.macs == 6 * 8 * 4 + 3 * 4 * 6


def test_weights_beside_other_layers_count_no_products():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.randn(1, 1, 8))
            self.norm = nn.LayerNorm((3, 8))
            self.body = nn.Linear(8, 4)

        def forward(self, x):
            return self.body(self.norm(torch.cat([self.first.expand(len(x), 1, 8), x], 1)))

    pruner = pruned(Tokens(), sparsity=0.5, scope="layer", include=["first", "norm", "body"])
    report = pruner.report(torch.randn(5, 2, 8))
    macs = {layer.name: layer.macs for layer in report.layers}
    assert macs == {"first": 0, "norm.weight": 0, "norm.bias": 0, "body.weight": 5 * 3 * 8 * 4}
    assert report.macs == 2 * report.kept_macs == 5 * 3 * 8 * 4


def test_plot_names_the_package_it_misses(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = pruned(nn.Sequential(nn.Linear(24, 8)), sparsity=0.5).report()
    with pytest.raises(ImportError, match="plot needs matplotlib: pip install matplotlib"):
        report.plot(tmp_path / "report.png")


def test_table_plain_data_and_plot_show_the_counts(tmp_path):
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 8))
    pruner = pruned(model, sparsity=0.75)
    pruner.report()
    pruner.step(1)
    report = pruner.report(torch.randn(2, 24))
    lines = str(report).splitlines()
    assert lines[0].split()[:4] == ["weight", "shape", "pattern", "pruned"]
    assert [line.split()[0] for line in lines[1:4]] == ["0.weight", "1.weight", "total"]
    assert "768" in lines[3] and "75.0000%" in lines[3]
    assert lines[4] == "multiply-accumulates: 512 of 2,048 (25.00%)"
    data = json.loads(json.dumps(report.as_dict()))
    assert data["layers"][0]["name"] == "0.weight" and data["macs"] == 2048
    assert math.isfinite(data["layers"][0]["threshold"])
    pytest.importorskip("matplotlib")
    for name, drawn in (("during.png", report), ("after.png", None)):
        if drawn is None:
            pruner.finalize()
            drawn = pruner.report()
        drawn.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 5, 16))
        self.embedding = nn.Embedding(10, 16)
        self.lstm = nn.LSTM(16, 16, num_layers=2)
        self.norm = nn.LayerNorm(16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.old = nn.utils.parametrizations.weight_norm(nn.Linear(16, 4))


def test_the_report_names_what_the_pruner_leaves_alone():
    model = Mixed()
    pruner = pruned(model, sparsity=0.5, exclude=["old"])
    expected = [
        ("positions", 80),
        ("embedding", 160),
        ("lstm", 4 * 4 * 16 * 16),
        ("old.parametrizations.weight.original0", 4),
        ("old.parametrizations.weight.original1", 64),
    ]
    assert pruner.report().unpruned == expected
    assert str(pruner.report()).splitlines()[-1] == (
        "not pruned: lstm (4,096 weights), embedding (160 weights), positions (80 weights), "
        "old.parametrizations.weight.original1 (64 weights), "
        "old.parametrizations.weight.original0 (4 weights)"
    )
    assert json.loads(json.dumps(pruner.report().as_dict()))["unpruned"][1] == ["embedding", 160]
    assert not [name for name in pruner.report().scalars() if "lstm" in name]
    pruner.finalize()
    assert pruner.report().unpruned == expected
    everything = pruned(nn.Linear(4, 4), sparsity=0.5).report()
    assert everything.unpruned == [] and "not pruned" not in str(everything)


def test_a_long_list_of_unpruned_layers_is_cut():
    layers = nn.ModuleList(nn.Linear(4, 2 + index) for index in range(10))
    report = pruned(layers, sparsity=0.5, include=["0"]).report()
    assert len(report.unpruned) == 9
    line = str(report).splitlines()[-1]
    assert line.startswith("not pruned: 9 (44 weights), 8 (40 weights), ")
    assert line.endswith("4 (24 weights), 3 more (48 weights)")


def test_the_report_names_pruned_weights_that_do_not_train():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))
    pruner = pruned(model, sparsity=0.5)
    assert pruner.report().frozen == [] and "without training" not in str(pruner.report())
    model[:2].requires_grad_(False)
    assert pruner.report().frozen == ["0.weight", "1.weight"]
    line = "pruned without training (requires_grad=False): 0.weight, 1.weight"
    assert str(pruner.report()).splitlines()[-1] == line
    model.requires_grad_(False)
    assert str(pruner.report()).endswith("5.weight, 2 more")


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}])
def test_recurrent_layers_count_whether_their_kernels_are_fused_or_not(layer, options):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(8, 8)
            self.recurrent = layer(8, 16, **options, batch_first=True)
            self.head = nn.Linear(16 * (2 if options else 1), 4)

        def forward(self, x):
            return self.head(self.recurrent(self.cell(x.flatten(0, 1)).view_as(x))[0])

    model = Reader()
    report = pruned(model, sparsity=0.5, scope="layer").report(torch.randn(2, 7, 8))
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    assert report.macs == 2 * 7 * sum(matrix.numel() for matrix in matrices)


def test_packed_sequences_count_their_steps():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = nn.LSTM(8, 16)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, [7, 3])
            return self.head(self.recurrent(packed)[0].data)

    report = pruned(Reader(), sparsity=0.5, scope="layer").report(torch.randn(7, 2, 8))
    assert report.macs == 10 * (4 * 16 * (8 + 16) + 16 * 4)


def test_layers_may_be_called_by_keyword():
    class Upscaler(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)

        def forward(self, x):
            return self.up(input=x)

    (layer,) = pruned(Upscaler(), sparsity=0.5).report(torch.randn(3, 4, 5, 5)).layers
    assert layer.macs == 3 * 25 * 4 * 6 * 4


def test_a_compiled_model_is_counted_without_a_warning(recwarn):
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 8))
    pruner = pruned(torch.compile(model, backend="eager"), sparsity=0.75)
    assert pruner.report(torch.randn(3, 24)).macs == 3 * (24 * 32 + 32 * 8)
    assert not recwarn.list


def test_a_report_after_finalize_takes_smaller_layers_and_no_others():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    pruner = pruned(model, sparsity=0.5, pattern="channel", exclude=["2"])
    pruner.report()
    pruner.finalize()
    model[0].weight = nn.Parameter(model[0].weight[model[0].weight.any(1)])  # no dead channels
    report = pruner.report()
    assert report.layers[0].shape == (8, 8)
    assert report.layers[0].flipped is None
    model[0] = nn.Linear(8, 8)
    with pytest.raises(RuntimeError, match="no longer has the layer"):
        pruner.report()
