"""A warning points at the line of the user's code, wherever in the package it arises."""

import warnings

import pytest
import torch

from pdp_kernels import PDPConfig, PDPPruner, freeze_zeros
from tests.support.models import small_model


def emptied_at_once():
    model = small_model()
    torch.nn.init.normal_(model[2].weight, std=1e-4)
    PDPPruner(model, PDPConfig(0.8, warmup=0, ramp=0, max_layer_sparsity=1.0))


def emptied_in_a_hook():
    model = small_model()
    torch.nn.init.normal_(model[2].weight, std=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = PDPPruner(model, PDPConfig(0.8, warmup=1, ramp=1, max_layer_sparsity=1.0))
    pruner.attach(optimizer, 1)
    model(torch.randn(2, 16)).sum().backward()
    optimizer.step()


def finalized_early():
    PDPPruner(small_model(), PDPConfig(0.8)).finalize()


def attached_to_a_short_training():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    PDPPruner(model, PDPConfig(0.8)).attach(optimizer, 10, epochs=5)


def frozen_without_zeros():
    model = small_model()
    freeze_zeros([model[0].weight], torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    "cause",
    [
        emptied_at_once,
        emptied_in_a_hook,
        finalized_early,
        attached_to_a_short_training,
        frozen_without_zeros,
    ],
)
def test_the_place_of_a_warning_is_the_user_s_line(cause):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        cause()
    assert [each.filename for each in told] == [__file__]
    code = cause.__code__
    last = max(line for *_, line in code.co_lines() if line)
    assert told[0].lineno == last
