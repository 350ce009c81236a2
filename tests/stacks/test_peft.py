"""PEFT: base layers are pruned below their adapters, which stay whole."""

import copy
import pickle

import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner, hard_mask, pdp_mask
from tests.support.models import AT_ONCE

peft = pytest.importorskip("peft")

TOKENS = torch.arange(10)
BASE = ["base_model.model.fc1.base_layer.weight", "base_model.model.fc2.base_layer.weight"]
HEAD = "base_model.model.head.weight"


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, tokens):
        return self.head(self.fc2(self.fc1(self.embedding(tokens)).relu()))


LAYERS = {"target_modules": ["fc1", "fc2"]}
RANDOM = {"init_weights": False}
TUNERS = {
    "lora": lambda: peft.LoraConfig(r=4, init_lora_weights=False, **LAYERS),
    "rslora of an embedding": lambda: peft.LoraConfig(
        r=4, init_lora_weights=False, use_rslora=True, target_modules=["embedding", "fc1", "fc2"]
    ),
    "dora": lambda: peft.LoraConfig(r=4, init_lora_weights=False, use_dora=True, **LAYERS),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, init_lora_weights=False, **LAYERS
    ),
    "loha": lambda: peft.LoHaConfig(r=4, **RANDOM, **LAYERS),
    "lokr": lambda: peft.LoKrConfig(r=4, **RANDOM, **LAYERS),
    "ia3": lambda: peft.IA3Config(init_ia3_weights=False, feedforward_modules=["fc2"], **LAYERS),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, **RANDOM, **LAYERS),
    "vera": lambda: peft.VeraConfig(r=4, init_weights=False, target_modules=["fc1"]),
    "hra": lambda: peft.HRAConfig(r=4, **RANDOM, **LAYERS),
}


def adapted(tuner="lora", **changes):
    config = TUNERS[tuner]()
    for name, value in changes.items():
        setattr(config, name, value)
    return peft.get_peft_model(Network(), config)


def pruned(model, **settings):
    return PDPPruner(model, PDPConfig(**({"sparsity": 0.5, "scope": "layer"} | AT_ONCE | settings)))


def adapters_of(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tuner", TUNERS)
def test_base_layers_compute_with_masks_and_adapters_stay_whole(tuner):
    """The adapted model equals one of plain weights that are masked by hand, in both modes."""
    model = adapted(tuner)
    plain = copy.deepcopy(model)
    pruner = pruned(model, relative_tau=0.1)
    names = [layer.name for layer in pruner.report().layers]
    assert set(names) <= {*BASE, "base_model.model.fc2.weight", HEAD} and len(names) == 3
    for training in (True, False):
        expected = copy.deepcopy(plain).train(training)
        for name in names:
            weight = expected.get_parameter(name)
            soft = pdp_mask(weight.detach(), 0.5, relative_tau=0.1)
            weight.data = soft if training else weight.data * hard_mask(weight, 0.5)
        torch.testing.assert_close(model.train(training)(TOKENS), expected(TOKENS))
    adapters = {name: p.detach().clone() for name, p in adapters_of(model).items()}
    model(TOKENS).square().mean().backward()
    assert all(p.grad is not None for p in adapters_of(model).values())
    evaluated = model(TOKENS)
    pruner.finalize()
    assert type(model.base_model.model.fc1) is type(plain.base_model.model.fc1)
    torch.testing.assert_close(model(TOKENS), evaluated)
    for name, adapter in adapters_of(model).items():
        assert torch.equal(adapter, adapters[name])


@pytest.mark.parametrize(
    "include, expected",
    [
        ([nn.Linear], [*BASE, HEAD]),
        (["*fc1*"], BASE[:1]),
        (["*lora_A*"], [name.replace("base_layer", "lora_A.default") for name in BASE]),
        (["*fc1*", "*lora_B*"], None),
    ],
)
def test_include_means_adapters_only_by_names_of_their_own(include, expected):
    names = [layer.name for layer in pruned(adapted(), include=include).report().layers]
    by_hand = [BASE[0], *(name.replace("base_layer", "lora_B.default") for name in BASE)]
    assert names == (by_hand if expected is None else expected)


def test_adapters_train_on_a_frozen_base_that_is_pruned_meanwhile():
    model = adapted()
    pruner = PDPPruner(model, PDPConfig(0.8, warmup=1, ramp=2))
    optimizer = torch.optim.AdamW(adapters_of(model).values(), lr=1e-2)
    pruner.attach(optimizer, steps_per_epoch=4)
    before = {name: model.get_parameter(name).detach().clone() for name in (*BASE, HEAD)}
    adapters = {name: p.detach().clone() for name, p in adapters_of(model).items()}
    losses = []
    for _ in range(16):
        loss = nn.functional.cross_entropy(model(TOKENS), TOKENS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    pruner.finalize()
    weights = [model.get_parameter(name) for name in before]
    for weight, then in zip(weights, before.values(), strict=True):
        assert torch.equal(weight, then * (weight != 0))
    total = sum(weight.numel() for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.8 * total)
    for name, adapter in adapters_of(model).items():
        assert not torch.equal(adapter, adapters[name]) and torch.all(adapter != 0)
    pruner.freeze(optimizer).remove()
    assert losses[-1] < losses[0]


def test_a_training_resumes_bit_for_bit(tmp_path):
    config = PDPConfig(0.8, warmup=1, ramp=2)

    def train(model, pruner, optimizer, progresses):
        for progress in progresses:
            nn.functional.cross_entropy(model(TOKENS), TOKENS).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step(progress)

    model = adapted()
    base = copy.deepcopy(model.state_dict())
    pruner = PDPPruner(model, config)
    optimizer = torch.optim.SGD(adapters_of(model).values(), lr=0.1)
    train(model, pruner, optimizer, [0.5, 1.0, 1.5])
    model.save_pretrained(tmp_path / "adapter")
    torch.save(pruner.state_dict(), tmp_path / "pruner.pt")
    train(model, pruner, optimizer, [2.0, 2.5])

    network = adapted()
    network.load_state_dict(base)
    resumed = peft.PeftModel.from_pretrained(
        network.unload(), tmp_path / "adapter", is_trainable=True
    )
    goes_on = PDPPruner(resumed, config)
    goes_on.load_state_dict(torch.load(tmp_path / "pruner.pt"))
    train(resumed, goes_on, torch.optim.SGD(adapters_of(resumed).values(), lr=0.1), [2.0, 2.5])
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])
    assert torch.equal(resumed.eval()(TOKENS), model.eval()(TOKENS))


