"""Bad input raises TypeError or ValueError that names the argument, and changes nothing."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from pdp_kernels import (
    hard_mask,
    hard_mask_channel,
    pdp_mask,
    pdp_mask_channel,
    pdp_threshold,
    pdp_thresholds,
    pq_index,
)

WEIGHT = torch.linspace(-1, 1, 12)
META = torch.empty(3, device="meta")
ANYWHERE = torch.tensor(0.5)

BAD_WEIGHTS = {
    "no tensor": ([1.0, 2.0], "torch.Tensor, got list"),
    "integer": (torch.arange(3), "got torch.int64"),
    "boolean": (torch.ones(3, dtype=torch.bool), "got torch.bool"),
    "complex": (torch.ones(3, dtype=torch.complex64), "got torch.complex64"),
    "float8": (torch.ones(3).to(torch.float8_e4m3fn), "got torch.float8_e4m3fn"),
    "sparse": (torch.eye(3).to_sparse(), "got layout torch.sparse_coo"),
    "sparse csr": (torch.eye(3).to_sparse_csr(), "got layout torch.sparse_csr"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
@pytest.mark.parametrize("call", [pdp_mask, pdp_threshold, hard_mask])
def test_a_weight_of_another_type_raises(call, case):
    weight, message = BAD_WEIGHTS[case]
    with pytest.raises(TypeError, match="weight.*" + message):
        call(weight, 0.5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_weight_raises(layout):
    weight = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=layout)
    with pytest.raises(TypeError, match=r"weight must be a dense .*, got a nested tensor"):
        pdp_threshold(weight, 0.5)


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_a_bad_weight_in_a_list_is_named(case):
    weight, message = BAD_WEIGHTS[case]
    with pytest.raises(TypeError, match=r"weights\[1\].*" + message):
        pdp_thresholds([WEIGHT, weight], 0.5)


@pytest.mark.parametrize("ratio", [-0.1, 1.0001, math.nan, math.inf, 2, 10**400, -(10**400)])
@pytest.mark.parametrize("call", [pdp_mask, pdp_threshold, hard_mask])
def test_a_sparsity_outside_of_its_range_raises(call, ratio):
    with pytest.raises(ValueError, match=rf"sparsity.*\[0, 1\], got {ratio}"):
        call(WEIGHT, ratio)


@pytest.mark.parametrize("ratio", ["0.5", None, True, 0.5j, [0.5]])
def test_a_sparsity_of_another_type_raises(ratio):
    for call in (pdp_threshold, hard_mask):
        with pytest.raises(TypeError, match=r"sparsity.*number in"):
            call(WEIGHT, ratio)


@pytest.mark.parametrize(
    "ratio, error, message",
    [
        (torch.tensor(1), TypeError, "floating point dtype, got torch.int64"),
        (torch.tensor([0.1, 0.2]), ValueError, r"shape \(\).*got \(2,\)"),
        (META[0], ValueError, "device cpu, got meta"),
        (torch.tensor(0.5, requires_grad=True), ValueError, "must not require a gradient"),
    ],
)
def test_a_bad_sparsity_tensor_raises(ratio, error, message):
    for call in (pdp_mask, pdp_threshold, hard_mask):
        with pytest.raises(error, match="sparsity.*" + message):
            call(WEIGHT, ratio)


@pytest.mark.parametrize(
    "weights, sparsities, error, message",
    [
        ([], 0.5, ValueError, "weights.*at least one tensor"),
        (WEIGHT, 0.5, TypeError, "weights must be a list or tuple"),
        (iter([WEIGHT]), 0.5, TypeError, "weights must be a list or tuple"),
        ([WEIGHT, META], 0.5, ValueError, r"one device, got cpu for weights\[0\] and meta"),
        ([WEIGHT], [0.5, 0.5], ValueError, "each of the 1 weights, got 2"),
        ([WEIGHT, WEIGHT], [0.5], ValueError, "each of the 2 weights, got 1"),
        ([WEIGHT, WEIGHT], [0.5, 1.5], ValueError, r"sparsities\[1\].*got 1.5"),
        ([WEIGHT, WEIGHT], [0.5, None], TypeError, r"sparsities\[1\].*NoneType"),
        ([WEIGHT], torch.tensor([0.5, 0.5]), ValueError, r"sparsities.*shape.*got \(2,\)"),
    ],
)
def test_bad_lists_of_weights_and_sparsities_raise(weights, sparsities, error, message):
    with pytest.raises(error, match=message):
        pdp_thresholds(weights, sparsities)


@pytest.mark.parametrize(
    "arguments, message", [({}, "neither"), ({"sparsity": 0.5, "threshold": ANYWHERE}, "both")]
)
def test_sparsity_and_threshold_exclude_each_other(arguments, message):
    with pytest.raises(ValueError, match=f"exactly one of sparsity and threshold.*{message}"):
        pdp_mask(WEIGHT, **arguments)


@pytest.mark.parametrize(
    "threshold, error, message",
    [
        (0.5, TypeError, "0-d torch.Tensor, got float"),
        (torch.tensor([0.5]), ValueError, r"shape \(\), got \(1,\)"),
        (torch.tensor(0.5, dtype=torch.float64), TypeError, "torch.float32.*got torch.float64"),
        (torch.tensor(0.5, dtype=torch.bfloat16), TypeError, "got torch.bfloat16"),
        (torch.tensor(1), TypeError, "got torch.int64"),
        (META[0], ValueError, "device cpu, got meta"),
        (torch.tensor(0.5, requires_grad=True), ValueError, "must not require a gradient"),
    ],
)
def test_a_bad_threshold_raises(threshold, error, message):
    with pytest.raises(error, match="threshold.*" + message):
        pdp_mask(WEIGHT, threshold=threshold)


def test_a_float64_weight_needs_a_float64_threshold():
    with pytest.raises(TypeError, match=r"threshold must have dtype torch.float64"):
        pdp_mask(WEIGHT.double(), threshold=ANYWHERE)


@pytest.mark.parametrize("name", ["tau", "relative_tau"])
@pytest.mark.parametrize(
    "value, error, message",
    [
        (0, ValueError, "positive and finite.*got 0"),
        (-1e-4, ValueError, "positive and finite.*got -0.0001"),
        (math.nan, ValueError, "positive and finite.*got nan"),
        (math.inf, ValueError, "positive and finite.*got inf"),
        (1e-60, ValueError, "at least 1.2e-38.*got 1e-60"),
        (1e39, ValueError, r"at most 3.4e\+38.*got 1e\+39"),
        (np.float16(0), ValueError, "positive and finite.*got 0"),
        (10**400, ValueError, "positive and finite.*got 1000"),
        ("1e-4", TypeError, "number or a 0-d tensor, got str"),
        (True, TypeError, "number or a 0-d tensor, got bool"),
        (torch.tensor([0.1]), ValueError, r"shape \(\), got \(1,\)"),
        (torch.tensor(1), TypeError, "floating point dtype, got torch.int64"),
        (META[0], ValueError, "device cpu, got meta"),
        (torch.tensor(0.1, requires_grad=True), ValueError, "not require a gradient"),
    ],
)
def test_a_bad_temperature_raises(name, value, error, message):
    with pytest.raises(error, match=f"{name} must.*{message}"):
        pdp_mask(WEIGHT, 0.5, **{name: value})


def test_a_temperature_may_be_any_real_number():
    expected = pdp_mask(WEIGHT, 0.5, tau=0.25)
    for tau in (Fraction(1, 4), np.float64(0.25)):
        assert torch.equal(pdp_mask(WEIGHT, 0.5, tau=tau), expected)


def test_two_temperatures_raise():
    with pytest.raises(ValueError, match="at most one of tau and relative_tau"):
        pdp_mask(WEIGHT, 0.5, tau=0.1, relative_tau=0.1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e5m2, "float32"])
def test_a_bad_out_dtype_raises(dtype):
    with pytest.raises(TypeError, match="out_dtype must be"):
        pdp_mask(WEIGHT, 0.5, out_dtype=dtype)


@pytest.mark.parametrize("call", [pdp_mask_channel, hard_mask_channel])
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"dim": 2}, ValueError, r"dim must be a dimension of weight.*\(4, 3\), got 2"),
        ({"dim": -3}, ValueError, r"dim must be a dimension of weight.*got -3"),
        ({"dim": 0.0}, TypeError, "dim must be an int, got float"),
        ({"dim": True}, TypeError, "dim must be an int, got bool"),
        ({"norm": "l1"}, ValueError, "norm must be 'l2' or 'rms', got 'l1'"),
        ({"norm": 2}, ValueError, "norm must be 'l2' or 'rms', got 2"),
        ({"sparsity": 1.5}, ValueError, "sparsity must be in"),
        ({"weight": torch.ones(4, 3, dtype=torch.int32)}, TypeError, "weight must have dtype"),
        ({"weight": torch.tensor(1.0)}, ValueError, r"dim must be a dimension of weight.*\(\)"),
    ],
)
def test_bad_arguments_of_channel_masks_raise(call, arguments, error, message):
    with pytest.raises(error, match=message):
        call(**{"weight": torch.randn(4, 3), "sparsity": 0.5} | arguments)


def test_channel_masks_check_what_pdp_mask_checks():
    weight = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"exactly one of sparsity and threshold.*both"):
        pdp_mask_channel(weight, 0.5, threshold=ANYWHERE)
    with pytest.raises(TypeError, match=r"threshold must have dtype torch\.float32"):
        pdp_mask_channel(weight, threshold=ANYWHERE.double())
    with pytest.raises(ValueError, match="at most one of tau and relative_tau"):
        pdp_mask_channel(weight, 0.5, tau=0.1, relative_tau=0.1)
    with pytest.raises(TypeError, match="out_dtype must be"):
        pdp_mask_channel(weight, 0.5, out_dtype=torch.int32)


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_a_bad_weight_of_the_pq_index_raises(case):
    weight, message = BAD_WEIGHTS[case]
    with pytest.raises(TypeError, match=r"weight\[1\].*" + message):
        pq_index([WEIGHT, weight])
    if not isinstance(weight, list):
        with pytest.raises(TypeError, match="weight.*" + message):
            pq_index(weight)


@pytest.mark.parametrize("p, q", [(0, 1), (-0.5, 1), (1, 1), (2, 1), (1, math.inf), (math.nan, 1)])
def test_norms_out_of_order_raise(p, q):
    with pytest.raises(ValueError, match=rf"1e-05 <= p < q < inf, got p = {p}, q = {q}"):
        pq_index(WEIGHT, p, q)


@pytest.mark.parametrize("value", ["1", None, True, 1j, torch.tensor(0.7)])
def test_norms_of_another_type_raise(value):
    with pytest.raises(TypeError, match="p must be a number, got"):
        pq_index(WEIGHT, value)
    with pytest.raises(TypeError, match="q must be a number, got"):
        pq_index(WEIGHT, 0.5, value)


@pytest.mark.parametrize("scope", ["model", "", None, 0])
def test_an_unknown_scope_raises(scope):
    with pytest.raises(ValueError, match=r'scope must be "neuron", "layer" or "global", got'):
        pq_index(WEIGHT, scope=scope)


def test_a_weight_without_rows_has_no_neurons():
    with pytest.raises(ValueError, match=r"weight must have a dimension 0.*got shape \(\)"):
        pq_index(torch.tensor(1.0), scope="neuron")
    with pytest.raises(ValueError, match=r"weight\[1\] must have a dimension 0"):
        pq_index([WEIGHT, torch.tensor(1.0)], scope="neuron")


KEPT = torch.ones(12, dtype=torch.bool)


@pytest.mark.parametrize(
    "mask, error, message",
    [
        ([True] * 12, TypeError, "None or a torch.Tensor, got list"),
        (torch.ones(12), TypeError, "dtype torch.bool, got torch.float32"),
        (KEPT.to_sparse(), TypeError, "got layout torch.sparse_coo"),
        (KEPT[:3], ValueError, r"shape \(12,\), got \(3,\)"),
        (KEPT.to("meta"), ValueError, "device cpu, got meta"),
    ],
)
def test_a_bad_mask_raises(mask, error, message):
    with pytest.raises(error, match="mask must.*" + message):
        pq_index(WEIGHT, mask=mask)
    with pytest.raises(error, match=r"mask\[1\] must.*" + message):
        pq_index([WEIGHT, WEIGHT], mask=[None, mask])


@pytest.mark.parametrize(
    "weights, mask, error, message",
    [
        ([], None, ValueError, "weight must hold at least one tensor"),
        ([WEIGHT, META], None, ValueError, r"one device, got cpu for weight\[0\] and meta"),
        ([WEIGHT], KEPT, TypeError, "list of masks for a list of weights, got Tensor"),
        ([WEIGHT], [], ValueError, "one mask for each of the 1 weights, got 0"),
        ([WEIGHT], [KEPT, KEPT], ValueError, "one mask for each of the 1 weights, got 2"),
    ],
)
def test_bad_lists_of_masks_raise(weights, mask, error, message):
    with pytest.raises(error, match=message):
        pq_index(weights, mask=mask)


def test_arguments_stay_as_they_are():
    weight = torch.randn(100).requires_grad_()
    before, version = weight.detach().clone(), weight._version
    w_hat = pdp_mask(weight, 0.5)
    w_hat.sum().backward()
    hard_mask(weight, 0.5)
    pq_index(weight)
    with pytest.raises(ValueError):
        pdp_mask(weight, 1.5)
    assert torch.equal(weight.detach(), before)
    assert weight._version == version
