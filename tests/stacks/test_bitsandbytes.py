"""bitsandbytes: its 8-bit optimizers train pruned weights; its quantized layers are refused."""

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner
from tests.support.models import AT_ONCE, take_steps

bnb = pytest.importorskip("bitsandbytes")

OPTIMIZERS = {
    "AdamW8bit": lambda parameters: bnb.optim.AdamW8bit(parameters, lr=1e-2),
    "PagedAdamW8bit": lambda parameters: bnb.optim.PagedAdamW8bit(parameters, lr=1e-2),
    "SGD8bit": lambda parameters: bnb.optim.SGD8bit(parameters, lr=1e-1, momentum=0.9),
    "Lion8bit": lambda parameters: bnb.optim.Lion8bit(parameters, lr=1e-3),
    "AdEMAMix8bit": lambda parameters: bnb.optim.AdEMAMix8bit(parameters, lr=1e-2),
    "AdamW": lambda parameters: bnb.optim.AdamW(parameters, lr=1e-2),
}
LAYERS = {
    "Linear8bitLt": lambda: bnb.nn.Linear8bitLt(64, 32),
    "Linear8bitLt for inference": lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
    "Linear4bit": lambda: bnb.nn.Linear4bit(64, 32),
    "LinearNF4": lambda: bnb.nn.LinearNF4(64, 32),
}


def mlp():
    return nn.Sequential(nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 64, bias=False))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_train_and_keep_frozen_zeros(name):
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = PDPPruner(model, PDPConfig(0.6, warmup=0, ramp=1))
    pruner.attach(optimizer, steps_per_epoch=3)
    take_steps(model, optimizer)
    assert pruner.progress == 1
    pruner.finalize()
    is_quantized = optimizer.state[model[0].weight]["state1"].dtype == torch.uint8
    assert is_quantized == ("8bit" in name)
    zeros = [weight == 0 for weight in model.parameters()]
    before = [weight.detach().clone() for weight in model.parameters()]
    pruner.freeze(optimizer)
    take_steps(model, optimizer)
    for weight, zero, then in zip(model.parameters(), zeros, before, strict=True):
        assert torch.equal(weight == 0, zero)
        assert torch.any(weight != then)


def test_a_training_resumes_with_the_state_of_an_8_bit_optimizer():
    model, twin = mlp(), mlp()
    config = PDPConfig(0.6, warmup=0, ramp=2)
    optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-2)
    pruner = PDPPruner(model, config)
    pruner.attach(optimizer, steps_per_epoch=3)
    take_steps(model, optimizer)
    twin.load_state_dict(model.state_dict())
    others = bnb.optim.AdamW8bit(twin.parameters(), lr=1e-2)
    others.load_state_dict(optimizer.state_dict())
    goes_on = PDPPruner(twin, config)
    goes_on.load_state_dict(pruner.state_dict())
    goes_on.attach(others, steps_per_epoch=3)
    for each, its_optimizer in ((model, optimizer), (twin, others)):
        torch.manual_seed(7)
        take_steps(each, its_optimizer)
    assert pruner.progress == goes_on.progress == 2
    pruner.finalize()
    goes_on.finalize()
    for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(weight, other)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("is_on_device", [False, True])
def test_quantized_layers_are_refused_and_can_be_excluded(layer, is_on_device):
    """bitsandbytes quantizes a layer where it is moved to a device."""
    model = nn.Sequential(LAYERS[layer](), nn.ReLU(), nn.Linear(32, 16))
    if is_on_device:
        model.to("cpu")
    before = model[0].weight
    message = r"0\.weight must be an ordinary tensor, got .*: prune first.*exclude=\['0\.weight'\]"
    with pytest.raises(TypeError, match=message):
        PDPPruner(model, PDPConfig(0.6, **AT_ONCE))
    assert model[0].weight is before and type(model[2]) is nn.Linear
    name = type(model[0]).__name__
    for exclude in (["0.weight"], [name], [type(model[0])]):
        pruner = PDPPruner(model, PDPConfig(0.5, exclude=exclude, **AT_ONCE))
        assert list(pruner.prune_counts) == ["2.weight"]
        assert [each for each, _ in pruner.report().unpruned] == ["0"]
        pruner.finalize()


@pytest.mark.parametrize("layer", ["Linear8bitLt for inference", "LinearNF4"])
def test_the_pruned_weights_are_quantized_and_keep_their_zeros(layer):
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    pruner = PDPPruner(model, PDPConfig(0.6, **AT_ONCE))
    pruner.finalize()
    zeros = model[0].weight == 0
    quantized = LAYERS[layer]()
    quantized.load_state_dict({"weight": model[0].weight.detach(), "bias": torch.zeros(32)})
    quantized.to("cpu")
    assert quantized.weight.dtype in (torch.int8, torch.uint8)
    weight = quantized(torch.eye(64)).T
    assert torch.all(weight[zeros] == 0) and torch.any(weight[~zeros] != 0)


def test_the_quantized_base_of_qlora_is_refused():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 32), nn.ReLU(), nn.Linear(32, 16)).to("cpu")
    model.is_loaded_in_4bit = True
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=4))
    assert type(model.base_model.model[0]) is peft.tuners.lora.Linear4bit
    with pytest.raises(TypeError, match=r"base_layer\.weight must be an ordinary.*got Params4bit"):
        PDPPruner(model, PDPConfig(0.6, **AT_ONCE))
    pruner = PDPPruner(model, PDPConfig(0.5, exclude=["Linear4bit"], **AT_ONCE))
    assert list(pruner.prune_counts) == ["base_model.model.2.weight"]
    inputs = torch.randn(4, 64)
    evaluated = model.eval()(inputs)
    pruner.finalize()
    torch.testing.assert_close(model(inputs), evaluated)