@pytest.mark.parametrize("tuner", ["lora", "dora", "oft", "ia3"])
def test_merging_into_masked_weights_is_refused_and_changes_nothing(tuner):
    model = adapted(tuner)
    pruner = pruned(model)
    before = model.eval()(TOKENS)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match=r"cannot merge adapters .* call finalize first"):
            merge()
        assert torch.equal(model(TOKENS), before)
    with model.disable_adapter():
        assert not torch.equal(model(TOKENS), before)
    assert torch.equal(model(TOKENS), before)
    pruner.step(1.0)
    pruner.finalize()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS), before)


def test_merged_weights_are_dense_and_can_be_pruned_anew():
    model = adapted()
    pruned(model).finalize()
    merged = model.merge_and_unload()
    assert torch.all(merged.fc1.weight != 0) and torch.all(merged.fc2.weight != 0)
    pruned(merged).finalize()
    assert [int((w == 0).sum()) for w in (merged.fc1.weight, merged.fc2.weight)] == [256, 256]


def test_unloading_without_a_merge_keeps_the_masks():
    model = adapted()
    pruner = pruned(model)
    with model.disable_adapter():
        expected = model.eval()(TOKENS)
    unloaded = model.unload()
    assert torch.equal(unloaded(TOKENS), expected)
    pruner.step(1.0)
    pruner.finalize()
    assert type(unloaded.fc1) is nn.Linear and int((unloaded.fc1.weight == 0).sum()) == 256


def test_the_pruned_base_is_saved_beside_its_adapters(tmp_path):
    model = adapted()
    pruned(model).finalize()
    expected = model.eval()(TOKENS)
    model.save_pretrained(tmp_path)
    torch.save(model.unload().state_dict(), tmp_path / "base.pt")
    network = Network()
    network.load_state_dict(torch.load(tmp_path / "base.pt"))
    assert torch.equal(peft.PeftModel.from_pretrained(network, tmp_path)(TOKENS), expected)


