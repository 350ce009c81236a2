"""ONNX and torch.export: a pruned copy and a finalized model export, with their zeros."""

import copy

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner
from tests.support.models import AT_ONCE

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        tokens = self.conv(images).relu().flatten(2).transpose(1, 2)
        tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(tokens.mean(1))


IMAGES = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def pruned_network(**settings):
    model = Network()
    return model, PDPPruner(model, PDPConfig(**({"sparsity": 0.7} | AT_ONCE | settings)))


def zeros_in(path):
    """Return the number of zeros in all matrices of a file."""
    arrays = map(onnx.numpy_helper.to_array, onnx.load(path).graph.initializer)
    return sum(int((each == 0).sum()) for each in arrays if each.ndim >= 2)


def run(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


@pytest.mark.parametrize(
    "pattern, source",
    [("unstructured", "pruned copy"), ("2:4", "pruned copy"), ("2:4", "finalized")],
)
def test_a_pruned_model_exports_with_its_zeros(source, pattern, tmp_path):
    settings = {"sparsity": None, "pattern": "2:4", "exclude": ["conv"]} if pattern == "2:4" else {}
    model, pruner = pruned_network(**settings)
    expected = model.eval()(IMAGES)
    exported = pruner.pruned_copy()
    if source == "finalized":
        pruner.finalize()
        exported = model
    report = pruner.report()
    path = tmp_path / "model.onnx"
    torch.onnx.export(exported.eval(), (IMAGES,), path, dynamo=True, external_data=False)
    torch.testing.assert_close(run(path, IMAGES), expected.detach(), rtol=1e-4, atol=1e-5)
    assert zeros_in(path) >= report.pruned > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dynamo", [True, False])
def test_exporting_the_masks_to_onnx_says_what_to_export(dynamo, training, tmp_path):
    model, pruner = pruned_network()
    model.train(training)
    mode = torch.onnx.TrainingMode.PRESERVE
    message = r"cannot export the masks of PDPPruner: export pruner\.pruned_copy\(\), or the model"
    with pytest.raises(Exception, match=message):
        torch.onnx.export(model, (IMAGES,), tmp_path / "m.onnx", dynamo=dynamo, training=mode)
    assert not torch.onnx.is_in_onnx_export()
    pruner.step(1.0)  # and the training goes on
    model(IMAGES).sum().backward()


def test_a_masked_model_exports_by_torch_export_where_the_package_is_installed(tmp_path):
    model, pruner = pruned_network()
    model.eval()
    path = tmp_path / "masked.pt2"
    torch.export.save(torch.export.export(model, (IMAGES,)), path)
    loaded = torch.export.load(path).module()
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES))
    pruner.step(1.0)


@pytest.mark.parametrize("source", ["pruned copy", "finalized"])
def test_a_pruned_model_exports_by_torch_export_without_the_package(source):
    model, pruner = pruned_network()
    expected = model.eval()(IMAGES)
    exported = pruner.pruned_copy()
    if source == "finalized":
        pruner.finalize()
        exported = model
    program = torch.export.export(exported, (IMAGES,))
    torch.testing.assert_close(program.module()(IMAGES), expected)
    assert not [node for node in program.graph.nodes if "pdp" in str(node.target)]
    zeros = sum(int((weight == 0).sum()) for weight in program.state_dict.values())
    assert zeros >= pruner.report().pruned


def test_a_model_exports_in_mid_training_and_trains_on(tmp_path):
    model, pruner = pruned_network(warmup=0, ramp=2)
    twin = copy.deepcopy(model)
    follows = PDPPruner(twin, pruner.config)
    for step in range(4):
        for each, its_pruner in ((model, pruner), (twin, follows)):
            each(IMAGES).square().mean().backward()
            with torch.no_grad():
                for weight in each.parameters():
                    weight -= 0.1 * weight.grad
                    weight.grad = None
            its_pruner.step((step + 1) / 2)
        if step in (0, 3):
            path = tmp_path / f"{step}.onnx"
            torch.onnx.export(pruner.pruned_copy().eval(), (IMAGES,), path, external_data=False)
    pruner.finalize()
    follows.finalize()
    for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(weight, other)
    assert zeros_in(tmp_path / "0.onnx") < zeros_in(tmp_path / "3.onnx")
