"""Networks of timm and Hugging Face lose their dead channels, and give the same outputs."""

import importlib
import sys

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, prune_one_shot
from studies.networks import residual_network

pytest.importorskip("torch_pruning")
pytest.importorskip("timm")
pytest.importorskip("transformers")

import timm
import transformers

from tests.support.channels import randomize, removed_from

IMAGES = [(torch.randn(2, 3, 32, 32),), (torch.randn(3, 3, 32, 32),)]
TOKENS = [{"input_ids": torch.randint(0, 50, (2, 8))} for _ in range(2)]
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {"vocab_size": 50, "num_hidden_layers": 2}


def resnet(block):
    layers = [getattr(timm.models.resnet, block), [1, 1, 1, 1]]
    return timm.models.resnet.ResNet(*layers, num_classes=5, channels=(8, 8, 16, 16), stem_width=8)


def vision_transformer():
    small = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **small)


def mobilenet():
    return timm.create_model("mobilenetv3_small_050", num_classes=5)


def bert():
    config = transformers.BertConfig(**TEXT, **SIZES)
    return transformers.BertForSequenceClassification(config)


def gpt2():
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 12}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, **sizes, **ends))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **SIZES))


def pruned(make, channels, **settings):
    """Return a network with half of the channels of each layer dead."""
    torch.manual_seed(0)
    model = make()
    if not isinstance(model, transformers.PreTrainedModel):
        randomize(model)
    grouped = [n for n, layer in model.named_modules() if getattr(layer, "groups", 1) > 1]
    config = PDPConfig(
        0.5,
        scope="layer",
        pattern="channel",
        channel_dim=channels,
        exclude=grouped if channels == "input" else [],
        **settings,
    )
    prune_one_shot(model, config)
    return model


NETWORKS = {
    "our residual network": (lambda: residual_network(3, [(8, 8, 8), (8, 16, 16)]), IMAGES),
    "ResNet": (lambda: resnet("BasicBlock"), IMAGES),
    "ResNet of bottlenecks": (lambda: resnet("Bottleneck"), IMAGES),
    "ViT": (vision_transformer, IMAGES),
    "BERT": (bert, TOKENS),
    "GPT-2": (gpt2, TOKENS),
    "Llama": (llama, TOKENS),
}


@pytest.mark.parametrize("channels", ["input", "output"])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_stay_and_every_dead_channel_is_removed_or_named(name, channels):
    make, inputs = NETWORKS[name]
    model = pruned(make, channels)
    report = removed_from(model, inputs)
    if channels == "input":  # outputs that are dead are often constants that matter
        assert report.parameters_after < report.parameters_before
        assert report.macs_after < report.macs_before
    named = {}
    for each in report.kept:
        named.setdefault((each.layer, each.side), set()).update(each.channels)
    for layer_name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            dead_outputs, dead_inputs = (
                set(map(int, (layer.weight.transpose(0, dim).flatten(1) == 0).all(1).nonzero()))
                for dim in (0, 1)
            )
            assert named.get((layer_name, "output"), set()) == dead_outputs
            assert named.get((layer_name, "input"), set()) <= dead_inputs


def test_depthwise_convolutions_and_their_gates_shrink():
    model = pruned(mobilenet, "input")
    report = removed_from(model, IMAGES)
    assert report.parameters_after < 0.5 * report.parameters_before
    depthwise = model.blocks[1][0].conv_dw
    assert depthwise.groups == depthwise.in_channels < 48
    assert model.blocks[0][0].se.conv_reduce.in_channels <= 16


@pytest.mark.parametrize(
    "make, layers, weight",
    [
        (bert, "bert.encoder.layer.{}.intermediate.dense", (16, 16)),
        (gpt2, "transformer.h.{}.mlp.c_fc", (16, 32)),
        (llama, "model.layers.{}.mlp.gate_proj", (16, 16)),
    ],
)
def test_mlps_of_language_models_lose_half_of_their_units(make, layers, weight):
    model = make()
    seconds = ("output.dense", "mlp.c_proj", "mlp.down_proj")
    names = [name for name, _ in model.named_modules() if "attention" not in name]
    chosen = [name for name in names if name.endswith(seconds)]
    config = PDPConfig(0.5, scope="layer", pattern="channel", channel_dim="input", include=chosen)
    prune_one_shot(model, config)
    report = removed_from(model, TOKENS)
    assert report.kept == []
    for index in range(2):
        layer = model.get_submodule(layers.format(index))
        assert tuple(layer.weight.shape) == weight
    if make is not bert:
        generated = model.generate(TOKENS[0]["input_ids"], max_new_tokens=3, do_sample=False)
        assert generated.shape == (2, 11)
    model(**TOKENS[0]).logits.square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "mlp" in n)


def test_a_missing_torch_pruning_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    for module in ("torch_pruning", "channel_graph", "channel_groups"):
        monkeypatch.delitem(sys.modules, f"pdp_kernels.integrations.{module}")
    with pytest.raises(ImportError, match=r"needs Torch-Pruning: pip install 'pdp_kernels\[chann"):
        importlib.import_module("pdp_kernels.integrations.torch_pruning")
