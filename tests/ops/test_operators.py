"""The operators hold to the dispatcher's contract, in eager mode and compiled."""

import math

import pytest
import torch
from torch.utils import _pytree as pytree

from pdp_kernels import (
    hard_mask,
    hard_mask_channel,
    ops,
    pdp_mask,
    pdp_mask_channel,
    pdp_threshold,
    pdp_thresholds,
    pq_index,
)
from tests.support.weights import DTYPES

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def sample_inputs(device):
    """Yield (operator, arguments) of every schema: dtypes, layouts, optional arguments."""
    weight = torch.randn(4, 8, 2, 2, device=device).to(memory_format=torch.channels_last)
    tau, pruned = torch.tensor(0.1, device=device), torch.tensor(2, device=device)
    yield "soft_mask_nm", (weight, tau, 4, pruned, 1, True, torch.bfloat16, True)
    yield "soft_mask_nm", (weight[:, :, ::2], tau, 4, pruned, 1, False, None, False)
    yield "soft_mask_nm_backward", (weight, None, weight, tau, 4, pruned, 1, False)
    yield "hard_mask_nm", (weight, 4, pruned, 1)
    for matrix in (torch.randn(32, 64, device=device), torch.randn(64, 64, device=device).t()):
        yield "compress_2to4", (matrix.half(),)
    counts = torch.tensor([3, 0], device=device)
    for dtype in DTYPES:
        weight = torch.randn(4, 6, 2, 2, device=device).to(dtype)
        real = torch.float64 if dtype == torch.float64 else torch.float32
        t, tau = (torch.tensor(value, dtype=real, device=device) for value in (0.7, 0.1))
        yield "prune_counts", ([weight, weight[0]], [0.3, 1.0])
        yield "thresholds", ([weight, weight[:, ::2]], counts)
        for digit in range(2):
            yield "digit_counts", ([weight, weight[:, ::2]], 0 * counts, digit)
        yield "hard_mask", (weight.to(memory_format=torch.channels_last), counts[:1])
        mask = torch.rand(4, 6, 2, 2, device=device) < 0.5
        for per_row in (False, True):
            yield "power_sums", ([weight, weight[:, ::2]], [mask, None], 0.5, 1.0, per_row)
        for layout in (weight.to(memory_format=torch.channels_last), weight[:, ::2]):
            grad = torch.randn_like(layout)
            yield "soft_mask", (layout, t, tau, False, None, False)
            yield "soft_mask", (layout, t, tau, True, torch.bfloat16, True)
            yield "soft_mask_backward", (grad, None, layout, t, tau, True)
            yield "soft_mask_backward", (grad.float(), grad, layout, t, tau, False)
            pair = torch.rand(2, 4, device=device, dtype=real)[:, 0]
            given = ([layout, weight[0]], pair, tau.expand(2), True)
            yield "soft_mask_list", (*given, None if dtype == torch.float16 else torch.bfloat16)
            yield "soft_mask_list_backward", ([grad.float(), None], *given)
            norms = torch.rand(layout.shape[1], device=device).to(real)
            grad_mask = torch.randn(layout.shape[1], device=device).to(dtype)
            yield "channel_norms", (layout, 1, True)
            yield "soft_mask_channel", (layout, norms, t, tau, 1, True, torch.bfloat16)
            given = (layout, norms, t, tau, 1, False, True)
            yield "soft_mask_channel_backward", (grad.contiguous(), grad_mask, *given)


def test_opcheck(device):
    torch.use_deterministic_algorithms(False)  # opcheck compares runs, poison would differ
    checked = set()
    for name, arguments in sample_inputs(device):
        operator = getattr(torch.ops.pdp, name).default
        torch.library.opcheck(operator, arguments, test_utils=CHECKS)
        checked.add(name)
    assert checked == set(ops.schemas.SCHEMAS)


def test_one_tensor_on_the_meta_device_among_others_is_refused(device, request):
    """The dispatcher calls the fake then, whose results are not computed."""
    expected = {"expected_exception": ValueError, "match": r"must be on the device of .*meta"}
    if request.config.pluginmanager.hasplugin("instruments.fake_cuda"):  # it looks first
        expected = {"expected_exception": RuntimeError, "match": "be on the same device"}
    checked = set()
    for name, arguments in sample_inputs(device):
        leaves, structure = pytree.tree_flatten(arguments)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        for place in places if len(places) > 1 else ():
            mixed = [leaf.to("meta") if at == place else leaf for at, leaf in enumerate(leaves)]
            with pytest.raises(**expected):
                getattr(torch.ops.pdp, name)(*pytree.tree_unflatten(mixed, structure))
            checked.add(name)
    assert checked == set(ops.schemas.SCHEMAS) - {"channel_norms", "compress_2to4"}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


