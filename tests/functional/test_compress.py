"""2:4 compression is bit for bit PyTorch's CUTLASS conversion of the hard 2:4 matrix."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from pdp_kernels import compress_2to4, hard_mask
from pdp_kernels.ops import reference
from tests.support.compression import (
    assert_same_compression,
    check_compression,
    every_group,
    pruned_to_2to4,
)
from tests.support.weights import DISTRIBUTIONS, HALVES, weight_of

SHAPES = [(32, 64), (64, 128), (96, 192), (160, 64), (32, 1088)]


@pytest.fixture(
    params=[
        "reference",
        "native",
        "triton-interpreter",
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def compress(request):
    """compress_2to4 of a backend, from and to CPU tensors."""
    if request.param == "reference":
        return reference.compress_2to4
    if request.param == "native":
        return torch.ops.pdp.compress_2to4
    if request.param == "gpu":
        return lambda weight: [
            tensor.cpu() for tensor in torch.ops.pdp.compress_2to4(weight.cuda())
        ]
    if torch.cuda.is_available():
        pytest.skip("with a GPU, Triton compiles")
    request.getfixturevalue("quick_interpreter")
    from pdp_kernels.triton_kernels.compress import compress_2to4

    return compress_2to4


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_equals_torch(compress, distribution, dtype):
    for shape in SHAPES:
        rows, cols = shape
        check_compression(compress, weight_of(distribution, rows * cols, dtype).view(shape))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_equals_torch_on_every_order_and_tie_of_a_group(compress, dtype):
    check_compression(compress, every_group(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kept", [0, 0.05, 0.3])
def test_equals_torch_on_mostly_zero_matrices(compress, kept, dtype):
    weight = torch.randn(96, 192) * (torch.rand(96, 192) < kept)
    check_compression(compress, weight.to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_matrix_already_2to4_is_packed_as_it_is(compress, dtype):
    weight = pruned_to_2to4(torch.randn(96, 192).to(dtype))
    assert_same_compression(compress(weight), sparse_semi_structured_from_dense_cutlass(weight))


def test_equals_torch_on_weight_times_mask(compress):
    weight = torch.randn(64, 128).bfloat16()
    mask = torch.stack([hard_mask(group, 0.5) for group in weight.view(-1, 4)]).view_as(weight)
    assert_same_compression(
        compress(weight), sparse_semi_structured_from_dense_cutlass(weight * mask)
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_unpacks_to_the_hard_2to4_matrix(compress, dtype):
    weight = torch.randn(160, 320).to(dtype)
    unpacked = sparse_semi_structured_to_dense_cutlass(*compress(weight))
    assert torch.equal(unpacked, pruned_to_2to4(weight))


def test_hand_computed_groups(compress):
    groups = [[1, -4, 3, 2], [5, 5, 5, 5], [0, 0, 0, 0], [7, 0, 0, 0], [0, 7, 0, 0], [0, 0, 7, 0]]
    weight = torch.zeros(32, 64)
    weight[0, :24] = torch.tensor(groups).flatten()
    values, metadata = compress(weight.bfloat16())
    assert values[0, :12].tolist() == [-4, 3, 5, 5, 0, 0, 7, 0, 7, 0, 7, 0]
    # Places (1, 2), (2, 3), (2, 3), (0, 2); then (1, 2), (2, 3) and two groups of zeros.
    words = metadata.flatten()[[0, 2]].int() & 0xFFFF
    assert words.tolist() == [0x8EE9, 0xEEE9]


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.t(),
        lambda w: w[:, ::2],
        lambda w: w[::2],
        lambda w: w[:, 1:129],
        lambda w: w.flatten()[1 : 1 + 64 * 128].view(64, 128),
        lambda w: w[:1].expand(32, -1),
    ],
    ids=["transposed", "columns", "rows", "odd columns", "misaligned", "expanded"],
)
def test_any_layout_gives_the_numbers_of_its_contiguous_copy(compress, view):
    check_compression(compress, view(torch.randn(192, 256).half()))


def test_takes_no_gradient(device):
    weight = torch.randn(32, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    assert not any(tensor.requires_grad for tensor in compress_2to4(weight))


def test_bitwise_repeatable_on_any_number_of_threads(compress, set_threads):
    weight = torch.randint(-3, 4, (256, 512)).bfloat16()
    first = compress(weight)
    for threads in (1, 1, 2, 3):
        set_threads(threads)
        assert all(map(torch.equal, compress(weight), first))


def test_compiles_without_a_graph_break(device):
    weight = torch.randn(64, 128, device=device).bfloat16()
    compiled = torch.compile(lambda w: compress_2to4(w), fullgraph=True)
    assert all(map(torch.equal, compiled(weight), compress_2to4(weight)))


@pytest.mark.parametrize(
    "shape", [(31, 64), (32, 63), (32, 32), (32, 96), (0, 64), (32, 0), (64,), (), (1, 32, 64)]
)
def test_another_shape_raises(shape):
    message = rf"weight must have shape.*32 and cols of 64, got {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        compress_2to4(torch.zeros(shape, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8, torch.bool], ids=str)
def test_another_dtype_raises(dtype):
    with pytest.raises(TypeError, match=f"weight must have dtype.*got {dtype}"):
        compress_2to4(torch.zeros(32, 64, dtype=dtype))


def test_a_weight_of_another_type_raises():
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor, got list"):
        compress_2to4([[0.0]])
    with pytest.raises(TypeError, match=r"weight must be a dense.*sparse_coo"):
        compress_2to4(torch.zeros(32, 64, dtype=torch.float16).to_sparse())


# Prints the PTX of the kernel for each architecture: Ampere, Hopper, Blackwell.
PROGRAM = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pdp_kernels.triton_kernels import compress as module

kernel = module._compress_2to4_kernel
types = {"weight_ptr": "*i16", "values_ptr": "*i16", "metadata_ptr": "*i16",
         "rows": "i32", "cols": "i32"}
signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
constants = {"NAN": 0x7F81, "ROWS": module.ROWS, "COLUMNS": module.COLUMNS}
source = ASTSource(kernel, signature, constants, aligned)
options = {"num_warps": module.NUM_WARPS}
print(json.dumps([
    triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["ptx"]
    for architecture in (80, 90, 100)
]))
"""


def test_triton_kernel_compiles_and_moves_16_bytes_at_a_time():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for ptx in json.loads(result.stdout):
        assert ".entry _compress_2to4_kernel" in ptx
        accesses = [line for line in ptx.splitlines() if "ld.global" in line or "st.global" in line]
        narrow = [line for line in accesses if ".v4.b32" not in line]
        assert len(accesses) > len(narrow)
        assert all("st.global.b16" in line for line in narrow), narrow  # the metadata
