"""timm's models, optimizers and averages work with PDPPruner, from training to export."""

import importlib
import math

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from pdp_kernels import PDPConfig, PDPPruner, check_nm, freeze_zeros, pdp_mask

timm = pytest.importorskip("timm")
for each in ("optim", "utils"):
    importlib.import_module(f"timm.{each}")

SIZES = {
    "resnet10t": {"channels": (8, 8, 16, 16)},
    "convnext_atto": {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},
    "vit_tiny_patch16_224": {"depth": 2},
    # Their attentions use the weight of qkv with a bias of their own.
    "beit_base_patch16_224": {"depth": 1},
    "eva02_tiny_patch14_224": {"depth": 1},
    "swinv2_tiny_window8_256": {"window_size": 4, "depths": (1, 1), "num_heads": (1, 2)},
    # Their first 1 x 1 convolutions are followed by separable ones.
    "mobilenetv3_small_050": {},
}
TRANSFORMER = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2}
SMALL = ["resnet10t", "convnext_atto", "vit_tiny_patch16_224"]
AT_ONCE = {"warmup": 0, "ramp": 0, "scope": "layer"}
RAMP = PDPConfig(0.8, warmup=0, ramp=2, scope="layer", relative_tau=0.1)


def network(name, seed=0):
    torch.manual_seed(seed)
    sizes = SIZES[name]
    if name.startswith(("vit", "beit", "eva")):
        sizes = TRANSFORMER | sizes
    if name.startswith("swin"):
        sizes = {"img_size": 32, "embed_dim": 16} | sizes
    return timm.create_model(name, pretrained=False, num_classes=4, **sizes)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    return images, torch.randint(4, (4,), generator=generator)


def train(model, optimizer, steps, pruner=None):
    """Take steps of half an epoch; without a pruner the optimizer is one that it is attached to."""
    model.train()
    for step in steps:
        images, labels = batch(step)
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if pruner is not None:
            pruner.step((step + 1) / 2)


def zeros_of(model, names):
    return {name: int((model.get_parameter(name) == 0).sum()) for name in names}


def names_of(pruner):
    return pruner.state_dict()["weights"]


@pytest.mark.parametrize("name", SIZES)
def test_every_layer_computes_with_its_masked_weight(name):
    model = network(name)
    pruner = PDPPruner(model, PDPConfig(0.8, relative_tau=0.1, **AT_ONCE))
    images, _ = batch(0)
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(images), pruner.pruned_copy()(images))
        plain = network(name)
        masked = {
            weight: pdp_mask(plain.get_parameter(weight), threshold=threshold, relative_tau=0.1)
            for weight, threshold in pruner.state_dict()["thresholds"].items()
        }
        for each in (model, plain):
            each.train()
        torch.manual_seed(1)
        expected = functional_call(plain, masked, images)
        torch.manual_seed(1)
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize("name", SMALL)
def test_train_resume_save_finalize_and_export(tmp_path, name):
    model = network(name)
    keys = list(model.state_dict())
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.01)
    pruner = PDPPruner(model, RAMP)
    train(model, optimizer, range(3), pruner)
    saver = timm.utils.CheckpointSaver(model, optimizer, checkpoint_dir=tmp_path, max_history=1)
    saver.save_checkpoint(0)
    torch.save(pruner.state_dict(), tmp_path / "pruner.pt")
    train(model, optimizer, range(3, 5), pruner)

    resumed = network(name, seed=1)
    again = timm.optim.create_optimizer_v2(resumed, opt="adamw", lr=1e-3, weight_decay=0.01)
    pruner_again = PDPPruner(resumed, RAMP)
    timm.models.resume_checkpoint(resumed, tmp_path / "last.pth.tar", again, log_info=False)
    pruner_again.load_state_dict(torch.load(tmp_path / "pruner.pt", weights_only=True))
    train(resumed, again, range(3, 5), pruner_again)

    copy = pruner.pruned_copy().eval()
    for each in (pruner, pruner_again):
        each.finalize()
    assert list(model.state_dict()) == keys
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    zeros = zeros_of(model, names_of(pruner))
    for weight, count in zeros.items():
        assert count == math.floor(0.8 * model.get_parameter(weight).numel() + 0.5)

    images, _ = batch(9)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images), copy(images))
        exported = torch.export.export(copy, (images,)).module()
        torch.testing.assert_close(exported(images), model(images))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "pruned.pth.tar")
    loaded = network(name, seed=1)
    timm.models.load_checkpoint(loaded, tmp_path / "pruned.pth.tar")
    assert zeros_of(loaded, zeros) == zeros


