"""Every method trains, resumes and ends with the exact sparsity, on scikit-learn's digits."""

import math
from functools import cache

import pytest
import torch
from matplotlib.figure import Figure

from studies import train_image, train_text
from studies.command_line import budget_of
from studies.data import Images
from studies.methods import CHANNEL_METHODS, METHODS, NM_METHODS, UNSTRUCTURED_METHODS, make_method
from studies.methods.base import Mask
from studies.methods.learned import ScoredMask, Shrink, StraightThrough
from studies.methods.magnitude import ACDC
from studies.train_image import ImageTask, load_images
from studies.train_text import SIZES, TextTask
from studies.training import Recipe, train
from tests.support.studies import digits_mlp, read_csv, short_text, small_residual_network

RECIPE = Recipe(epochs=4, batch=64, lr=0.1, weight_decay=5e-4)


@pytest.fixture(scope="module")
def digits():
    return ImageTask(load_images("mlp", None), RECIPE.batch, augment=False)


def train_digits(task, name, sparsity=0.9, pattern="unstructured", options=None, **arguments):
    torch.manual_seed(0)
    model = train_image.make_network("mlp", task)
    budget = budget_of(sparsity, pattern, RECIPE.epochs)
    method = make_method(name, model, budget, **(options or {}))
    outcome = train(task, model, method, RECIPE, seed=0, show_progress=False, **arguments)
    return model, outcome


@pytest.fixture(scope="module")
def trained(digits):
    """Train a method with a pattern once for all tests, which leave the model as it is."""
    return cache(lambda name, pattern: train_digits(digits, name, pattern=pattern))


def weights_of(model):
    return [weight.detach() for weight in model.parameters() if weight.dim() > 1]


def zeros_of(model):
    return sum(int((weight == 0).sum()) for weight in weights_of(model))


@pytest.mark.parametrize("name", sorted(set(UNSTRUCTURED_METHODS) - {"dense"}))
def test_method_meets_the_sparsity_exactly_in_plain_weights(trained, name):
    model, outcome = trained(name, "unstructured")
    total = sum(weight.numel() for weight in weights_of(model))
    assert zeros_of(model) == math.floor(0.9 * total + 0.5)
    assert model.state_dict().keys() == digits_mlp().state_dict().keys()
    assert all(type(layer) in (torch.nn.Linear, torch.nn.ReLU, torch.nn.Flatten) for layer in model)
    assert outcome.sparsity == zeros_of(model) / total
    # OptG's ramp is a sigmoid in epochs, and is far from its end after four.
    assert outcome.score > (0.3 if name == "optg" else 0.7)


@pytest.mark.parametrize("name", sorted(set(UNSTRUCTURED_METHODS) - {"dense", "pdp", "pdp-paper"}))
def test_finalize_prunes_what_the_method_left(name):
    model = digits_mlp()
    method = make_method(name, model, budget_of(0.9, "unstructured", 10))
    assert method.sparsity() < 0.05 or name == "dnw"  # which prunes from the start
    method.finalize()
    total = sum(weight.numel() for weight in weights_of(model))
    assert zeros_of(model) == math.floor(0.9 * total + 0.5)


def test_dense_prunes_nothing(trained):
    model, outcome = trained("dense", "unstructured")
    assert zeros_of(model) == 0
    assert outcome.sparsity == 0
    assert outcome.score > 0.9


@pytest.mark.parametrize("name", sorted(set(NM_METHODS) - {"dense"}))
def test_method_keeps_n_of_m(trained, name):
    model, outcome = trained(name, "2:4")
    assert outcome.sparsity == 0.5
    for weight in weights_of(model):
        assert ((weight.view(len(weight), -1, 4) != 0).sum(2) == 2).all()
    assert outcome.score > 0.8


@pytest.fixture(scope="module")
def small_images():
    """Scikit-learn's digits, one eighth of them, at the size that convolutions need."""
    images = load_images("resnet20", None)
    return ImageTask(Images(*(tensor[:180] for tensor in images)), batch=60, augment=False)


def train_channels(task, name, **arguments):
    torch.manual_seed(0)
    model = small_residual_network()
    budget = budget_of(0.5, "channel", RECIPE.epochs, narrowed=("*.conv1",))
    method = make_method(name, model, budget)
    recipe = RECIPE._replace(lr=0.05)
    return model, train(task, model, method, recipe, 0, show_progress=False, **arguments)


@pytest.mark.parametrize("name", sorted(set(CHANNEL_METHODS) - {"dense"}))
def test_method_prunes_channels(small_images, name):
    model, outcome = train_channels(small_images, name)
    outputs = [block.conv1.weight for block in (model[3], model[4])]
    inputs = [block.conv2.weight.transpose(0, 1) for block in (model[3], model[4])]
    # The batch norm behind conv1 would scale soft masks away.
    pruned, whole = (inputs, outputs) if name.startswith("pdp") else (outputs, inputs)
    kept = [weight.flatten(1).abs().sum(1) != 0 for weight in pruned]
    assert sum(int(mask.sum()) for mask in kept) == 12  # of 8 + 16
    assert outcome.sparsity == 0.5
    assert all(bool((weight != 0).all()) for weight in whole)
    if name == "one-shot":
        assert [int(mask.sum()) for mask in kept] == [4, 8]


