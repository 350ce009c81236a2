"""The host never waits for the device."""

import contextlib

import pytest
import torch
from torch import nn

from pdp_kernels import (
    PDPConfig,
    PDPPruner,
    hard_mask,
    ops,
    pdp_mask,
    pdp_mask_channel,
    pdp_mask_nm,
    pdp_thresholds,
    pq_index,
)
from tests.gpu.operations import call, matrices

pytestmark = pytest.mark.gpu


@contextlib.contextmanager
def waits_are_errors():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ops.schemas.SCHEMAS)
def test_an_operator_waits_for_nothing(name):
    inputs = [matrix.cuda() for matrix in matrices(name)]
    with waits_are_errors():
        call(name, *inputs)


def test_public_functions_with_numbers_from_the_host_wait_for_nothing():
    weights = [torch.randn(n, 8, device="cuda", requires_grad=True) for n in (100, 70, 4)]
    masks = [weights[0] > 0, None, None]
    with waits_are_errors():
        pdp_thresholds(weights, [0.1, 0.5, 0.9])
        hard_mask(weights[0], 0.5)
        pdp_mask(weights[0], 0.5).sum().backward()
        pdp_mask_nm(weights[1], 2, 4, relative_tau=0.3).sum().backward()
        pdp_mask_channel(weights[2], 0.5, norm="rms").sum().backward()
        pq_index(weights, mask=masks)
        pq_index(weights, 0.3, 1.7, scope="neuron")


PATTERNS = {
    "global": {"sparsity": 0.9},
    "layer": {"sparsity": 0.9, "scope": "layer"},
    "2:4": {"pattern": "2:4"},
    "1:8": {"pattern": "1:8"},
    "output channels": {"sparsity": 0.5, "pattern": "channel"},
    "input channels": {"sparsity": 0.5, "pattern": "channel", "channel_dim": "input"},
    "mixed": {
        "sparsity": 0.9,
        "overrides": {"0": {"pattern": "2:4"}, "1": {"pattern": "channel", "sparsity": 0.5}},
    },
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_step_of_the_pruner_waits_for_nothing(pattern):
    model = nn.Sequential(*[nn.Linear(64, 64, device="cuda") for _ in range(3)])
    pruner = PDPPruner(model, PDPConfig(**PATTERNS[pattern], warmup=1, ramp=4, anneal=2))
    inputs = torch.randn(2, 64, device="cuda")
    pruner.step(1)  # allocates the budget, which does wait
    with waits_are_errors():
        for progress in (2, 3, 4, 5):
            model.train()(inputs).sum().backward()
            with torch.no_grad():
                model.eval()(inputs)
            pruner.step(progress)
