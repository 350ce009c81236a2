"""torchao: quantization comes after pruning; low-bit optimizers train pruned weights."""

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner, check_nm, freeze_zeros
from tests.support.models import AT_ONCE, take_steps

pytest.importorskip("torchao")

from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.optim import Adam8bit, AdamW4bit, AdamW8bit, AdamWFp8
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    quantize_,
)
from torchao.quantization.qat import QATConfig
from torchao.sparsity import semi_sparse_weight, sparsify_

INT4 = Int8DynamicActivationIntxWeightConfig(
    weight_dtype=torch.int4, weight_granularity=PerGroup(32)
)
QUANTIZED = {
    "int8 weights": Int8WeightOnlyConfig(),
    "int8 weights and activations": Int8DynamicActivationInt8WeightConfig(),
    "int4 weights": INT4,
    "asymmetric int4 weights": IntxWeightOnlyConfig(
        torch.int4, PerGroup(32), mapping_type=MappingType.ASYMMETRIC
    ),
    "float8 weights": Float8WeightOnlyConfig(),
}
OPTIMIZERS = {each.__name__: each for each in (AdamW8bit, AdamW4bit, AdamWFp8, Adam8bit)}


def mlp(bias=True):
    return nn.Sequential(nn.Linear(64, 128, bias), nn.ReLU(), nn.Linear(128, 64, bias))


def pruned_mlp(**settings):
    model = mlp()
    return model, PDPPruner(model, PDPConfig(**({"sparsity": 0.6} | AT_ONCE | settings)))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_zeros_stay_zeros_in_the_quantized_model(kind):
    model, pruner = pruned_mlp()
    pruner.finalize()
    zeros = [model[index].weight == 0 for index in (0, 2)]
    inputs = torch.randn(4, 64)
    dense = model(inputs)
    quantize_(model, QUANTIZED[kind])
    for index, zero in zip((0, 2), zeros, strict=True):
        weight = model[index].weight.dequantize()
        assert torch.all(weight[zero] == 0) and torch.any(weight[~zero] != 0)
    assert (model(inputs) - dense).norm() < 0.3 * dense.norm()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantizing_masked_weights_says_what_to_do(kind):
    model, pruner = pruned_mlp()
    quantize_(model, QUANTIZED[kind])
    message = "weight.* has masks of PDPPruner and was quantized .*call finalize first"
    for training in (True, False):
        with pytest.raises(RuntimeError, match=message):
            model.train(training)(torch.randn(4, 64))
    for call in (lambda: pruner.step(1.0), pruner.finalize, pruner.pruned_copy):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_a_pruned_copy_is_quantized_in_mid_training():
    model, pruner = pruned_mlp()
    quantized = pruner.pruned_copy()
    quantize_(quantized, Int8WeightOnlyConfig())
    inputs = torch.randn(4, 64)
    expected = model.eval()(inputs)
    torch.testing.assert_close(quantized(inputs), expected, rtol=0, atol=0.1)
    pruner.step(1.0)
    pruner.finalize()
    assert type(model[0].weight) is nn.Parameter


def test_quantized_weights_are_refused_by_name():
    model, pruner = pruned_mlp()
    pruner.finalize()
    quantize_(model, Int8WeightOnlyConfig(), lambda _, name: name == "0")
    with pytest.raises(RuntimeError, match=r"0\.weight was quantized .*: report before"):
        pruner.report()
    with pytest.raises(TypeError, match=r"0\.weight must be an ordinary .*exclude=\['0\.weight'\]"):
        PDPPruner(model, pruner.config)
    rest = PDPPruner(model, PDPConfig(0.6, exclude=["0.weight"], **AT_ONCE))
    assert dict(rest.report().unpruned) == {"0": 64 * 128}


