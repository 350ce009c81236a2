"""How many kernels run, and how much memory they take."""

import functools

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from pdp_kernels import (
    PDPConfig,
    PDPPruner,
    compress_2to4,
    hard_mask,
    hard_mask_nm,
    pdp_mask,
    pdp_mask_channel,
    pdp_mask_nm,
    pdp_threshold,
    pdp_thresholds,
    pq_index,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def unpoisoned_memory(poisoned_memory):
    """Filling fresh memory takes kernels too."""
    torch.use_deterministic_algorithms(False)


@functools.cache
def start_profiler():
    """The first profile of a process starts the library that counts, and may miss kernels."""
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]):
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()


def launches(function):
    """How many kernels, copies and fills a call makes on the device, once it is warm."""
    start_profiler()
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    count = sum(event.device_type == DeviceType.CUDA for event in profile.events())
    assert count > 0
    return count


def counts_of_a_digit(weights):
    zeros = torch.zeros(len(weights), dtype=torch.int64, device="cuda")
    return torch.ops.pdp.digit_counts(weights, zeros, 2)


def masks(weights):
    scalars = torch.full((len(weights),), 0.5, device="cuda")
    return torch.ops.pdp.soft_mask_list(weights, scalars, scalars, True, None)


@pytest.mark.parametrize("function", [pdp_thresholds, pq_index, counts_of_a_digit, masks])
def test_launches_do_not_grow_with_the_list(function):
    few, many = ([torch.randn(5000, device="cuda") for _ in range(n)] for n in (2, 300))
    arguments = (0.9,) if function is pdp_thresholds else ()
    assert launches(lambda: function(many, *arguments)) == launches(
        lambda: function(few, *arguments)
    )


def test_launches_of_a_step_of_the_pruner_do_not_grow_with_the_model():
    steps = []
    for depth in (2, 60):
        model = nn.Sequential(*[nn.Linear(64, 64, device="cuda") for _ in range(depth)])
        steps.append(PDPPruner(model, PDPConfig(0.9, warmup=0, ramp=1)).step)
    assert launches(lambda: steps[0](1)) == launches(lambda: steps[1](1))


def test_a_step_of_the_pruner_is_the_selection_and_five_launches():
    """They write the temperature, the prune counts (3) and the thresholds of all layers."""
    model = nn.Sequential(*[nn.Linear(64, 64, device="cuda") for _ in range(60)])
    pruner = PDPPruner(model, PDPConfig(0.9, warmup=0, ramp=4))
    weights = [layer.weight.detach() for layer in model]
    counts = torch.full((60,), 2000, device="cuda")
    selection = launches(lambda: torch.ops.pdp.thresholds(weights, counts))
    assert launches(lambda: pruner.step(1)) == selection + 5


def number(value):
    return torch.tensor(value, device="cuda")


@functools.cache
def two():
    return number(2)


