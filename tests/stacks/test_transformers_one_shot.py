"""Hugging Face models are pruned at once by Wanda, from batches as their data loaders give them."""

import math

import pytest
import torch

from pdp_kernels import PDPConfig, check_nm, prune_one_shot

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 50, "num_hidden_layers": 2}
MODELS = {
    "GPT-2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=16, n_head=2, n_layer=2, n_positions=12)
    ),
    "BERT": lambda: transformers.BertModel(
        transformers.BertConfig(
            hidden_size=16, num_attention_heads=2, intermediate_size=32, **SIZES
        ),
        add_pooling_layer=False,
    ),
    "Llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, num_attention_heads=2, intermediate_size=32, **SIZES
        )
    ),
}
WEIGHTS = {"GPT-2": 8, "BERT": 12, "Llama": 15}


def batches():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (3, 2, 8), generator=generator)
    return [transformers.BatchEncoding({"input_ids": each}) for each in tokens]


def expected_masks(model, names):
    """Return what Wanda keeps of half of each row, from inputs that hooks record."""
    inputs = {name: [] for name in names}
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    for handle in handles:
        handle.remove()
    masks = {}
    for name, layer in layers.items():
        weight = layer.weight.detach().double()
        is_transposed = type(layer).__name__ == "Conv1D"
        rows = weight.T if is_transposed else weight
        norms = torch.cat([each.flatten(0, 1) for each in inputs[name]]).double().norm(dim=0)
        scores = rows.abs() * norms
        cut = scores.sort(1).values[:, math.floor(scores.shape[1] / 2)].unsqueeze(1)
        masks[name] = (scores >= cut).T if is_transposed else scores >= cut
    return masks


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_loses_its_least_scores(name, dtype):
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    names = [layer.name for layer in prune_one_shot(model, 0.0).layers]
    masks = expected_masks(model, names)
    report = prune_one_shot(model, 0.5, method="wanda", calibration=batches())
    assert report.sparsity == 0.5 and len(report.layers) == WEIGHTS[name]
    for layer, mask in masks.items():
        assert torch.equal(model.get_parameter(layer) != 0, mask), layer


@pytest.mark.parametrize("name", MODELS)
def test_groups_lie_along_the_inputs(name):
    model = MODELS[name]()
    config = PDPConfig(pattern="2:4")
    report = prune_one_shot(model, config, method="wanda", calibration=batches())
    assert report.sparsity == 0.5
    for layer in report.layers:
        module = model.get_submodule(layer.name.removesuffix(".weight"))
        dim = 0 if type(module).__name__ == "Conv1D" else 1
        assert check_nm(module.weight.detach(), 2, 4, dim).ok, layer.name
