"""What users do to a pruned model either works or says what to do instead."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from pdp_kernels import PDPConfig, PDPPruner, freeze_zeros, prune_one_shot
from pdp_kernels.ops import reference
from tests.support.models import CONFIG, small_model, train_to_the_end


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


def emptied_and_loaded(model, state):
    model.to_empty(device="cpu").load_state_dict(state)


def assigned(model, state):
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("load", [emptied_and_loaded, assigned])
@pytest.mark.parametrize("pattern", ["unstructured", "channel", "2:4"])
def test_a_model_may_be_on_the_meta_device_at_first(pattern, load):
    with torch.device("meta"):
        model = small_model()
    sparsity = None if pattern == "2:4" else 0.8
    pruner = PDPPruner(model, PDPConfig(sparsity, warmup=0, ramp=4, pattern=pattern))
    dense, inputs = small_model(), torch.randn(4, 16)
    load(model, dense.state_dict())
    for training in (True, False):  # nothing is pruned yet
        torch.testing.assert_close(model.train(training)(inputs), dense(inputs))
    assert train_to_the_end(pruner) > 0.45


def test_weights_of_another_dtype_may_be_assigned():
    model = small_model()
    pruner = PDPPruner(model, PDPConfig(0.8, warmup=0, ramp=0))
    state = {name: value.double() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model(torch.randn(4, 16).double()).sum().backward()
    pruner.finalize()


def test_the_default_device_need_not_be_that_of_the_weights():
    model, inputs = small_model(), torch.randn(4, 16)
    attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with torch.device("meta"):
        pruner = PDPPruner(model, PDPConfig(0.8, warmup=0, ramp=1, reallocate=0.5))
        for progress in (0.5, 1.0):
            model(inputs).sum().backward()
            pruner.step(progress)
        pruner.load_state_dict(pruner.state_dict())
        pruner.report(inputs)
        pruner.finalize()
        counts = reference.prune_counts(list(model.parameters()), [0.8] * 4)
        prune_one_shot(attention, 0.5, method="wanda", calibration=[inputs.unsqueeze(0)])
    assert counts.device.type == "cpu"
    assert train_to_the_end(PDPPruner(model, CONFIG)) > 0.45


def test_masks_on_the_meta_device_refuse_weights_that_are_elsewhere():
    """As of the base of an ensemble (torch.func.stack_module_state)."""
    model = small_model()
    PDPPruner(model, PDPConfig(0.8, warmup=0, ramp=0))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    base = copy.deepcopy(model).to("meta")
    with pytest.raises(
        ValueError, match="threshold must be on the device of weight, cpu, got meta"
    ):
        torch.func.functional_call(base, weights, torch.randn(4, 16))


def test_all_layers_that_do_not_fit_a_pattern_are_named_at_once():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 4))
    all_three = r"exclude=\['1', '0\.weight', '2\.weight'\] leaves out"
    with pytest.raises(ValueError, match=rf"got shape \(8, 6\);.*got shape \(4, 5\): {all_three}"):
        PDPPruner(model, PDPConfig(pattern="2:4", exclude=["1"]))
    PDPPruner(model, PDPConfig(pattern="2:4", exclude=["0.weight", "2.weight"]))


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