MASKS = {
    "unstructured": lambda weight, tau, t: pdp_mask(weight, threshold=t, tau=tau),
    "relative, with mask": lambda weight, tau, t: pdp_mask(
        weight, threshold=t, relative_tau=tau, return_mask=True
    )[0],
    "2:4": lambda weight, tau, t: pdp_mask_nm(weight, 2, 4, tau=tau, pruned=two()),
    "1:8 along dim 0": lambda weight, tau, t: pdp_mask_nm(
        weight, 1, 8, dim=0, tau=tau, pruned=two()
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_one_kernel_forward_and_one_backward(name):
    weight = torch.randn(256, 512, device="cuda", requires_grad=True)
    tau, t, grad = number(0.1), number(0.7), torch.randn(256, 512, device="cuda")
    w_hat = MASKS[name](weight, tau, t)
    assert launches(lambda: MASKS[name](weight, tau, t)) == 1
    assert launches(lambda: torch.autograd.grad(w_hat, weight, grad, retain_graph=True)) == 1


def test_a_channel_mask_is_one_kernel_forward_and_one_backward():
    """Where channels fit a program's registers, and their norms are there."""
    weight, grad = torch.randn(2, 256, 512, device="cuda")
    norms = torch.ops.pdp.channel_norms(weight, 0, True)
    rest = (norms, number(0.7), number(0.1), 0, True)
    assert launches(lambda: torch.ops.pdp.soft_mask_channel(weight, *rest, None)) == 1
    backward = torch.ops.pdp.soft_mask_channel_backward
    assert launches(lambda: backward(grad, None, weight, *rest, True)) == 1


@pytest.mark.parametrize("shape, dim", [((256, 512), 1), ((512, 64, 3, 3), 1), ((4, 20_000), 0)])
def test_norms_of_channels_are_two_kernels_and_other_backwards_three(shape, dim):
    weight, grad = torch.randn(2, *shape, device="cuda")
    norms = torch.ops.pdp.channel_norms(weight, dim, True)
    rest = (norms, number(0.7), number(0.1), dim, True)
    assert launches(lambda: torch.ops.pdp.channel_norms(weight, dim, True)) == 2
    assert launches(lambda: torch.ops.pdp.soft_mask_channel(weight, *rest, None)) == 1
    backward = torch.ops.pdp.soft_mask_channel_backward
    assert launches(lambda: backward(grad, None, weight, *rest, True)) == 3
    assert launches(lambda: backward(None, norms, weight, *rest, True)) == 2


def test_hard_n_m_masks_and_packing_are_one_kernel():
    weight = torch.randn(256, 512, device="cuda").bfloat16()
    assert launches(lambda: torch.ops.pdp.hard_mask_nm(weight, 4, two(), 1)) == 1
    assert launches(lambda: compress_2to4(weight)) == 1


def peak(function):
    """The bytes that a call takes at most, its results among them.

    Backward passes run on the calling thread. One of their own would hold the result of the first
    call for a while, and it would count as memory that was taken before the second.
    """
    with torch.autograd.set_multithreading_enabled(False):
        function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = function()
        taken = torch.cuda.max_memory_allocated() - before
        del results
    return taken


SMALL = 2**16  # scalars, and what a channel or a tile needs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks_take_the_memory_of_their_result(name, dtype):
    """Forward w_hat (and the mask that is asked for), backward the gradient."""
    weight = torch.randn(2048, 1024, device="cuda").to(dtype).requires_grad_()
    tau, t, grad = number(0.1), number(0.7), torch.ones_like(weight)
    results = 2 if name.endswith("with mask") else 1
    w_hat = MASKS[name](weight, tau, t)
    assert peak(lambda: MASKS[name](weight, tau, t)) <= results * weight.nbytes + SMALL
    taken = peak(lambda: torch.autograd.grad(w_hat, weight, grad, retain_graph=True))
    assert weight.nbytes <= taken <= weight.nbytes + SMALL


@pytest.mark.parametrize("dim", [0, 1])
def test_channel_masks_take_the_memory_of_their_result(dim):
    """And a 64th of it for partial sums, where a channel's weights lie apart."""
    weight = torch.randn(2048, 1024, device="cuda", requires_grad=True)
    sums = weight.nbytes // 64 + 2 * SMALL
    grad, tau = torch.ones_like(weight), number(0.1)

    def masked():
        return pdp_mask_channel(weight, threshold=number(30.0), dim=dim, relative_tau=tau)

    w_hat = masked()
    assert peak(masked) <= weight.nbytes + sums
    taken = peak(lambda: torch.autograd.grad(w_hat, weight, grad, retain_graph=True))
    assert weight.nbytes <= taken <= weight.nbytes + sums


def test_hard_masks_and_packed_weights_take_the_memory_of_their_result():
    weight = torch.randn(2048, 1024, device="cuda").bfloat16()
    assert peak(lambda: hard_mask_nm(weight)) <= weight.numel() + SMALL
    assert peak(lambda: compress_2to4(weight)) <= weight.nbytes * 9 // 16 + SMALL


def test_a_threshold_takes_an_eighth_of_its_weights():
    """Room for the candidates among them; of 16-bit weights none. And some counters.

    A hard mask notes ties, in 32 bytes for each 2 KiB of weights.
    """
    weight = torch.randn(2**24, device="cuda")
    counters = 2**18
    assert peak(lambda: pdp_threshold(weight, 0.9)) <= weight.nbytes // 8 + counters
    assert peak(lambda: hard_mask(weight, 0.9)) <= weight.nbytes * 25 // 64 + counters
    halves = weight.bfloat16()
    assert peak(lambda: pdp_threshold(halves, 0.9)) <= counters