def test_adapters_may_come_after_the_pruner():
    network = Network()
    pruner = pruned(network)
    model = peft.get_peft_model(network, TUNERS["dora"]()).eval()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"has merged adapters \['default'\].*unmerge_adapter"):
        pruner.step(1.0)
    model.unmerge_adapter()
    pruner.step(1.0)
    with pytest.raises(RuntimeError, match="cannot merge"):
        model.merge_adapter()
    before = model(TOKENS)
    pruner.finalize()
    torch.testing.assert_close(model(TOKENS), before)
    assert type(network.fc1) is peft.tuners.lora.Linear
    assert int((network.fc1.base_layer.weight == 0).sum()) == 256


def test_merged_adapters_are_refused_at_first():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"must not have merged adapters, got \['default'\]"):
        pruned(model)
    assert type(model.base_model.model.fc1) is peft.tuners.lora.Linear
    model.unmerge_adapter()
    pruned(model)


def test_layers_that_peft_rewrites_in_each_forward_are_refused():
    attention = nn.Sequential(nn.MultiheadAttention(16, 2), nn.Linear(16, 16))
    model = peft.get_peft_model(attention, peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"lora\.MultiheadAttention\) writes into it in each"):
        pruned(model)
    assert list(pruned(model, exclude=["MultiheadAttention"]).prune_counts) == [
        "base_model.model.1.weight"
    ]
    model = peft.get_peft_model(Network(), peft.LoraConfig(target_parameters=["fc1.weight"]))
    with pytest.raises(ValueError, match=r"fc1\.base_layer\.weight cannot be pruned: this layer"):
        pruned(model)


def test_a_head_to_save_is_pruned_where_it_trains():
    model = adapted(modules_to_save=["head"])
    pruner = pruned(model)
    trained = "base_model.model.head.modules_to_save.default.weight"
    report = pruner.report()
    assert [layer.name for layer in report.layers] == [*BASE, trained]
    assert report.frozen == BASE
    with pytest.raises(ValueError, match="must have a weight that the pruner prunes, such as"):
        pruner.attach(torch.optim.SGD([model.get_parameter(BASE[0])], lr=0.1), 4)
    pruner.attach(torch.optim.SGD(adapters_of(model).values(), lr=0.1), 4).remove()


def test_the_report_names_what_is_left_alone_and_what_does_not_train():
    report = pruned(adapted()).report()
    unpruned = dict(report.unpruned)
    prefix = "base_model.model."
    assert unpruned.pop(f"{prefix}embedding") == 160
    assert unpruned == {
        f"{prefix}fc1.lora_A.default": 64,
        f"{prefix}fc1.lora_B.default": 128,
        f"{prefix}fc2.lora_A.default": 128,
        f"{prefix}fc2.lora_B.default": 64,
    }
    assert report.frozen == [*BASE, HEAD]
    assert f"not pruned: {prefix}embedding (160 weights), " in str(report)
    assert f"pruned without training (requires_grad=False): {BASE[0]}, " in str(report)


def test_copies_and_pickles_stay_masked():
    model = adapted("dora")
    pruner = pruned(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for training in (True, False):
            assert torch.equal(twin.train(training)(TOKENS), model.train(training)(TOKENS))
        with pytest.raises(RuntimeError, match="cannot merge"):
            twin.merge_adapter()
    exported = pruner.pruned_copy()
    torch.testing.assert_close(exported(TOKENS), model(TOKENS))
    exported.merge_and_unload()


@pytest.mark.parametrize("tuner", ["lora", "dora"])
def test_a_compiled_model_is_one_graph(tuner):
    torch._dynamo.reset()
    model = adapted(tuner)
    pruner = PDPPruner(model, PDPConfig(0.5, warmup=0, ramp=2))
    graphs = []
    compiled = torch.compile(
        model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    for step in range(4):
        torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
        pruner.step(step / 2)
    assert len(graphs) == 1


def test_the_conv1d_of_gpt2_is_pruned_below_its_adapters():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    lora = peft.LoraConfig(
        r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False
    )
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora).eval()
    pruner = pruned(model)
    names = [layer.name for layer in pruner.report().layers]
    prefix = "base_model.model.transformer.h.0."
    assert names == [
        f"{prefix}attn.c_attn.base_layer.weight",
        f"{prefix}attn.c_proj.base_layer.weight",
        f"{prefix}mlp.c_fc.weight",
        f"{prefix}mlp.c_proj.base_layer.weight",
    ]
    logits = model(TOKENS[None, :8]).logits
    pruner.finalize()
    torch.testing.assert_close(model(TOKENS[None, :8]).logits, logits)
    torch.testing.assert_close(model.merge_and_unload()(TOKENS[None, :8]).logits, logits)
