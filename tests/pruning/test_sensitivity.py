"""A scan prunes each layer alone, exactly, and leaves the model as it was."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig, PDPPruner, hard_mask, hard_mask_channel, sensitivity
from tests.support.models import small_model


def zeros(model):
    """Return the zeros of both layers as one number."""
    first, second = (int((model[i].weight == 0).sum()) for i in (0, 2))
    return 1000 * first + second


def test_each_layer_is_pruned_alone_and_exactly():
    report = sensitivity(small_model(), zeros, [0, 0.5, 0.9, 1])
    assert report.baseline == 0
    assert report.values == {
        "0.weight": [0, 256_000, 461_000, 512_000],
        "2.weight": [0, 128, 230, 256],
    }


@pytest.mark.parametrize("pattern", ["unstructured", "channel"])
def test_the_weights_pruned_are_those_of_the_hard_mask(pattern):
    model, seen = small_model(), []
    config = PDPConfig(0.5, pattern=pattern, channel_norm="l2", include=["0"])
    sensitivity(model, lambda m: seen.append(m[0].weight.clone()) or 0.0, [0.75], config=config)
    weight = model[0].weight
    kept = hard_mask(weight, 0.75)
    if pattern == "channel":
        kept = hard_mask_channel(weight, 0.75).unsqueeze(1)
    assert torch.equal(seen[0], weight) and torch.equal(seen[1], weight * kept)


def test_the_model_is_restored_even_after_an_error():
    model = small_model()
    before = copy.deepcopy(model.state_dict())

    def fail_when_pruned(model):
        if zeros(model):
            raise KeyError("no data")
        return 1.0

    with pytest.raises(KeyError, match="no data"):
        sensitivity(model, fail_when_pruned)
    sensitivity(model, zeros)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_report_is_a_table_plain_data_and_a_plot(tmp_path):
    report = sensitivity(small_model(), zeros, [0.5, 0.75], config=PDPConfig(0.5, include=["2"]))
    assert str(report).splitlines() == [
        "weight    0.5  0.75",
        "2.weight  128   192",
        "unpruned: 0",
    ]
    assert json.loads(json.dumps(report.as_dict()))["values"] == {"2.weight": [128, 192]}
    report.plot(tmp_path / "scan.png")
    assert (tmp_path / "scan.png").stat().st_size > 1000


def masked_model():
    model = small_model()
    PDPPruner(model, PDPConfig(0.5))
    return model


def test_numbers_of_numpy_prune_as_their_doubles():
    model = nn.Linear(500, 200, bias=False)
    report = sensitivity(model, lambda _: int((model.weight == 0).sum()), [np.float16(0.9)])
    assert report.values == {"weight": [89990]}
    assert report.sparsities == [float(np.float16(0.9))]


@pytest.mark.parametrize(
    "model, sparsities, config, error, message",
    [
        (small_model, [1.5], None, ValueError, r"sparsities\[0\] must be in \[0, 1\], got 1\.5"),
        (small_model, [torch.tensor(0.5)], None, TypeError, r"a number in \[0, 1\], got Tensor"),
        (small_model, [], None, ValueError, "at least one fraction, got none"),
        (small_model, 0.5, None, TypeError, "a list or tuple of fractions, got float"),
        (small_model, [0.5], {}, TypeError, "config must be a PDPConfig or None, got dict"),
        (small_model, [0.5], PDPConfig(pattern="2:4"), ValueError, r"any sparsity for 0\.weight"),
        (masked_model, [0.5], None, ValueError, "must not have the masks of a pruner"),
        (nn.ReLU, [0.5], None, ValueError, "must have a weight"),
    ],
)
def test_bad_arguments_raise_before_the_first_evaluation(model, sparsities, config, error, message):
    with pytest.raises(error, match=message):
        sensitivity(model(), lambda _: pytest.fail("evaluated"), sparsities, config=config)


@pytest.mark.parametrize("value", [None, "0.9 of all", torch.ones(2)])
def test_an_evaluation_that_returns_no_number_raises(value):
    with pytest.raises(TypeError, match=r"evaluate must return a number, got (None|'0.9|tensor)"):
        sensitivity(small_model(), lambda _: value)


def test_an_evaluation_that_cannot_be_called_raises():
    with pytest.raises(TypeError, match="evaluate must be callable, got NoneType"):
        sensitivity(small_model(), None)
