"""A configuration is checked when it is made, and its schedules are pure functions of progress."""

import json
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from pdp_kernels import PDPConfig


def test_paper_gives_the_papers_settings():
    """s = 16, epsilon = 0.015, tau = 1e-4, linear: Algorithm 1 and section 4.1."""
    config = PDPConfig.paper(0.9)
    assert (config.warmup, config.ramp_epochs, config.scope) == (16, 1 / 0.015, "global")
    assert config.ramp_at(16) == config.ramp_at(3.7) == 0
    assert config.ramp_at(26) == pytest.approx(0.15, rel=1e-15)
    assert config.ramp_at(16 + 1 / 0.015) == config.ramp_at(1000) == 1
    plan = config.plan()
    assert (plan.relative, plan.temperatures) == (False, (1e-4, 1e-4))


def test_ramps_are_linear_or_cubic():
    linear = PDPConfig(0.5, warmup=2, ramp=8, ramp_shape="linear")
    cubic = PDPConfig(0.5, warmup=2, ramp=8)
    for progress, x in ((0, 0), (2, 0), (4, 0.25), (6, 0.5), (9.5, 0.9375), (10, 1), (11, 1)):
        assert linear.ramp_at(progress) == x
        assert cubic.ramp_at(progress) == 1 - (1 - x) ** 3


def test_a_ramp_of_no_length_is_a_step_at_the_end_of_the_warm_up():
    config = PDPConfig(0.5, warmup=2, ramp=0, anneal=0)
    assert (config.ramp_at(1.999), config.ramp_at(2)) == (0, 1)
    assert config.temperature_at((1.0, 0.1), 1.999) == 1.0
    assert config.temperature_at((1.0, 0.1), 2) == 0.1


def test_temperatures_are_annealed_geometrically_over_the_ramp_or_their_own_time():
    config = PDPConfig(0.5, warmup=2, ramp=8)
    for progress, expected in ((0, 1), (2, 1), (6, 0.1), (10, 0.01), (20, 0.01)):
        assert config.temperature_at((1.0, 0.01), progress) == pytest.approx(expected, rel=1e-15)
    config = PDPConfig(0.5, warmup=2, ramp=8, anneal=16)
    assert config.temperature_at((1.0, 0.01), 10) == pytest.approx(0.1, rel=1e-15)
    assert config.temperature_at((0.3, 0.3), 7.77) == 0.3


def test_for_epochs_leaves_time_to_train_at_the_full_sparsity():
    config = PDPConfig.for_epochs(0.9, 20)
    assert (config.warmup, config.ramp_epochs, config.anneal) == (3, 8, 17)
    assert config.temperature_at((1.0, 0.02), 20) == 0.02 < config.temperature_at((1.0, 0.02), 19)
    assert config.reallocate == 1
    assert PDPConfig.for_epochs(0.9, 20, ramp=4).ramp_epochs == 4
    assert PDPConfig.for_epochs(0.9, 20, epsilon=0.5).ramp_epochs == 2


def test_a_budget_is_reallocated_at_each_interval_of_the_ramp():
    config = PDPConfig(0.9, warmup=2, ramp=3, reallocate=0.5)
    steps = [step / 10 for step in range(61)]
    again = [now for last, now in pairwise(steps) if config.reallocates(last, now)]
    assert [now for now in again if now > 2] == [2.5, 3, 3.5, 4, 4.5, 5]
    never = PDPConfig(0.9, warmup=2, ramp=3)
    assert not any(never.reallocates(a, b) for a, b in pairwise(steps))


def test_the_shortest_interval_reallocates_at_each_step_of_the_ramp():
    config = PDPConfig(0.5, warmup=2, ramp=3, reallocate=1e-320)
    steps = [0, 3, 3.5, 5, 6]
    assert [config.reallocates(a, b) for a, b in pairwise(steps)] == [True, True, True, False]