def test_one_shot_ranks_channels_by_what_reads_them():
    model = small_residual_network()
    budget = budget_of(0.5, "channel", 4, narrowed=("*.conv1",))
    method = make_method("one-shot", model, budget, by_readers=True)
    for block in (model[3], model[4]):
        torch.nn.init.ones_(block.conv2.weight)
        with torch.no_grad():
            block.conv2.weight[:, ::2] = -2
    method.step(budget.warmup + budget.ramp)
    for block in (model[3], model[4]):
        kept = block.conv1.weight.flatten(1).abs().sum(1) != 0
        assert kept.tolist() == [True, False] * (len(kept) // 2)


def test_pdp_prunes_outputs_without_a_batch_norm_behind_them():
    method = make_method("pdp", digits_mlp(), budget_of(0.5, "channel", 4, narrowed=("1", "3")))
    assert method.names == ["1", "3"]
    assert method.pruner.config.channel_dim == "output"


def test_slimming_shrinks_scales_until_it_prunes(small_images, tmp_path):
    model = small_residual_network()
    budget = budget_of(0.5, "channel", 4, narrowed=("*.conv1",))
    method = make_method("slimming", model, budget)
    with torch.no_grad():
        model[3].bn1.weight[0] = -0.5
    plain = small_residual_network()
    plain.load_state_dict(
        {
            k.replace("parametrizations.weight.original", "weight"): v
            for k, v in model.state_dict().items()
            if not k.endswith("mask")
        }
    )

    def gradient(network):
        network.zero_grad()
        network(small_images.images.train_inputs[:60]).square().sum().backward()
        return network[3].bn1.weight.grad

    added = gradient(model) - gradient(plain)
    expected = 1e-4 * model[3].bn1.weight.detach().sign()
    torch.testing.assert_close(added, expected, atol=2e-5, rtol=0)
    method.step(1.0)
    assert method.sparsity() == 0
    method.step(budget.warmup + budget.ramp)
    assert method.sparsity() == 0.5


def test_slimming_resumes(small_images, tmp_path):
    expected, outcome = train_channels(small_images, "slimming")
    train_channels(small_images, "slimming", folder=tmp_path, stop_after=3, keep_log=False)
    assert not (tmp_path / "log.csv").exists()
    resumed, again = train_channels(small_images, "slimming", folder=tmp_path, resume=True)
    for parameter, other in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other)
    assert again[:4] == outcome[:4]


@pytest.mark.parametrize(
    ("name", "options"), [("slimming", {}), ("one-shot", {"by_readers": True})]
)
def test_some_methods_need_batch_norms(name, options):
    budget = budget_of(0.5, "channel", 4, narrowed=("1",))
    with pytest.raises(ValueError, match="batch norm after every layer"):
        make_method(name, digits_mlp(), budget, **options)


def test_str_brings_weights_back_where_thresholds_pruned_too_many(digits):
    model, outcome = train_digits(digits, "str", options={"decay": 0.5})
    assert outcome.own_sparsity > 0.95
    assert outcome.sparsity == pytest.approx(0.9, abs=1e-4)
    assert zeros_of(model) == math.floor(0.9 * sum(w.numel() for w in weights_of(model)) + 0.5)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_str_leaves_what_it_kept_and_brings_the_nearest_back(sparsity):
    model = digits_mlp()
    method = make_method("str", model, budget_of(sparsity, "unstructured", 4))
    for number, transform in enumerate(method.transforms()):
        torch.nn.init.constant_(transform.s, -3.0 + number / 10)
    own = method.sparsity()
    margins = [
        weight.detach().abs() - transform.s.detach().sigmoid()
        for weight, transform in zip(method.plain_weights(), method.transforms(), strict=True)
    ]
    method.finalize()
    ends = torch.cat([weight.abs().flatten() for weight in weights_of(model)])
    margins = torch.cat([margin.flatten() for margin in margins])
    assert 0.3 < own < 0.9
    stayed, returned = (ends > 0) & (margins > 0), (ends > 0) & (margins <= 0)
    assert torch.equal(ends[stayed], margins[stayed])
    assert margins[ends > 0].min() >= torch.cat([margins[ends == 0], margins.min()[None]]).max()
    assert returned.any() == (sparsity < own)
    if returned.any():
        lowered = ends[returned] - margins[returned]
        assert lowered.max() - lowered.min() < 1e-6
        assert 0 <= ends[returned].min() < 1e-3