CALLS = {
    "threshold": lambda w: pdp_threshold(w, 0.6),
    "thresholds": lambda w: pdp_thresholds([w, w[0]], [0.6, 0.1]),
    "hard_mask": lambda w: hard_mask(w, 0.6),
    "PQ Index": lambda w: pq_index([w, w[0]], mask=[w > 0, None]),
    "PQ Index of neurons": lambda w: pq_index(w, 0.3, 1.7, scope="neuron"),
    "mask": lambda w: pdp_mask(w, 0.6, tau=0.1),
    "mask, relative, with mask": lambda w: pdp_mask(w, 0.6, relative_tau=0.3, return_mask=True),
    "hard_mask_channel": lambda w: hard_mask_channel(w, 0.6, 1),
    "mask_channel": lambda w: pdp_mask_channel(w, 0.6, relative_tau=0.3, return_mask=True),
    "mask, bfloat16": lambda w: pdp_mask(w, 0.6, out_dtype=torch.bfloat16).float(),
}


def assert_same(name, found, expected):
    """Bit for bit; of an index, Inductor contracts 1 - y y and calls another pow than PyTorch."""
    rounding = 1e-14 if name.startswith("PQ Index") else 0
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding)


def loss(results):
    results = results if isinstance(results, tuple) else (results,)
    return sum(result.sin().sum() for result in results)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_a_graph_break(device, name):
    weight = torch.randn(16, 9, device=device, requires_grad=True)
    call = CALLS[name]
    compiled = torch.compile(call, fullgraph=True)
    expected, found = call(weight), compiled(weight)
    assert_same(name, found, expected)
    if name.startswith("mask"):
        own, compiled_own = (torch.autograd.grad(loss(r), weight)[0] for r in (expected, found))
        torch.testing.assert_close(compiled_own, own)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_once_for_all_shapes(device, name):
    call = CALLS[name]
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for size, stance in ((11, "default"), (16, "fail_on_recompile"), (130, "fail_on_recompile")):
        weight = torch.randn(size, 7, device=device, requires_grad=True)
        with torch.compiler.set_stance(stance):
            found = compiled(weight)
        assert_same(name, found, call(weight))
        if name.startswith("mask"):
            torch.autograd.grad(loss(found), weight)


def test_compiles_once_for_a_schedule_in_tensors(device):
    masked = torch.compile(lambda w, ratio, tau: pdp_mask(w, ratio, tau=tau), fullgraph=True)
    weight = torch.randn(64, device=device, requires_grad=True)
    for epoch in range(1, 6):
        ratio = torch.tensor(0.15 * epoch, device=device, dtype=torch.float64)
        tau = torch.tensor(0.1 / epoch, device=device)
        with torch.compiler.set_stance("default" if epoch == 1 else "fail_on_recompile"):
            found = masked(weight, ratio, tau)
        assert torch.equal(found, pdp_mask(weight, 0.15 * epoch, tau=0.1 / epoch))


def test_compiled_training_step_equals_eager(device):
    def step(weight, inputs):
        out = inputs @ pdp_mask(weight, 0.75, relative_tau=0.2)
        return out.relu().sum()

    inputs = torch.randn(8, 16, device=device)
    grads = []
    for function in (step, torch.compile(step, fullgraph=True)):
        weight = torch.linspace(-1, 1, 16 * 4, device=device).view(16, 4).requires_grad_()
        function(weight, inputs).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)


def test_constants_of_the_example_are_right():
    """The numbers the docstrings show."""
    assert pdp_threshold(torch.tensor([1.0, -2.0, 3.0, -4.0]), 0.5).item() == 2.5
    layers = [torch.tensor([1.0, -2.0, 3.0, -4.0]), torch.tensor([5.0, 6.0])]
    assert pdp_thresholds(layers, [0.25, 0.5]).tolist() == [1.5, 5.5]
    assert pdp_thresholds(layers, [0, 1]).tolist() == [-math.inf, math.inf]


@pytest.mark.parametrize("pruned", [0, 1])
def test_groups_of_one_may_be_along_a_dimension_of_stride_0(pruned):
    weight = torch.ones(()).expand(1)
    tau, pruned = torch.tensor(0.1), torch.tensor(pruned)
    expected = 1.0 - pruned
    w_hat, mask = torch.ops.pdp.soft_mask_nm(weight, tau, 1, pruned, 0, False, None, True)
    grad = torch.ops.pdp.soft_mask_nm_backward(weight, None, weight, tau, 1, pruned, 0, False)
    kept = torch.ops.pdp.hard_mask_nm(weight, 1, pruned, 0)
    assert w_hat == mask == grad == kept == expected