def test_quantization_aware_training_prunes_what_it_quantizes():
    """The fake-quantized layer quantizes the masked weight, and conversion keeps the zeros."""
    model = mlp()
    quantize_(model, QATConfig(INT4, step="prepare"))
    pruner = PDPPruner(model, PDPConfig(0.6, warmup=0, ramp=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner.attach(optimizer, steps_per_epoch=3)
    take_steps(model, optimizer)
    evaluated = model.eval()(torch.ones(4, 64))
    pruner.finalize()
    torch.testing.assert_close(model(torch.ones(4, 64)), evaluated)
    zeros = model[0].weight == 0
    quantize_(model, QATConfig(INT4, step="convert"))
    assert torch.all(model[0].weight.dequantize()[zeros] == 0)
    assert torch.any(model[0].weight.dequantize()[~zeros] != 0)


def test_layers_that_are_replaced_under_the_masks_are_an_error():
    model, pruner = pruned_mlp()
    quantize_(model, QATConfig(INT4, step="prepare"))
    with pytest.raises(RuntimeError, match=r"no longer has the layer whose 0\.weight is masked"):
        pruner.step(1.0)


def test_float8_training_computes_with_masked_weights():
    model = mlp()
    convert_to_float8_training(model, config=Float8LinearConfig(emulate=True))
    pruner = PDPPruner(model, PDPConfig(0.6, warmup=0, ramp=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner.attach(optimizer, steps_per_epoch=3)
    take_steps(model, optimizer)
    inputs = torch.randn(16, 64)
    evaluated = model.eval()(inputs)
    pruner.finalize()
    torch.testing.assert_close(model(inputs), evaluated)
    assert sum(int((model[index].weight == 0).sum()) for index in (0, 2)) == round(0.6 * 16384)


@pytest.fixture
def eager():
    """torchao compiles each step of an optimizer, which takes longer than all tests together."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_low_bit_optimizers_train_and_keep_frozen_zeros(name, eager):
    model = mlp(bias=False)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=1e-2)
    pruner = PDPPruner(model, PDPConfig(0.6, warmup=0, ramp=1))
    pruner.attach(optimizer, steps_per_epoch=3)
    take_steps(model, optimizer)
    assert pruner.progress == 1
    pruner.finalize()
    state = optimizer.state[model[0].weight]["exp_avg"]
    assert type(state) is not torch.Tensor  # quantized, as 4,096 values or more are
    zeros = [weight == 0 for weight in model.parameters()]
    before = [weight.detach().clone() for weight in model.parameters()]
    pruner.freeze(optimizer)
    take_steps(model, optimizer)
    for weight, zero, then in zip(model.parameters(), zeros, before, strict=True):
        assert torch.equal(weight == 0, zero)
        assert torch.any(weight != then)


def test_zeros_without_freeze_come_back_from_a_low_bit_momentum(eager):
    model = mlp(bias=False)
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    pruner = PDPPruner(model, PDPConfig(0.6, **AT_ONCE))
    take_steps(model, optimizer)
    pruner.finalize()
    take_steps(model, optimizer, steps=1)
    assert torch.all(model[0].weight != 0)
    with pytest.warns(UserWarning, match="found no zero"):
        freeze_zeros([model[0].weight], optimizer)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torchao packs 2:4 weights on a GPU only")
def test_2_to_4_weights_are_packed():
    model, pruner = pruned_mlp(sparsity=None, pattern="2:4")
    model.cuda().half()
    pruner.step(1.0)
    pruner.finalize()
    assert check_nm(model[0].weight, 2, 4).ok
    inputs = torch.randn(64, 64, device="cuda", dtype=torch.float16)
    expected = model(inputs)
    sparsify_(model, semi_sparse_weight())
    assert type(model[0].weight.data) is not torch.Tensor
    torch.testing.assert_close(model(inputs), expected, rtol=1e-2, atol=1e-2)


def test_packing_2_to_4_weights_without_a_gpu_is_torchaos_own_error():
    if torch.cuda.is_available():
        pytest.skip("with a GPU, the weights are packed")
    model, pruner = pruned_mlp(sparsity=None, pattern="2:4")
    pruner.finalize()
    with pytest.raises(RuntimeError, match="Only CUDA tensors are currently supported"):
        sparsify_(model, semi_sparse_weight())
    assert check_nm(model[0].weight, 2, 4).ok