@pytest.mark.parametrize(
    ("name", "excluded"),
    [
        ("resnet10t", ["conv1.0"]),
        ("vit_tiny_patch16_224", ["patch_embed.proj"]),
        ("convnext_atto", ["stem.0", "*.conv_dw"]),
    ],
)
def test_2_to_4_leaves_out_what_does_not_fit(name, excluded):
    model = network(name)
    with pytest.raises(ValueError, match="must have a number of inputs that is divisible by M = 4"):
        PDPPruner(model, PDPConfig(pattern="2:4", **AT_ONCE))
    pruner = PDPPruner(model, PDPConfig(pattern="2:4", exclude=excluded, **AT_ONCE))
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), range(1), pruner)
    pruner.finalize()
    for weight in names_of(pruner):
        assert check_nm(model.get_parameter(weight), 2, 4, dim=1).ok, weight


def test_channels_of_a_residual_network_are_pruned():
    model = network("resnet10t")
    config = PDPConfig(
        0.5, pattern="channel", channel_dim="input", exclude=["conv1.0", "fc"], **AT_ONCE
    )
    pruner = PDPPruner(model, config)
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), range(1), pruner)
    pruner.finalize()
    for weight in names_of(pruner):
        values = model.get_parameter(weight)
        dead = int((values.transpose(0, 1).flatten(1) == 0).all(1).sum())
        assert dead == values.shape[1] // 2


def test_attention_is_fused():
    attention = network("vit_tiny_patch16_224").blocks[0].attn
    assert attention.fused_attn  # so that the tests above run it


@pytest.mark.parametrize("masks_first", [True, False])
def test_an_average_follows_and_is_finalized(masks_first):
    model = network("convnext_atto")
    if masks_first:
        pruner = PDPPruner(model, RAMP)
        average = timm.utils.ModelEmaV3(model, decay=0.5)
    else:
        average = timm.utils.ModelEmaV3(model, decay=0.5)
        pruner = PDPPruner(model, RAMP)
    pruner.follow(average.module)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.05)
    for step in range(4):
        train(model, optimizer, [step], pruner)
        average.update(model)
    images, _ = batch(9)
    with torch.no_grad():
        masked = average(images)
    pruner.finalize()
    with torch.no_grad():
        assert torch.equal(average(images), masked)
    names = names_of(pruner)
    assert zeros_of(average.module, names) == zeros_of(model, names)
    assert not torch.equal(average.module.head.fc.weight, model.head.fc.weight)


@pytest.mark.parametrize("name", ["adamw", "lamb", "nadamw", "sgdw", "lion", "muon"])
@pytest.mark.parametrize("lookahead", [False, True])
def test_a_pruner_attaches_to_timms_optimizers(name, lookahead):
    model = network("vit_tiny_patch16_224")
    opt = f"lookahead_{name}" if lookahead else name
    optimizer = timm.optim.create_optimizer_v2(model, opt=opt, lr=1e-3, weight_decay=0.01)
    pruner = PDPPruner(model, RAMP)
    pruner.attach(optimizer, steps_per_epoch=2)
    train(model, optimizer, range(4))
    assert pruner.progress == 2
    again = PDPPruner(model, RAMP)  # finds the thresholds in the weights as they are
    again.step(2)
    assert pruner.state_dict()["thresholds"] == again.state_dict()["thresholds"]


def test_zeros_stay_zero_under_lookahead():
    model = network("vit_tiny_patch16_224")
    optimizer = timm.optim.create_optimizer_v2(model, opt="lookahead_adamw", lr=1e-3)
    pruner = PDPPruner(model, RAMP)
    pruner.attach(optimizer, steps_per_epoch=2)
    train(model, optimizer, range(7))  # after six steps the slow weights become the fast ones
    pruner.finalize()
    names = names_of(pruner)
    zeros = zeros_of(model, names)
    frozen = freeze_zeros([model.get_parameter(weight) for weight in names], optimizer)
    train(model, optimizer, range(7, 14))
    assert zeros_of(model, names) == zeros
    frozen.remove()
