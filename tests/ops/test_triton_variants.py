"""Triton compiles few variants of each kernel for a network.

The first step of a training waits for them, half a second or more each. Triton is asked by the
operators' own launchers on tensors without memory, and compiles nothing here.
"""

from functools import partial

import pytest
import torch

from benchmarks import layer_shapes
from tests.support.masks import REAL
from tests.support.parameters import by_turns
from tests.support.triton_variants import count_variants
from tests.support.weights import DTYPES


def unstructured(weight, t, out_dtype=None, relative=True, grad=None):
    from pdp_kernels.triton_kernels import soft_mask

    soft_mask.soft_mask(weight, t, t, relative, out_dtype, False)
    grad = weight.to(out_dtype) if grad is None else grad
    soft_mask.soft_mask_backward(grad, None, weight, t, t, relative)


def groups(weight, t, m=4, dim=1, layout=lambda weight: weight):
    from pdp_kernels.triton_kernels import soft_mask_nm

    if weight.shape[dim] % m == 0:
        weight = layout(weight)
        which = (m, torch.empty((), dtype=torch.int64, device="meta"), dim)
        soft_mask_nm.soft_mask_nm(weight, t, *which, True, None, False)
        soft_mask_nm.soft_mask_nm_backward(weight, None, weight, t, *which, True)
        soft_mask_nm.hard_mask_nm(weight, *which)


def unaligned(weight):
    return torch.empty(weight.numel() + 1, device="meta")[1:].view(weight.shape)


def channels(dim, weight, t):
    from pdp_kernels.triton_kernels import soft_mask_channel

    norms = soft_mask_channel.channel_norms(weight, dim, True)
    rest = (weight, norms, t, t, dim, True)
    soft_mask_channel.soft_mask_channel(*rest, None)
    soft_mask_channel.soft_mask_channel_backward(weight, None, *rest, True)


def layers(network, dtype):
    """Return the weights, convolutions in channels_last, and their thresholds out of one table."""
    weights = [torch.empty(shape, dtype=dtype, device="meta") for shape, _ in network()]
    weights = [w.to(memory_format=torch.channels_last) if w.dim() == 4 else w for w in weights]
    return zip(weights, torch.empty(len(weights), dtype=REAL[dtype], device="meta"), strict=True)


def train(network, pattern):
    """Train and evaluate in float32."""
    for weight, t in layers(network, torch.float32):
        pattern(weight, t)


def mask_sizes(dtype, out_dtype, relative):
    """Mask weights of every kind of size, with thresholds of every alignment."""
    table = torch.empty(4, dtype=REAL[dtype], device="meta")
    for size in (1, 15, 16, 2048, 4099 * 1021, 1 << 31):
        for t in table:
            weight = torch.empty(size, dtype=dtype, device="meta")
            unstructured(weight, t, out_dtype, relative)


def mask_views(aligned):
    """Mask weights, or take gradients, that begin at any address: of a flat buffer, for example."""
    buffer, t = torch.empty(4200, device="meta"), torch.empty((), device="meta")
    for first in (0, 4) if aligned else (0, 1, 2, 3, 4):
        for size in (16, 4000):
            plain, view = torch.empty(size, device="meta"), buffer[first : first + size]
            for weight, grad in ((view, plain), (plain, view), (view, view)):
                unstructured(weight, t, grad=grad)


NETWORKS = (layer_shapes.resnet50, layer_shapes.gpt2)
PATTERNS = {
    "unstructured": unstructured,
    "2:4": groups,
    "2:4 along outputs": partial(groups, dim=0),
    "2:4, contiguous": partial(groups, layout=torch.Tensor.contiguous),
    "2:4, unaligned": partial(groups, layout=unaligned),
    "2:3 along inputs": partial(groups, m=3, dim=0),
    "output channels": partial(channels, 0),
    "input channels": partial(channels, 1),
}
TRAININGS = {
    f"{network.__name__}, {name}": partial(train, network, pattern)
    for network in NETWORKS
    for name, pattern in PATTERNS.items()
}
OPTIONS = {
    f"{dtype} to {out_dtype}, relative = {relative}": partial(
        mask_sizes, dtype, out_dtype, relative
    )
    for dtype, out_dtype, relative in by_turns(DTYPES, DTYPES, [False, True])
}
VIEWS = {
    "aligned views": partial(mask_views, True),
    "all views": partial(mask_views, False),
}
STEPS = TRAININGS | OPTIONS | VIEWS

# Of all kernels together.
MOST = {
    "resnet50, unstructured": 2,
    "resnet50, 2:4": 3,
    "resnet50, 2:4 along outputs": 6,  # one layer has an odd number of weights for each
    "resnet50, 2:4, contiguous": 6,  # members are neighbours in some layers, apart in others
    "resnet50, 2:4, unaligned": 3,
    "resnet50, output channels": 4,
    "resnet50, input channels": 6,
    "gpt2, unstructured": 2,
    "gpt2, 2:4": 3,
    "gpt2, 2:4 along outputs": 3,
    "gpt2, 2:4, contiguous": 3,
    "gpt2, 2:4, unaligned": 3,
    "gpt2, 2:3 along inputs": 3,
    "gpt2, output channels": 4,
    "gpt2, input channels": 6,
}


@pytest.fixture(scope="module")
def counts():
    pytest.importorskip("triton")
    return count_variants(f"{__name__}:STEPS")


@pytest.mark.parametrize("name", MOST)
def test_no_more_variants_than_committed(counts, name):
    assert 0 < sum(counts[name].values()) <= MOST[name]


def test_a_soft_mask_has_one_variant_for_its_dtypes_and_options(counts):
    """Of each kernel, for every size and wherever a threshold stands in a table."""
    one = {"_soft_mask_fwd_kernel": 1, "_soft_mask_bwd_kernel": 1}
    assert {name: counts[name] for name in OPTIONS} == dict.fromkeys(OPTIONS, one)


def test_a_soft_mask_has_one_more_variant_for_views_that_begin_anywhere(counts):
    kernels = ("_soft_mask_fwd_kernel", "_soft_mask_bwd_kernel")
    assert counts["aligned views"] == dict.fromkeys(kernels, 1)
    assert counts["all views"] == dict.fromkeys(kernels, 2)
