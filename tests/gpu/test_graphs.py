"""A captured CUDA graph of any operator follows what its tensors hold when it is replayed."""

import pytest
import torch

from pdp_kernels import (
    compress_2to4,
    hard_mask,
    hard_mask_channel,
    hard_mask_nm,
    pdp_mask,
    pdp_mask_channel,
    pdp_mask_nm,
    pdp_thresholds,
    pq_index,
)
from pdp_kernels.ops import reference
from tests.gpu.operations import captured

pytestmark = pytest.mark.gpu


def layers(sizes=(1000, 70_001, 3), dtypes=(torch.float32, torch.bfloat16, torch.float64)):
    return [torch.randn(n, device="cuda").to(d) for n, d in zip(sizes, dtypes, strict=True)]


def test_thresholds_follow_weights_and_ratios():
    weights = layers()
    ratio = torch.tensor(0.5, device="cuda", dtype=torch.float64)
    graph, thresholds = captured(lambda: pdp_thresholds(weights, ratio))
    for new_ratio in (0.5, 0.9, 0.0, 1.0):
        for weight in weights:
            weight.copy_(torch.randn_like(weight))
        ratio.fill_(new_ratio)
        thresholds.fill_(torch.nan)
        graph.replay()
        assert torch.equal(thresholds, pdp_thresholds(weights, new_ratio))


@pytest.mark.parametrize("digit", [0, 1, 2])
def test_digit_counts_follow_weights_and_prefixes(digit):
    weights = layers(dtypes=(torch.float32,) * 3)
    prefixes = torch.zeros(3, dtype=torch.int64, device="cuda")
    graph, results = captured(lambda: torch.ops.pdp.digit_counts(weights, prefixes, digit))
    for largest in (1.0, 4.0):
        for weight in weights:
            weight.uniform_(-largest, largest)
        keys = reference.magnitude_keys(torch.stack([w.abs().median() for w in weights]))
        prefixes.copy_(keys >> (31, 20, 10)[digit])
        graph.replay()
        expected = reference.digit_counts(weights, prefixes, digit)
        assert all(map(torch.equal, results, expected))


def test_a_pq_index_follows_the_weights():
    weights = layers()
    graph, index = captured(lambda: pq_index(weights))
    for _ in range(3):
        for weight in weights:
            weight.copy_(torch.randn_like(weight))
        graph.replay()
        assert torch.equal(index, pq_index(weights))


HARD = {
    "hard_mask": lambda weight: (hard_mask(weight, 0.6),),
    "hard_mask_nm": lambda weight: (hard_mask_nm(weight, 2, 4),),
    "hard_mask_channel": lambda weight: (hard_mask_channel(weight, 0.6),),
    "compress_2to4": compress_2to4,
}


@pytest.mark.parametrize("name", HARD)
def test_hard_masks_and_packed_weights_follow_the_weight(name):
    weight = torch.randint(-3, 4, (96, 128), device="cuda").bfloat16()
    graph, results = captured(lambda: HARD[name](weight))
    for _ in range(3):
        weight.copy_(torch.randint(-3, 4, weight.shape, device="cuda"))
        graph.replay()
        assert all(map(torch.equal, results, HARD[name](weight)))


@pytest.mark.parametrize("tensors", [3, 120])
def test_soft_masks_of_a_list_follow_weights_and_scalars(tensors):
    weights = layers(
        (70_001, *range(tensors - 1)),
        (torch.float32, torch.bfloat16) * (tensors // 2) + (torch.float16,) * (tensors % 2),
    )
    thresholds, taus = torch.rand(2, tensors, device="cuda")

    def step():
        w_hats = torch.ops.pdp.soft_mask_list(weights, thresholds, taus, True, torch.bfloat16)
        return *w_hats, *torch.ops.pdp.soft_mask_list_backward(
            w_hats, weights, thresholds, taus, True
        )

    graph, results = captured(step)
    for _ in range(2):
        for tensor in (*weights, thresholds, taus):
            tensor.copy_(torch.rand_like(tensor))
        graph.replay()
        assert all(map(torch.equal, results, step()))


SOFT = {
    "unstructured": lambda weight, ratio, tau: pdp_mask(weight, ratio, tau=tau),
    "2:4": lambda weight, ratio, tau: pdp_mask_nm(weight, 2, 4, tau=tau),
    "channel": lambda weight, ratio, tau: pdp_mask_channel(weight, ratio, relative_tau=tau),
    "input channel": lambda weight, ratio, tau: pdp_mask_channel(weight, ratio, dim=1, tau=tau),
}


@pytest.mark.parametrize("pattern", SOFT)
def test_a_training_step_follows_weight_ratio_and_temperature(pattern):
    weight = torch.randn(61, 68, device="cuda", requires_grad=True)
    ratio = torch.tensor(0.5, device="cuda", dtype=torch.float64)
    tau = torch.tensor(0.1, device="cuda")

    def step():
        w_hat = SOFT[pattern](weight, ratio, tau)
        return w_hat, *torch.autograd.grad(w_hat.square().sum(), weight)

    graph, results = captured(step)
    for new_ratio, new_tau in ((0.5, 0.1), (0.8, 0.01), (0.9, 1.0)):
        with torch.no_grad():
            weight.normal_()
        ratio.fill_(new_ratio)
        tau.fill_(new_tau)
        graph.replay()
        for result, expected in zip(results, step(), strict=True):
            assert torch.equal(result, expected)


def test_a_graph_keeps_no_memory_of_the_host():
    """Ratios given as numbers stay right after the host lists that held them are gone."""
    weights = layers()
    graph, thresholds = captured(lambda: pdp_thresholds(weights, [0.1, 0.5, 0.9]))
    expected = pdp_thresholds(weights, [0.1, 0.5, 0.9])
    garbage = [torch.randint(0, 255, (1 << 16,), dtype=torch.uint8).pin_memory() for _ in range(64)]
    thresholds.fill_(torch.nan)
    graph.replay()
    assert torch.equal(thresholds, expected)
    del garbage
