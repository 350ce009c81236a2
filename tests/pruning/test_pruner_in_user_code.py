"""What users do to a pruner and its model either works or says what to do instead."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from pdp_kernels import PDPConfig, PDPPruner, freeze_zeros
from tests.support.ranks import results_on_ranks
from tests.support.sharded_training import mesh_of

CONFIG = PDPConfig(sparsity=0.8, scope="layer", warmup=0, ramp=4)


def small_model():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def train_to_the_end(pruner):
    """Train the pruner's model, step by step, and return the fraction of zeros in its weights."""
    model = pruner.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(8):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step((step + 1) / 2)
    pruner.finalize()
    weights = [model[0].weight, model[2].weight]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(w.numel() for w in weights)


def pickled(pruner):
    return pickle.loads(pickle.dumps(pruner))


def saved(pruner):
    buffer = io.BytesIO()
    torch.save(pruner, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("pattern", ["unstructured", "channel"])
@pytest.mark.parametrize("copied", [pickled, copy.deepcopy, saved])
def test_a_copied_pruner_prunes_its_own_model(copied, pattern):
    pruner = PDPPruner(small_model(), PDPConfig(0.75, warmup=0, ramp=4, pattern=pattern))
    pruner.step(1.0)
    other = copied(pruner)
    outputs = [each.model.eval()(torch.ones(16)) for each in (pruner, other)]
    assert torch.equal(*outputs)  # the thresholds of before, until its next step
    for name, threshold in pruner.state_dict()["thresholds"].items():
        assert torch.equal(other.state_dict()["thresholds"][name], threshold)
    sparsities = []
    for each in (other, pruner):  # the first must not change the second
        torch.manual_seed(1)
        each.model.train()
        sparsities.append(train_to_the_end(each))
    assert sparsities[0] == sparsities[1] > 0.7
    assert torch.equal(other.model[0].weight, pruner.model[0].weight)


def attached(steps_per_epoch=2):
    model = small_model()
    pruner = PDPPruner(model, CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return pruner, optimizer, pruner.attach(optimizer, steps_per_epoch)


def step(optimizer):
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.ones_like(weight)
    optimizer.step()


def test_finalize_detaches_the_pruner():
    pruner, optimizer, _ = attached()
    step(optimizer)
    assert pruner.progress == 0.5
    pruner.step(4.0)
    pruner.finalize()
    frozen = pruner.freeze(optimizer)
    step(optimizer)
    frozen.remove()


def test_attaching_twice_raises_until_the_first_handle_is_removed():
    pruner, optimizer, handle = attached()
    with pytest.raises(RuntimeError, match="attached already"):
        pruner.attach(optimizer, 2)
    handle.remove()
    pruner.attach(optimizer, 2)
    step(optimizer)
    assert pruner.progress == 0.5


def test_a_copied_pruner_is_not_attached():
    pruner, optimizer, _ = attached()
    other = pickle.loads(pickle.dumps(pruner))
    step(optimizer)
    assert (pruner.progress, other.progress) == (0.5, 0.0)
    other.attach(torch.optim.SGD(other.model.parameters(), lr=0.1), 2)


def test_an_optimizer_of_other_weights_raises():
    pruner = PDPPruner(small_model(), CONFIG)
    with pytest.raises(ValueError, match=r"such as 0\.weight, got a SGD without any"):
        pruner.attach(torch.optim.SGD(small_model().parameters(), lr=0.1), 2)


class Wrapper(torch.optim.Optimizer):
    """An optimizer that wraps another, as accelerate's does: without torch's own attributes."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self):
        self.optimizer.step()


def test_a_wrapped_optimizer_is_unwrapped():
    model = small_model()
    pruner = PDPPruner(model, CONFIG)
    optimizer = Wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    pruner.attach(optimizer, 2)
    step(optimizer)
    assert pruner.progress == 0.5
    pruner.step(4.0)
    pruner.finalize()
    pruner.freeze(optimizer)
    step(optimizer)
    assert (model[0].weight == 0).any()


def test_data_parallel_is_refused():
    model = small_model()
    PDPPruner(model, CONFIG)
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        model[0]._replicate_for_data_parallel()  # as torch.nn.DataParallel does, on several GPUs


def test_a_replaced_layer_raises():
    model = small_model()
    pruner = PDPPruner(model, CONFIG)
    model[2] = nn.Linear(32, 8)
    for call in (lambda: pruner.step(1.0), pruner.finalize):
        with pytest.raises(RuntimeError, match=r"no longer has the layer whose 2\.weight"):
            call()


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, inputs):
        return self.layer(inputs)


def test_a_layer_that_is_wrapped_later_stays_pruned():
    model = small_model()
    pruner = PDPPruner(model, CONFIG)
    model[2] = Wrapped(model[2])
    pruner.step(4.0)
    pruner.finalize()
    assert (model[2].layer.weight == 0).any()


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: nn.utils.weight_norm(layer),
        lambda layer: nn.utils.spectral_norm(layer),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: nn.utils.parametrizations.orthogonal(layer),
    ],
    ids=["weight_norm", "spectral_norm", "prune", "parametrized weight_norm", "orthogonal"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_later_raises(change):
    model = small_model()
    pruner = PDPPruner(model, CONFIG)
    message = "the weight of a .*Linear that PDPPruner masks must stay a Parameter"
    with pytest.raises(RuntimeError, match=message):
        change(model[0])
        model(torch.randn(4, 16))
    with pytest.raises(RuntimeError, match=message):
        pruner.step(1.0)


def test_a_temperature_may_be_a_list_of_two():
    config = PDPConfig(0.5, relative_tau=[1.0, 0.02])
    assert config == PDPConfig(0.5, relative_tau=(1.0, 0.02))
    overridden = PDPConfig(0.5, overrides={"0": {"tau": [1, 0.5]}})
    assert overridden.plan(overridden.overrides["0"]).temperatures == (1.0, 0.5)
    with pytest.raises(ValueError, match=r"relative_tau must be a number or \(start, end\)"):
        PDPConfig(0.5, relative_tau=[1.0, 0.1, 0.02])


def test_a_mapping_for_the_configuration_names_from_dict():
    with pytest.raises(TypeError, match=r"must be a PDPConfig, got dict: use PDPConfig\.from_dict"):
        PDPPruner(small_model(), {"sparsity": 0.5})


class OfKeywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, input_ids, attention_mask=None):
        return self.linear(input_ids)


def test_a_report_takes_keyword_arguments_as_a_mapping():
    pruner = PDPPruner(OfKeywords(), CONFIG)
    inputs = torch.randn(4, 16)
    assert pruner.report({"input_ids": inputs}).macs == pruner.report(inputs).macs == 4 * 16 * 8


def test_freezing_a_dense_model_warns():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="found no zero to keep"):
        freeze_zeros([model[0].weight], optimizer)


@pytest.mark.parametrize("pattern", ["unstructured", "channel", "2:4"])
def test_a_model_may_be_on_the_meta_device_at_first(pattern):
    with torch.device("meta"):
        model = small_model()
    sparsity = None if pattern == "2:4" else 0.8
    pruner = PDPPruner(model, PDPConfig(sparsity, warmup=0, ramp=4, pattern=pattern))
    model.to_empty(device="cpu")
    for layer in (model[0], model[2]):
        layer.reset_parameters()
    assert torch.isfinite(model(torch.randn(4, 16))).all()
    assert train_to_the_end(pruner) > 0.45


def loading_run():
    """Return a pruner at the end of its schedule, and the checkpoint of an early step."""
    pruner = PDPPruner(small_model(), CONFIG)
    pruner.step(1.0)
    early = copy.deepcopy((pruner.model.state_dict(), pruner.state_dict()))
    pruner.step(4.0)
    return pruner, *early


def test_finalizing_an_early_checkpoint_warns():
    pruner, weights, _ = loading_run()
    pruner.model.load_state_dict(weights)
    with pytest.warns(UserWarning, match="loaded after the last step.*before progress 4"):
        pruner.finalize()


def test_finalizing_an_early_checkpoint_with_its_pruner_warns_of_the_schedule():
    pruner, weights, state = loading_run()
    pruner.model.load_state_dict(weights)
    pruner.load_state_dict(state)
    with pytest.warns(UserWarning, match="at progress 1 with .* of the sparsity reached"):
        pruner.finalize()


@pytest.mark.filterwarnings("error")
def test_finalizing_a_resumed_training_is_silent():
    pruner, _, state = loading_run()
    end = pruner.state_dict()
    pruner.model.load_state_dict(copy.deepcopy(pruner.model.state_dict()))
    pruner.load_state_dict(end)
    pruner.finalize()
    pruner, weights, state = loading_run()
    pruner.model.load_state_dict(weights)
    pruner.load_state_dict(state)
    pruner.step(4.0)  # trains on
    pruner.finalize()


@pytest.mark.parametrize("pattern", ["unstructured", "channel", "2:4"])
def test_a_pruned_copy_is_plain_and_computes_what_the_model_evaluates(pattern):
    sparsity = None if pattern == "2:4" else 0.75
    pruner = PDPPruner(small_model(), PDPConfig(sparsity, warmup=0, ramp=4, pattern=pattern))
    pruner.step(2.0)
    before = copy.deepcopy(pruner.model.state_dict())
    pruned = pruner.pruned_copy()
    inputs = torch.randn(4, 16)
    assert torch.equal(pruned(inputs), pruner.model.eval()(inputs))
    assert [type(layer) for layer in pruned] == [nn.Linear, nn.ReLU, nn.Linear]
    assert (pruned[0].weight == 0).any()
    for name, value in pruner.model.state_dict().items():
        assert torch.equal(value, before[name])
    pruner.step(4.0)
    pruner.finalize()


def test_a_pruned_copy_exports_without_operators_of_this_package():
    pruner = PDPPruner(small_model(), CONFIG)
    pruner.step(2.0)
    exported = torch.export.export(pruner.pruned_copy().eval(), (torch.randn(4, 16),))
    assert "pdp" not in str(exported.graph)


def test_all_layers_that_do_not_fit_a_pattern_are_named_at_once():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 4))
    all_three = r"exclude=\['1', '0\.weight', '2\.weight'\] leaves out"
    with pytest.raises(ValueError, match=rf"got shape \(8, 6\);.*got shape \(4, 5\): {all_three}"):
        PDPPruner(model, PDPConfig(pattern="2:4", exclude=["1"]))
    PDPPruner(model, PDPConfig(pattern="2:4", exclude=["0.weight", "2.weight"]))


def copy_under_fsdp(rank, ranks):
    from torch.distributed.fsdp import fully_shard

    model = small_model()
    fully_shard(model, mesh=mesh_of(rank, (ranks,)))
    pruner = PDPPruner(model, CONFIG)
    with pytest.raises(RuntimeError, match="one under fully_shard is none"):
        pruner.pruned_copy()
    pruner.step(4.0)
    return True


def test_a_pruned_copy_under_fsdp_is_refused():
    assert results_on_ranks(copy_under_fsdp, 2, 2) == [True, True]


def with_a_small_head(std=0.001):
    model = small_model()
    nn.init.normal_(model[2].weight, std=std)
    return model


def test_a_layer_that_a_global_budget_empties_is_named_once():
    config = PDPConfig(0.8, warmup=1, ramp=4, reallocate=1)
    pruner = PDPPruner(with_a_small_head(), config)
    with pytest.warns(UserWarning, match=r"budget of 80% prunes 100\.0% of 2\.weight, whose"):
        pruner.step(1.0)
    with warnings.catch_warnings(action="error"):
        pruner.step(2.0)  # allocates again
    pruner.step(5.0)
    assert "more than 99% pruned: 2.weight" in str(pruner.report())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "options",
    [{"max_layer_sparsity": 0.98}, {"scope": "layer"}, {"overrides": {"2": {"sparsity": 0.5}}}],
)
def test_what_the_warning_proposes_keeps_the_layer(options):
    pruner = PDPPruner(with_a_small_head(), PDPConfig(0.8, warmup=0, ramp=4, **options))
    pruner.step(4.0)
    pruner.finalize()
    assert (pruner.model[2].weight != 0).any()
    assert "more than" not in str(pruner.report())


def test_a_training_is_extended_with_a_new_schedule():
    short = PDPPruner(small_model(), PDPConfig.for_epochs(0.8, epochs=10))
    short.step(5.0)
    model = small_model()
    model.load_state_dict(short.model.state_dict())
    long = PDPPruner(model, PDPConfig.for_epochs(0.8, epochs=20))
    with pytest.raises(ValueError, match="new_schedule=True goes on with this pruner's schedule"):
        long.load_state_dict(short.state_dict())
    long.load_state_dict(short.state_dict(), new_schedule=True)
    assert long.progress == 5.0 and long.prune_counts == short.prune_counts
    thresholds = [each.state_dict()["thresholds"]["0.weight"] for each in (long, short)]
    assert torch.equal(*thresholds)
    long.step(20.0)
    long.finalize()
    with pytest.raises(ValueError, match=r"configuration with sparsity = 0\.9, got 0\.8$"):
        other = PDPPruner(small_model(), PDPConfig.for_epochs(0.9, epochs=10))
        other.load_state_dict(short.state_dict(), new_schedule=True)


def test_a_schedule_longer_than_the_training_warns():
    model = small_model()
    pruner = PDPPruner(model, PDPConfig.paper(0.8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(
        UserWarning, match="of 5 epochs ends before the ramp.*with 0% of the sparsity"
    ):
        pruner.attach(optimizer, 10, epochs=5).remove()
    with warnings.catch_warnings(action="error"):
        pruner.attach(optimizer, 10, epochs=100)


def test_scalars_are_flat_numbers():
    pruner = PDPPruner(small_model(), CONFIG)
    pruner.step(4.0)
    first, second = pruner.report().scalars(), pruner.report(torch.ones(1, 16)).scalars("p/")
    assert first["pdp/sparsity"] == pytest.approx(0.8, abs=0.01)
    assert first["pdp/threshold/0.weight"] == float(pruner.state_dict()["thresholds"]["0.weight"])
    assert "pdp/flipped" not in first and second["p/flipped"] == 0
    assert second["p/macs"] == 16 * 32 + 32 * 8
    assert all(isinstance(value, (int, float)) for value in (first | second).values())
    pruner.finalize()
    assert "pdp/threshold/0.weight" not in pruner.report().scalars()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pattern", ["unstructured", "channel"])
@pytest.mark.parametrize("allocation", ["lamp", "erk", "uniform"])
def test_other_allocations_do_not_empty_a_layer_of_small_weights(allocation, pattern):
    config = PDPConfig(0.75, warmup=0, ramp=4, allocation=allocation, pattern=pattern)
    pruner = PDPPruner(with_a_small_head(), config)
    pruner.step(4.0)
    units = [32, 8] if pattern == "channel" else [512, 256]
    counts = list(pruner.prune_counts.values())
    assert sum(counts) == 0.75 * sum(units)
    assert all(count < size for count, size in zip(counts, units, strict=True))
    pruner.finalize()


def test_an_allocation_without_a_global_budget_raises():
    with pytest.raises(ValueError, match='allocation must be left out with scope "layer"'):
        PDPConfig(0.5, scope="layer", allocation="erk")


def test_a_state_from_before_a_field_of_the_configuration_loads():
    pruner = PDPPruner(small_model(), CONFIG)
    state = pruner.state_dict()
    del state["config"]["allocation"]
    pruner.load_state_dict(state)
    other = PDPPruner(small_model(), PDPConfig(0.8, warmup=0, ramp=4, allocation="erk"))
    state = other.state_dict()
    del state["config"]["allocation"]
    with pytest.raises(ValueError, match="allocation = 'erk', got 'magnitude'"):
        other.load_state_dict(state)
