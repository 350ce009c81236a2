"""SAP prunes as many weights as the PQ Index says: the smallest ones, and for good."""

import copy
import io
import math
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from pdp_kernels import PDPConfig, PDPPruner, SAPPruner, SAPRound, pq_index, sap_prune_counts
from tests.support.models import lbfgs_training

SCOPES = ("neuron", "layer", "global")
INDEX = torch.tensor(0.5, dtype=torch.float64)


def two_layers(device="cpu"):
    """Return layers of which a round with p = 0.5, q = 1 keeps half or more.

    It keeps ceil((sum sqrt|w|)^2 / sum |w|) weights.
    Both: (13^2 / 33) = 5.1, so 6 of 8. The first: 7^2 / 15 = 3.3, so 4 of 4; the second:
    6^2 / 18 = 2, so 2 of 4.
    """
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[9.0, -4.0, 1.0, 1.0]]))
        model[1].weight.copy_(torch.tensor([[16.0, -1.0, 1.0, 0.0]]))
    return model.to(device)


def weights_of(model):
    return [layer.weight.flatten().tolist() for layer in model]


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3)
    )


def train(model, pruner, seed, momentum=0.9):
    """Take a few steps with a new optimizer; pruned weights end at 0."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=momentum)
    handle = pruner.attach(optimizer)
    for _ in range(5):
        inputs = torch.randn(32, 12, generator=generator)
        labels = torch.randint(0, 3, (32,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    handle.remove()


@pytest.mark.parametrize("p, q", [(0.5, 1), (0.1, 1), (0.3, 0.7), (1, 2), (0.5, 2), (0.9, 1.1)])
def test_equal_weights_among_zeros_are_all_kept(p, q):
    for size in (1, 2, 3, 7, 100, 1001, 65_537):
        for nonzero in {1, 2, size // 3, size - 1, size} - {0}:
            weight = torch.zeros(size)
            weight[:nonzero] = 0.37
            count = sap_prune_counts(pq_index(weight, p, q), size, p, q, beta=1.0)
            # One weight among many has 1 - I = size^(1/q - 1/p), which float64 must not round to 0.
            if (nonzero / size) ** (1 / p - 1 / q) > 1e-10:
                assert count == max(0, size - nonzero)


def test_agrees_with_integer_arithmetic():
    # Squares w = n^2 give m = ceil((sum n)^2 / sum n^2), which integers divide exactly.
    for case in range(300):
        size = int(torch.randint(1, 60, ()))
        roots = torch.randint(0, (2, 4, 30)[case % 3], (size,))
        roots[0] = 1
        needed = -(-(int(roots.sum()) ** 2) // int((roots**2).sum()))
        count = sap_prune_counts(pq_index((roots**2).float()), size)
        assert count == min(size - needed, 9 * size // 10)


def test_counts_follow_eta_gamma_and_beta():
    equal, single = torch.tensor([0.0, 0.9], dtype=torch.float64)  # single: 1 of 10 is not 0

    def counts(index, kept, p=0.5, q=1.0, **settings):
        return sap_prune_counts(index, kept, p, q, **settings).item()

    assert [counts(equal, 8), counts(equal, 8, eta=1.0)] == [0, 6]  # (1 + 1)^-2 8 = 2 are kept
    assert counts(equal, 32, 0.5, 2.0, eta=7.0, beta=1.0) == 30  # 8^(-4/3) 32 = 2
    assert counts(equal, 32, 0.5, 2.0, eta=7.0) == 28  # floor(0.9 32)
    assert counts(single, 10) == 9
    assert counts(single, 10, gamma=0.5) == 4  # floor(0.5 9)
    assert counts(single, 10, gamma=2.0, beta=1.0) == 10
    assert counts(single, 10, beta=0.5) == 5
    assert counts(single, 100, beta=0.29) == 29  # though 0.29 * 100 < 29 in float64
    assert counts(single, 0) == 0
    assert counts(equal, torch.tensor(2**24 + 1)) == 0  # no float32


def test_counts_have_the_shape_of_the_index(device):
    index = torch.tensor([[0.0, 0.5], [0.9, math.nan]], dtype=torch.float64, device=device)
    kept = torch.tensor([[4, 4], [10, 7]], device=device)
    counts = sap_prune_counts(index, kept)
    assert counts.dtype == torch.int64
    assert counts.device == index.device
    assert counts.tolist() == [[0, 2], [9, 0]]
    assert sap_prune_counts(index, 10).tolist() == [[0, 5], [9, 0]]
    assert sap_prune_counts(index, kept, eta=1.0).tolist() == [[3, 3], [9, 0]]


def test_rounds_by_hand_global(device):
    model = two_layers(device)
    pruner = SAPPruner(model, rewind=False)
    # 6 of 8 kept: the 0 goes, and of the four 1s the first.
    first = pruner.step()
    assert weights_of(model) == [[9, -4, 0, 1], [16, -1, 1, 0]]
    assert first.pruned == {"0.weight": 1, "1.weight": 1}
    assert first.pq_index == pytest.approx(1 - 13**2 / (8 * 33), abs=1e-14)
    # 12^2 / 32 = 4.5: 5 of 6.
    assert pruner.step().pruned == {"0.weight": 1, "1.weight": 0}
    assert weights_of(model) == [[9, -4, 0, 0], [16, -1, 1, 0]]
    # 11^2 / 31 = 3.9: 4 of 5.
    pruner.step()
    assert weights_of(model) == [[9, -4, 0, 0], [16, 0, 1, 0]]
    # 10^2 / 30 = 3.3: 4 of 4.
    assert sum(pruner.step().pruned.values()) == 0
    assert pruner.sparsity == 0.5
    assert [mask.flatten().tolist() for mask in pruner.masks.values()] == [
        [True, True, False, False],
        [True, False, True, False],
    ]


def test_round_by_hand_layer():
    model = two_layers()
    done = SAPPruner(model, scope="layer", rewind=False).step()
    assert done.pruned == {"0.weight": 0, "1.weight": 2}
    assert done.pq_indices == {
        "0.weight": pytest.approx(1 - 7**2 / (4 * 15), abs=1e-14),
        "1.weight": pytest.approx(1 - 6**2 / (4 * 18), abs=1e-14),
    }
    assert weights_of(model) == [[9, -4, 1, 1], [16, 0, 1, 0]]


def test_round_by_hand_neuron():
    model = nn.Sequential(nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.cat([layer.weight for layer in two_layers()]))
    done = SAPPruner(model, scope="neuron", rewind=False).step()
    assert done.pruned == {"0.weight": 2}
    assert done.pq_indices == {"0.weight": pytest.approx((11 / 60 + 1 / 2) / 2, abs=1e-14)}
    assert weights_of(model) == [[9, -4, 1, 1, 16, 0, 1, 0]]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_prunes_exactly_the_counts_of_least_magnitude(scope, dtype, layout):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1), nn.Linear(8, 10)).to(dtype)
    model = model.to(memory_format=layout)
    before = [layer.weight.detach().clone() for layer in model]
    rows = [weight.flatten(1) for weight in before]
    groups = {
        "neuron": [row for weight in rows for row in weight],
        "layer": [weight.flatten() for weight in rows],
        "global": [torch.cat([weight.flatten() for weight in rows])],
    }[scope]
    pruner = SAPPruner(model, scope=scope, rewind=False)
    pruner.step()

    masks = [mask.flatten(1) for mask in pruner.masks.values()]
    kept = {
        "neuron": [row for mask in masks for row in mask],
        "layer": [mask.flatten() for mask in masks],
        "global": [torch.cat([mask.flatten() for mask in masks])],
    }[scope]
    for group, mask in zip(groups, kept, strict=True):
        count = int(sap_prune_counts(pq_index(group), len(group)))
        assert (~mask).sum() == count
        least = group.abs().sort(stable=True).indices[:count]
        assert not mask[least].any()
    assert pruner.sparsity > 0.03
    for layer, weight, mask in zip(model, before, pruner.masks.values(), strict=True):
        assert torch.equal(layer.weight, torch.where(mask, weight, 0))


@pytest.mark.parametrize("scope", SCOPES)
def test_pruned_weights_stay_pruned(scope):
    model = mlp()
    pruner = SAPPruner(model, scope=scope, eta=0.2, rewind=False)
    for number in range(8):
        before = pruner.masks
        pruner.step()
        for name, mask in pruner.masks.items():
            assert not (mask & ~before[name]).any()
            weight = model.get_parameter(name).data
            weight[mask & (torch.rand(weight.shape) < 0.1)] = 0  # tied with what is pruned
        train(model, pruner, number)
        for name, mask in pruner.masks.items():
            assert not model.get_parameter(name)[~mask].any()
    assert pruner.sparsity > 0.5


def test_attach_masks_until_removed():
    model = mlp()
    pruner = SAPPruner(model, rewind=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    handle = pruner.attach(optimizer)
    model(torch.randn(8, 12)).square().sum().backward()
    optimizer.step()
    pruner.step()
    optimizer.step()  # the momentum of pruned weights would move them
    pruned = ~pruner.masks["0.weight"]
    assert pruned.any()
    assert not model[0].weight[pruned].any()
    handle.remove()
    optimizer.step()
    assert model[0].weight[pruned].any()
    pruner.mask_weights()
    assert not model[0].weight[pruned].any()


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_lowers_the_loss_of_the_pruned_model(line_search):
    model, optimizer, closure = lbfgs_training(line_search)
    pruner = SAPPruner(model, rewind=False)
    pruner.attach(optimizer)
    for _ in range(4):
        pruner.step()
        losses = [closure().item()]
        for _ in range(4):
            optimizer.step(closure)
            losses.append(closure().item())
        assert losses == sorted(losses, reverse=True)
    assert pruner.sparsity > 0.4
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in pruner.masks.items())


def test_clipping_can_leave_out_the_gradients_of_pruned_weights():
    model = two_layers()
    pruner = SAPPruner(model, rewind=False)
    handle = pruner.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    pruner.step()
    for layer in model:
        layer.weight.grad = torch.ones_like(layer.weight)
    handle.mask_gradients()
    gradients = {name: model.get_parameter(name).grad != 0 for name in pruner.masks}
    assert pruner.sparsity > 0
    assert all(torch.equal(gradients[name], mask) for name, mask in pruner.masks.items())


def test_rewinds_all_but_the_pruned_weights():
    model = mlp()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = SAPPruner(model)
    train(model, pruner, 0)
    assert model[1].num_batches_tracked == 5
    pruner.step()
    assert 0 < pruner.sparsity < 1
    for name, value in model.state_dict().items():
        mask = pruner.masks.get(name, torch.tensor(True))
        assert torch.equal(value, torch.where(mask, start[name], torch.zeros_like(value)))


def replaced_by_loading(model):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def replaced_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def replaced_layer(model):
    model[0] = copy.deepcopy(model[0])


@pytest.mark.parametrize("replace", [replaced_by_loading, replaced_parameter, replaced_layer])
def test_weights_that_are_replaced_are_pruned_and_rewound(replace):
    model = mlp()
    start = model[0].weight.detach().clone()
    pruner = SAPPruner(model)
    replace(model)
    train(model, pruner, 0)
    done = pruner.step()
    mask = pruner.masks["0.weight"]
    assert done.pruned["0.weight"] == (~mask).sum() > 0
    assert torch.equal(model[0].weight, torch.where(mask, start, 0))
    replace(model)
    train(model, pruner, 1)
    assert not model[0].weight[~mask].any()


def test_a_buffer_that_the_model_assigns_is_rewound():
    model = two_layers()
    model.register_buffer("average", torch.ones(3))
    pruner = SAPPruner(model)
    model.average = 0.9 * model.average
    pruner.step()
    assert torch.equal(model.average, torch.ones(3))


def another_layer(model):
    model.append(nn.Linear(3, 3))


def wider_layer(model):
    model[0] = nn.Linear(6, 16)


def untied(model):
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())


def longer_buffer(model):
    model.average = torch.ones(4)


@pytest.mark.parametrize(
    "change, name",
    [
        (another_layer, r"5\.bias, 5\.weight"),
        (wider_layer, r"0\.weight"),
        (untied, r"1\.weight"),
        (longer_buffer, "average"),
        (lambda model: PDPPruner(model, PDPConfig(0.5)), "masks of a pruner, got them on 0"),
    ],
)
def test_a_model_of_another_form_raises_and_nothing_changes(change, name):
    layers = [nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 3)]
    model = nn.Sequential(*layers)
    model[1].weight = model[0].weight
    model.register_buffer("average", torch.ones(3))
    pruner = SAPPruner(model)
    pruner.step()
    change(model)
    before = copy.deepcopy((model.state_dict(), pruner.masks))
    for call in (pruner.step, pruner.mask_weights):
        with pytest.raises(ValueError, match=f"model must .*{name}"):
            call()
    for found, expected in zip((model.state_dict(), pruner.masks), before, strict=True):
        for key, value in expected.items():
            assert torch.equal(found[key], value)
    assert len(pruner.history) == 1


def test_without_rewind_other_weights_stay():
    model = mlp()
    pruner = SAPPruner(model, rewind=False)
    train(model, pruner, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruner.step()
    for name, value in model.state_dict().items():
        mask = pruner.masks.get(name, torch.tensor(True))
        assert torch.equal(value[mask], before[name][mask])


def test_history_records_every_round():
    model = two_layers()
    pruner = SAPPruner(model, rewind=False)
    done = [pruner.step(accuracy=0.5), pruner.step()]
    assert pruner.history == done
    index = 1 - 13**2 / (8 * 33)
    assert done[0] == SAPRound(
        round=1,
        pq_index=pytest.approx(index, abs=1e-14),
        pq_indices={"global": pytest.approx(index, abs=1e-14)},
        pruned={"0.weight": 1, "1.weight": 1},
        sparsity_before=0.0,
        sparsity_after=0.25,
        accuracy=0.5,
    )
    assert done[1].round == 2
    assert (done[1].sparsity_before, done[1].sparsity_after) == (0.25, 0.375)
    assert done[1].accuracy is None


@pytest.mark.parametrize("scope", SCOPES)
def test_a_resumed_run_equals_an_uninterrupted_one(scope):
    def rounds(model, pruner, numbers):
        for number in numbers:
            train(model, pruner, number)
            pruner.step(accuracy=number / 10)

    model = mlp()
    pruner = SAPPruner(model, scope=scope)
    rounds(model, pruner, range(4))

    interrupted = mlp()
    first = SAPPruner(interrupted, scope=scope)
    rounds(interrupted, first, range(2))
    file = io.BytesIO()
    torch.save([interrupted.state_dict(), first.state_dict()], file)
    file.seek(0)
    model_state, pruner_state = torch.load(file)
    resumed = mlp(seed=1)
    second = SAPPruner(resumed, scope=scope)
    resumed.load_state_dict(model_state)
    second.load_state_dict(pruner_state)
    rounds(resumed, second, range(2, 4))

    assert second.history == pruner.history
    assert second.sparsity == pruner.sparsity
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


@pytest.mark.parametrize("rewind", [True, False])
def test_a_sharded_checkpoint_of_later_rounds_loads(tmp_path, rewind):
    pruner = SAPPruner(mlp(), rewind=rewind)
    pruner.step(accuracy=0.5)
    pruner.step()
    dcp.save({"sap": pruner}, checkpoint_id=tmp_path)
    fresh = SAPPruner(mlp(seed=1), rewind=rewind)
    dcp.load({"sap": fresh}, checkpoint_id=tmp_path)
    dcp_to_torch_save(tmp_path, tmp_path / "converted.pt")
    other = SAPPruner(mlp(seed=1), rewind=rewind)
    other.load_state_dict(torch.load(tmp_path / "converted.pt", weights_only=True)["sap"])
    for loaded in (fresh, other):
        assert loaded.history == pruner.history
        for part in ("masks", "initial"):
            expected = pruner.state_dict()[part]
            for name, value in loaded.state_dict()[part].items():
                assert torch.equal(value, expected[name])


def test_a_state_of_another_run_changes_nothing():
    pruner = SAPPruner(two_layers())
    pruner.step()
    before = pruner.state_dict()
    for other, message in (
        (SAPPruner(two_layers(), scope="layer"), "settings.*'global'.*got.*'layer'"),
        (SAPPruner(two_layers(), eta=0.1), "settings.*got.*'eta': 0.1"),
        (SAPPruner(mlp()), r"masks of shapes.*\(1, 4\).*got.*\(16, 12\)"),
    ):
        with pytest.raises(ValueError, match=message):
            pruner.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"state_dict must have keys.*'masks'.*got \['round'\]"):
        pruner.load_state_dict({"round": 1})
    with pytest.raises(TypeError, match="state_dict must be a mapping, got list"):
        pruner.load_state_dict([])
    assert pruner.state_dict()["history"] == before["history"]
    for part in ("masks", "initial"):
        for name, value in pruner.state_dict()[part].items():
            assert value is before[part][name]


def test_shared_weights_count_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[1].weight = model[0].weight
    pruner = SAPPruner(model)
    assert list(pruner.masks) == ["0.weight", "2.weight"]
    pruner.step()
    assert model[1].weight is model[0].weight
    zeros = sum(int((weight == 0).sum()) for weight in (model[0].weight, model[2].weight))
    assert pruner.sparsity == zeros / 80 > 0


@pytest.mark.parametrize("model", [nn.ReLU(), nn.LayerNorm(4), nn.Embedding(4, 4), nn.Linear(0, 3)])
def test_a_model_with_nothing_to_prune_raises(model):
    with pytest.raises(ValueError, match=rf"model must have.*got a {type(model).__name__} without"):
        SAPPruner(model)


def test_models_that_cannot_be_pruned_raise():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Tensor"):
        SAPPruner(torch.zeros(3, 3))
    with pytest.raises(TypeError, match=r"model's weight must have dtype.*got torch.complex64"):
        SAPPruner(nn.Linear(3, 3, dtype=torch.complex64))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"0\.weight as a parameter.*computed from others"):
        SAPPruner(normed)
    masked = nn.Sequential(nn.Linear(3, 3))
    PDPPruner(masked, PDPConfig(0.5))
    with pytest.raises(ValueError, match="masks of a pruner, got them on 0: finalize its pruner"):
        SAPPruner(masked)
    with pytest.raises(ValueError, match="model's weight must have its shape: run the lazy layer"):
        SAPPruner(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="model's weight must have values, got one on the meta"):
        SAPPruner(nn.Linear(3, 3, device="meta"))
    scattered = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    with pytest.raises(ValueError, match=r"one device, got cpu for 0\.weight and meta for 1"):
        SAPPruner(scattered)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"p": 1.0}, ValueError, "1e-05 <= p < q.*p = 1.0, q = 1.0"),
        ({"p": "0.5"}, TypeError, "p must be a number, got str"),
        ({"eta": -0.1}, ValueError, "eta must be at least 0 and finite, got -0.1"),
        ({"eta": None}, TypeError, "eta must be a number, got NoneType"),
        ({"gamma": 0.0}, ValueError, "gamma must be positive and finite, got 0.0"),
        ({"gamma": math.inf}, ValueError, "gamma must be positive and finite, got inf"),
        ({"gamma": True}, TypeError, "gamma must be a number, got bool"),
        ({"beta": 1.1}, ValueError, r"beta must be in \[0, 1\], got 1.1"),
        ({"beta": math.nan}, ValueError, r"beta must be in \[0, 1\], got nan"),
        ({"q": 10**400}, ValueError, "1e-05 <= p < q < inf, got p = 0.5, q = 1000"),
        ({"eta": 10**400}, ValueError, "eta must be at least 0 and finite, got 1000"),
        ({"gamma": 10**400}, ValueError, "gamma must be positive and finite, got 1000"),
        ({"beta": 10**400}, ValueError, r"beta must be in \[0, 1\], got 1000"),
    ],
)
def test_bad_settings_raise(settings, error, message):
    with pytest.raises(error, match=message):
        sap_prune_counts(INDEX, 3, **settings)
    with pytest.raises(error, match=message):
        SAPPruner(nn.Linear(3, 3), **settings)


@pytest.mark.parametrize(
    "index, kept, error, message",
    [
        (0.5, 3, TypeError, "index must be a torch.float64 tensor, got float"),
        (INDEX.float(), 3, TypeError, "index must be a torch.float64 tensor, got torch.float32"),
        (INDEX, 3.0, TypeError, "kept must be an int or an integer.*got float"),
        (INDEX, True, TypeError, "kept must be an int or an integer.*got bool"),
        (INDEX, torch.tensor(3.0), TypeError, "kept must.*got torch.float32"),
        (INDEX, -1, ValueError, "kept must be at least 0, got -1"),
        (INDEX.expand(2), torch.tensor([3]), ValueError, r"kept.*shape \(2,\), got \(1,\)"),
        (
            INDEX.expand(2),
            torch.empty(2, dtype=torch.int64, device="meta"),
            ValueError,
            "kept must be on the index's device cpu, got meta",
        ),
    ],
)
def test_bad_indices_and_counts_raise(index, kept, error, message):
    with pytest.raises(error, match=message):
        sap_prune_counts(index, kept)


def test_other_bad_arguments_raise():
    with pytest.raises(ValueError, match=r"scope must be.*got 'row'"):
        SAPPruner(nn.Linear(3, 3), scope="row")
    with pytest.raises(TypeError, match="rewind must be a bool, got int"):
        SAPPruner(nn.Linear(3, 3), rewind=1)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got list"):
        SAPPruner(nn.Linear(3, 3)).attach([])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_round_that_cannot_be_done_changes_nothing(value):
    model = two_layers()
    pruner = SAPPruner(model)
    with pytest.raises(TypeError, match="accuracy must be a number or None, got str"):
        pruner.step(accuracy="0.9")
    model[1].weight.data[0, 0] = value
    with pytest.raises(ValueError, match="model must have finite weights"):
        pruner.step()
    assert weights_of(model)[0] == [9, -4, 1, 1]
    assert weights_of(model)[1][1:] == [-1, 1, 0]
    assert pruner.sparsity == 0
    assert pruner.history == []


def test_finite_weights_whose_powers_underflow_are_told_from_infinite_ones():
    model = nn.Linear(3, 3).double()
    model.weight.data.fill_(1e-160)
    pruner = SAPPruner(model, p=1.0, q=2.0)
    message = r"weights whose powers \|w\|\^q float64 can sum, got a PQ Index of nan with q = 2.0"
    with pytest.raises(ValueError, match=message):
        pruner.step()
    assert pruner.sparsity == 0


def test_an_accuracy_too_large_for_a_float_is_infinite():
    assert SAPPruner(two_layers()).step(accuracy=10**400).accuracy == math.inf


@pytest.mark.parametrize("accuracy", [None, 0.9])
def test_plot_writes_a_picture(tmp_path, accuracy):
    pytest.importorskip("matplotlib")
    pruner = SAPPruner(two_layers())
    with pytest.raises(ValueError, match="at least one round"):
        pruner.plot(tmp_path / "rounds.png")
    pruner.step(accuracy)
    pruner.step()
    pruner.plot(tmp_path / "rounds.png")
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")


def test_plot_names_the_package_it_misses(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    pruner = SAPPruner(two_layers())
    pruner.step()
    with pytest.raises(ImportError, match="plot needs matplotlib: pip install matplotlib"):
        pruner.plot(tmp_path / "rounds.png")