@pytest.mark.parametrize("epochs", [1, 4])
@pytest.mark.parametrize("name", ["gmp", "gmp-global", "granet", "movement"])
def test_gradual_methods_prune_often_in_any_ramp(name, epochs):
    model, steps = digits_mlp(), 100  # in an epoch
    budget = budget_of(0.9, "unstructured", epochs)
    method = make_method(name, model, budget)
    model(torch.rand(4, 64)).sum().backward()
    reached = []
    for step in range(1, epochs * steps + 1):
        method.step(step / steps)
        reached.append(method.sparsity())
    updates = len({sparsity for sparsity in reached if 0 < sparsity < reached[-1]})
    assert reached[-1] == pytest.approx(0.9, abs=1e-3)
    assert updates >= 24


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"slimming"}))
def test_resumed_training_equals_the_uninterrupted_one(
    digits, trained, name, monkeypatch, tmp_path
):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # log.png after every epoch
    pattern = "2:4" if name == "sr-ste" else "unstructured"
    expected, outcome = trained(name, pattern)
    _, nothing = train_digits(digits, name, pattern=pattern, folder=tmp_path, stop_after=2)
    assert nothing is None
    resumed, again = train_digits(digits, name, pattern=pattern, folder=tmp_path, resume=True)
    for parameter, other in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other)
    assert again[:4] == outcome[:4]
    assert [int(row["epoch"]) for row in read_csv(tmp_path / "log.csv")] == [1, 2, 3, 4]


def test_resumed_training_repeats_dropout(tmp_path):
    size = SIZES["tiny"]._replace(layers=1, dropout=0.2)
    recipe = size.recipe._replace(epochs=2)
    task = TextTask(short_text(), size.context, recipe.batch, steps_per_epoch=3)

    def train_gpt(**arguments):
        torch.manual_seed(0)
        model = train_text.make_network(size, task)
        budget = budget_of(0.75, "unstructured", recipe.epochs, exclude=("head",))
        method = make_method("pdp", model, budget)
        train(task, model, method, recipe, seed=0, show_progress=False, **arguments)
        return model

    expected = train_gpt()
    train_gpt(folder=tmp_path, stop_after=1)
    resumed = train_gpt(folder=tmp_path, resume=True)
    for parameter, other in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other)
    assert not (expected.head.weight == 0).any()


def gradients(function, *inputs):
    """The output, and its gradients for a random gradient of the output."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    output = function(*inputs)
    upstream = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return output.detach(), upstream, torch.autograd.grad(output, inputs, upstream)


def test_transforms_and_their_gradients():
    weight = torch.tensor([0.5, -0.1, 0.3, -0.9, 0.0], dtype=torch.float64)
    kept = torch.tensor([True, False, True, False, False])
    pruned = weight.masked_fill(~kept, 0)

    for transform in (Mask(weight), ScoredMask(weight)):
        transform.mask.copy_(kept)
        w_hat, upstream, (gradient,) = gradients(transform, weight)
        assert torch.equal(w_hat, pruned)
        assert torch.equal(gradient, upstream * kept)
    transform(weight).backward(upstream)
    assert torch.equal(transform.scores.grad, upstream * weight)

    w_hat, upstream, (gradient,) = gradients(lambda w: StraightThrough.apply(w, kept, 0.25), weight)
    assert torch.equal(w_hat, pruned)
    assert torch.equal(gradient, upstream + 0.25 * (weight - pruned))

    threshold = torch.tensor(0.2, dtype=torch.float64)
    w_hat, _, got = gradients(Shrink.apply, weight, threshold)
    expected, _, reference = gradients(
        lambda w, t: w.sign() * (w.abs() - t).relu(), weight, threshold
    )
    torch.testing.assert_close((w_hat, *got), (expected, *reference))


def test_acdc_phases():
    method = make_method("acdc", digits_mlp(), budget_of(0.9, "unstructured", 100))
    assert isinstance(method, ACDC)
    sparse = [epoch for epoch in range(100) if method.is_sparse(epoch)]
    assert sparse == [e for e in range(10, 75) if e // 5 % 2 == 0] + [*range(85, 100)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, "unstructured", 10), "sparsity"),
        ((0.5, "4:2", 10), "pattern"),
        ((0.5, "unstructured", 0), "epochs"),
        ((0.5, "unstructured", 10, 5, 6), "warmup and ramp"),
    ],
)
def test_invalid_budgets_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        budget_of(*arguments)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("gmp", "2:4"),
        ("sr-ste", "unstructured"),
        ("sr-ste", "channel"),
        ("slimming", "unstructured"),
    ],
)
def test_methods_reject_patterns_that_they_cannot_prune(name, pattern):
    with pytest.raises(ValueError, match="method"):
        make_method(name, digits_mlp(), budget_of(0.5, pattern, 4, narrowed=("*",)))


def test_networks_without_layers_to_narrow_are_rejected():
    with pytest.raises(ValueError, match="no layers to narrow"):
        budget_of(0.5, "channel", 4)