def test_overrides_change_what_they_name():
    config = PDPConfig(
        0.9,
        relative_tau=(1.0, 0.1),
        overrides={"a": {"sparsity": 0.5}, "b": {"tau": 1e-3}, "c": {"pattern": "2:4"}},
    )
    assert config.plan(config.overrides["a"]).sparsity == 0.5
    plan = config.plan(config.overrides["b"])
    assert (plan.relative, plan.temperatures, plan.sparsity) == (False, (1e-3, 1e-3), None)
    plan = config.plan(config.overrides["c"])
    assert (str(plan.pattern), plan.relative, plan.temperatures) == ("2:4", True, (1.0, 0.1))


def test_plain_data_gives_the_same_configuration():
    config = PDPConfig(
        sparsity={"fc*": 0.5, "Conv2d": 0.25},
        scope="layer",
        relative_tau=(1.0, 0.02),
        include=["fc*", nn.Conv2d],
        exclude=("head",),
        overrides={"fc1": None, "fc2": {"tau": (1e-3, 1e-4)}},
        warmup=1,
        epsilon=0.1,
    )
    read_back = PDPConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert read_back.to_dict() == config.to_dict()
    assert read_back.relative_tau == (1.0, 0.02)
    assert read_back.overrides["fc2"] == {"tau": (1e-3, 1e-4)}
    assert read_back.plan(read_back.overrides["fc2"]) == config.plan(config.overrides["fc2"])


BAD = {
    "sparsity missing": ({"sparsity": None}, ValueError, "sparsity must be given.*unstructured"),
    "sparsity above 1": ({"sparsity": 1.1}, ValueError, r"sparsity must be in \[0, 1\], got 1.1"),
    "sparsity of text": ({"sparsity": "0.9"}, TypeError, "sparsity.*got str"),
    "sparsity of a tensor": (
        {"sparsity": torch.tensor(0.5)},
        TypeError,
        r'a number in \[0, 1\], or with scope "layer" a mapping from strings to them, got Tensor',
    ),
    "fraction of a tensor": (
        {"sparsity": {"fc": torch.tensor(0.5)}, "scope": "layer"},
        TypeError,
        r"sparsity\['fc'\] must be a number in \[0, 1\], got Tensor",
    ),
    "sparsity NaN": ({"sparsity": math.nan}, ValueError, "sparsity.*got nan"),
    "fractions, global": ({"sparsity": {"fc": 0.5}}, ValueError, 'scope must be "layer".*global'),
    "no fractions": ({"sparsity": {}, "scope": "layer"}, ValueError, "sparsity.*empty mapping"),
    "a bad fraction": (
        {"sparsity": {"fc": 2}, "scope": "layer"},
        ValueError,
        r"sparsity\['fc'\] must be in \[0, 1\], got 2",
    ),
    "sparsity not of 2:4": ({"pattern": "2:4"}, ValueError, "sparsity.*2:4.*0.5, got 0.9"),
    "scope": ({"scope": "model"}, ValueError, "scope must be 'global' or 'layer', got 'model'"),
    "pattern": ({"pattern": "block"}, ValueError, "pattern must be.*got 'block'"),
    "pattern 4:2": ({"pattern": "4:2"}, ValueError, "pattern must be.*got '4:2'"),
    "pattern of a number": ({"pattern": 2}, ValueError, "pattern must be.*got 2"),
    "both temperatures": ({"tau": 1, "relative_tau": 1}, ValueError, "tau and relative_tau.*both"),
    "tau of 0": ({"tau": 0}, ValueError, "tau must be positive and finite.*got 0"),
    "tau of three": ({"tau": (1.0, 0.5, 0.1)}, ValueError, r"tau must be a number or \(start, end"),
    "relative_tau of inf": ({"relative_tau": (math.inf, 1.0)}, ValueError, "relative_tau.*got inf"),
    "tau of text": ({"tau": "cold"}, TypeError, "tau must be a number, got str"),
    "warmup": ({"warmup": -1}, ValueError, "warmup must be at least 0 and finite, got -1"),
    "no warmup": ({"warmup": None}, TypeError, "warmup must be a number, got NoneType"),
    "long warmup": ({"warmup": 10**400}, ValueError, "warmup must be at least 0 and.*got 1000"),
    "longer warmup": (
        {"warmup": Fraction(10**400)},
        ValueError,
        "warmup must be at least 0.*got inf",
    ),
    "large sparsity": ({"sparsity": 10**400}, ValueError, r"in \[0, 1\], got 1000"),
    "ramp": ({"ramp": math.inf}, ValueError, "ramp must be at least 0 and finite, got inf"),
    "anneal": ({"anneal": -0.5}, ValueError, "anneal must be at least 0 and finite, got -0.5"),
    "epsilon": ({"epsilon": 0}, ValueError, "epsilon must be positive and finite, got 0"),
    "reallocate": ({"reallocate": 0}, ValueError, "reallocate must be positive.*got 0"),
    "ramp and epsilon": ({"ramp": 1, "epsilon": 1}, ValueError, "ramp and epsilon.*both"),
    "ramp_shape": ({"ramp_shape": "cosine"}, ValueError, "ramp_shape must be.*got 'cosine'"),
    "least_density": ({"least_density": -1}, ValueError, "least_density.*got -1"),
    "all of the density": ({"least_density": 1.0}, ValueError, r"in \[0, 1\), got 1.0"),
    "max_layer_sparsity": ({"max_layer_sparsity": 2}, ValueError, "max_layer_sparsity.*got 2"),
    "channel_dim": ({"channel_dim": 0}, ValueError, "channel_dim must be.*got 0"),
    "channel_norm": ({"channel_norm": "l1"}, ValueError, "norm must be.*got 'l1'"),
    "include a string": ({"include": "fc*"}, TypeError, "include must be a sequence.*got 'fc"),
    "include a number": ({"include": [3]}, TypeError, r"include\[0\] must be a glob.*got int"),
    "exclude a type": ({"exclude": nn.Linear}, TypeError, "exclude must be a sequence"),
    "overrides a list": ({"overrides": []}, TypeError, "overrides must be a mapping, got list"),
    "overrides by type": ({"overrides": {nn.Linear: None}}, TypeError, "overrides must have str"),
    "override a number": ({"overrides": {"a": 0.5}}, TypeError, r"overrides\['a'\].*got float"),
    "override unknown": (
        {"overrides": {"a": {"warmup": 1}}},
        ValueError,
        r"overrides\['a'\] must have keys among.*got \['warmup'\]",
    ),
    "override sparsity": (
        {"overrides": {"a": {"sparsity": -1}}},
        ValueError,
        r"overrides\['a'\]: sparsity.*got -1",
    ),
    "override sparsity of 2:4": (
        {"overrides": {"a": {"sparsity": 0.5, "pattern": "2:4"}}},
        ValueError,
        r"overrides\['a'\]: sparsity must be left out",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_raises_naming_the_field(case):
    values, error, message = BAD[case]
    with pytest.raises(error, match=message):
        PDPConfig(**({"sparsity": 0.9} | values))


def test_an_override_out_of_n_m_needs_a_sparsity():
    with pytest.raises(ValueError, match=r"overrides\['a'\]: sparsity must be given"):
        PDPConfig(pattern="2:4", overrides={"a": {"pattern": "unstructured"}})


def test_from_dict_takes_known_keys_only():
    with pytest.raises(ValueError, match=r"keys among.*'sparsity'.*got \['sparisty'\]"):
        PDPConfig.from_dict({"sparisty": 0.9})
    with pytest.raises(TypeError, match="values must be a mapping, got list"):
        PDPConfig.from_dict([("sparsity", 0.9)])
    with pytest.raises(TypeError, match=r"overrides\['a'\] must be None or a mapping, got float"):
        PDPConfig.from_dict({"sparsity": 0.9, "overrides": {"a": 0.5}})


@pytest.mark.parametrize(
    ("pattern", "temperatures", "gradient_tau"),
    [
        ("unstructured", (1.0, 0.02), 0.0),
        ("channel", (0.3, 0.0001), 0.0),
        ("2:4", (1.0, 0.02), 1.0),
    ],
)
def test_temperatures_suit_the_pattern_of_each_layer(pattern, temperatures, gradient_tau):
    config = PDPConfig(0.5, overrides={"head": {"pattern": pattern}})
    plan = config.plan(config.overrides["head"])
    assert (plan.relative, plan.temperatures) == (True, temperatures)
    assert plan.gradient_tau == gradient_tau


@pytest.mark.parametrize(
    ("pattern", "temperatures", "gradient_tau"),
    [("2:4", (1.0, 0.02), 1.0), ("3:4", (1.0, 0.02), 1.0), ("1:4", (0.3, 0.005), 0.3)],
)
def test_groups_are_decided_later(pattern, temperatures, gradient_tau):
    config = PDPConfig.for_epochs(None, 20, pattern=pattern)
    assert (config.warmup, config.ramp_end) == (7.0, 11.0)
    plan = config.plan()
    assert (plan.temperatures, plan.gradient_tau) == (temperatures, gradient_tau)
    assert PDPConfig.for_epochs(None, 20, pattern="2:4", warmup=1, ramp=2).ramp_end == 3.0


def test_finetuning_prunes_at_once_and_anneals_until_the_end():
    config = PDPConfig.for_finetuning(0.9, 5)
    assert (config.warmup, config.ramp_end, config.anneal) == (0.0, 3.0, 5.0)
    assert config.least_density == 0.5
    assert PDPConfig.for_finetuning(0.9, 5, least_density=0.25).least_density == 0.25
    assert config.temperature_at((1.0, 0.02), 5.0) == pytest.approx(0.02)
    assert PDPConfig.for_finetuning(0.9, 5, warmup=1).anneal == 4.0
    with pytest.raises(ValueError, match="epochs must be positive"):
        PDPConfig.for_finetuning(0.9, 0)
    with pytest.raises(TypeError, match="sparsity must be a number"):
        PDPConfig.for_finetuning("0.9", 5)


@pytest.mark.parametrize(
    ("pattern", "gradient_tau"), [("2:4", 0.0), ("4:8", 0.0), ("1:4", 0.3), ("2:8", 0.3)]
)
def test_finetuning_decides_groups_at_once(pattern, gradient_tau):
    config = PDPConfig.for_finetuning(None, 5, pattern=pattern)
    assert (config.warmup, config.ramp_end, config.anneal) == (0.0, 0.0, 5.0)
    assert (config.relative_tau, config.gradient_tau) == ((0.3, 0.005), gradient_tau)
    assert config.ramp_at(1e-6) == 1.0
    own = PDPConfig.for_finetuning(None, 5, pattern=pattern, relative_tau=0.5, gradient_tau=2.0)
    assert (own.relative_tau, own.gradient_tau) == (0.5, 2.0)
    # An absolute temperature has other units than the recommended one of the gradient.
    absolute = PDPConfig.for_finetuning(None, 5, pattern=pattern, tau=1e-3)
    assert (absolute.relative_tau, absolute.gradient_tau) == (None, None)
    with pytest.raises(ValueError, match="pattern must be"):
        PDPConfig.for_finetuning(None, 5, pattern="one:four")


def test_for_epochs_takes_a_positive_number():
    with pytest.raises(ValueError, match="epochs must be positive and finite, got 0"):
        PDPConfig.for_epochs(0.9, 0)
    with pytest.raises(TypeError, match="epochs must be a number, got str"):
        PDPConfig.for_epochs(0.9, "20")


@pytest.mark.parametrize(
    ("pattern", "finetuning", "temperatures", "gradient_tau"),
    [
        ("2:4", False, (1.0, 0.02), 1.0),
        ("1:4", False, (0.3, 0.005), 0.3),
        ("2:4", True, (0.3, 0.005), 0.0),
        ("channel", True, (0.3, 0.0001), 0.0),
    ],
)
def test_an_override_with_its_own_pattern_has_what_is_recommended_for_it(
    pattern, finetuning, temperatures, gradient_tau
):
    make = PDPConfig.for_finetuning if finetuning else PDPConfig.for_epochs
    own, plain = {"pattern": pattern}, {"pattern": "unstructured", "sparsity": 0.9}

    def plan(config, entry):
        plan = config.plan(config.overrides[entry])
        return plan.relative, plan.temperatures, plan.gradient_tau

    assert plan(make(0.9, 5, overrides={"0": own}), "0") == (True, temperatures, gradient_tau)
    inside = make(None, 5, pattern="1:4", overrides={"0": plain, "1": None, "2": {"tau": 0.1}})
    assert plan(inside, "0") == (True, (1.0, 0.02), 0.0)
    assert inside.overrides["1"] is None and inside.overrides["2"] == {"tau": 0.1}
    # What is given counts: for the layer, or for all.
    for given in ({"relative_tau": 0.5}, {"gradient_tau": 2.0}):
        assert make(0.9, 5, overrides={"0": own | given}).overrides["0"] == own | given
    for given in ({"relative_tau": 0.5}, {"tau": 0.1}):
        assert make(0.9, 5, overrides={"0": own}, **given).overrides["0"] == own
    assert plan(make(0.9, 5, overrides={"0": own}, gradient_tau=2.0), "0")[2] == 2.0


def test_a_bad_pattern_of_an_override_is_named():
    with pytest.raises(ValueError, match=r"overrides\['0'\]: pattern must be.*got 'block'"):
        PDPConfig.for_epochs(0.9, 5, overrides={"0": {"pattern": "block"}})
    with pytest.raises(TypeError, match="overrides must be a mapping, got list"):
        PDPConfig.for_epochs(0.9, 5, overrides=[])


@pytest.mark.parametrize("warmup", [0.2, 0.4, 0.1])
def test_rounding_leaves_no_end_of_the_ramp(warmup):
    config = PDPConfig(0.9, warmup=warmup * 3, ramp=(1 - warmup) * 3, ramp_shape="linear")
    assert config.ramp_at(3.0) == 1.0
    assert config.temperature_at((1.0, 0.02), 3.0) == 0.02
    assert config.ramp_at(3.0 - 1e-6) < 1.0


def test_numpy_numbers_become_plain_ones():
    config = PDPConfig.for_epochs(np.float32(0.5), np.int64(10), relative_tau=(np.float64(1), 0.1))
    values = config.to_dict()
    assert type(values["sparsity"]) is float and type(values["warmup"]) is float
    assert PDPConfig.from_dict(json.loads(json.dumps(values))) == config


def test_numbers_of_numpy_are_those_of_their_double():
    half, double = np.float16(0.9), float(np.float16(0.9))
    layer = {"sparsity": half, "tau": (half, 0.1)}
    config = PDPConfig({"a": half}, scope="layer", epsilon=half, overrides={"b": layer})
    assert config.ramp_epochs == 1 / double
    assert type(config.sparsity["a"]) is float and config.sparsity == {"a": double}
    plan = config.plan(config.overrides["b"])
    assert type(plan.sparsity) is float and plan.temperatures == (double, 0.1)
    assert PDPConfig.for_epochs(0.5, half) == PDPConfig.for_epochs(0.5, double)


def test_a_temperature_of_the_gradient_is_inherited_in_its_own_units_alone():
    config = PDPConfig.for_epochs(None, 20, pattern="1:4", overrides={"head": {"tau": 1e-4}})
    assert config.gradient_tau == 0.3
    assert config.plan({"tau": 1e-4}).gradient_tau == 0
    assert config.plan({"tau": 1e-4, "gradient_tau": 1e-3}).gradient_tau == 1e-3
    assert config.plan({"relative_tau": 0.1}).gradient_tau == 0.3
    assert config.plan({"relative_tau": 0.1, "gradient_tau": None}).gradient_tau == 0.3
    absolute = PDPConfig(None, pattern="2:4", tau=1e-4, gradient_tau=1e-2)
    assert absolute.plan({"tau": 1e-3}).gradient_tau == 1e-2
    assert absolute.plan({"relative_tau": 0.1}).gradient_tau == 1.0  # the pattern's
