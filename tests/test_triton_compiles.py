"""Triton's compiler takes the kernels for every architecture, and moves 16 bytes at a time.

No GPU is needed to compile; the interpreter, which the other tests use, compiles nothing.
"""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

# Ampere, Hopper, Blackwell.
ARCHITECTURES = (80, 90, 100)

# (weight, result, threshold): storage and arithmetic dtypes.
DTYPES = [
    ("fp64", "bf16", "fp64"),
    ("fp32", "fp32", "fp32"),
    ("fp32", "bf16", "fp32"),
    ("fp16", "fp64", "fp32"),
    ("bf16", "bf16", "fp32"),
]

# Compiles the (kernel, pointers, constants, architecture) of a list, and prints the PTX of each.
PROGRAM = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pdp_kernels.triton_kernels import soft_mask, soft_mask_channel, soft_mask_nm

def compile_kernel(kernel, pointers, constants, architecture):
    module = soft_mask_nm if "_nm_" in kernel else soft_mask
    module = soft_mask_channel if "channel" in kernel or "products" in kernel else module
    kernel = getattr(module, kernel)
    names = kernel.arg_names
    if module is soft_mask:
        constants = constants | {"BLOCK": module.BLOCK}
    signature = {name: pointers.get(name, "constexpr") for name in names} | {"numel": "i64"}
    signature = {name: signature[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if name.endswith("_ptr") or name == "numel"}
    constants = {name: constants[name] for name in names if name in constants}
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": getattr(module, "NUM_WARPS", 4)}
    return triton.compile(source, target=target, options=options).asm["ptx"]

print(json.dumps([compile_kernel(*arguments) for arguments in json.load(sys.stdin)]))
"""


# Channels x neighbours of a tile: whole channels, short ones, columns; and of how many tiles.
TILES = [(1, 8192), (64, 16), (1024, 1)]

# (M, pruned, stride): 2:4 along the last dimension, and along one that is not; a padded group.
GROUPS = [(4, 2, 1), (8, 4, "i64"), (5, 2, 1)]


def specialisations():
    for (weight, result, real), relative, architecture in itertools.product(
        DTYPES, (False, True), ARCHITECTURES
    ):
        scalars = {"threshold_ptr": f"*{real}", "tau_ptr": f"*{real}", "weight_ptr": f"*{weight}"}
        forward = scalars | {"w_hat_ptr": f"*{result}", "mask_ptr": f"*{result}"}
        backward = scalars | {"grad_ptr": f"*{weight}"}
        backward |= {"grad_w_hat_ptr": f"*{result}", "grad_mask_ptr": f"*{result}"}
        tiny = torch.finfo(torch.float64 if real == "fp64" else torch.float32).tiny
        constants = {"RELATIVE": relative, "TINY": tiny, "WITH_MASK": True}
        constants |= {"FROM_W_HAT": True, "FROM_MASK": True}
        yield "_soft_mask_fwd_kernel", forward, constants, architecture
        yield "_soft_mask_bwd_kernel", backward, constants, architecture
        sizes = {"channels": "i32", "inner": "i32"}
        for channels, inner in TILES:
            tile = constants | {"CHANNELS": channels, "INNER": inner, "TILES": 16}
            norms = sizes | {"norms_ptr": f"*{real}", "products_ptr": "*fp64"}
            whole = {"WHOLE": inner == 8192}
            yield "_soft_mask_channel_fwd_kernel", forward | norms, tile, architecture
            yield (
                "_soft_mask_channel_bwd_kernel",
                backward | norms | {"divisor": "fp32"},
                tile | whole,
                architecture,
            )
            if not relative:
                products = {"left_ptr": f"*{result}", "right_ptr": f"*{weight}"}
                products |= sizes | {"sums_ptr": "*fp64", "tiles": "i32"}
                yield "_products_kernel", products, tile, architecture
        if relative:
            continue
        for m, pruned, stride in GROUPS:
            padded = 1 << (m - 1).bit_length()
            group = {"M": m, "PRUNED": pruned, "PADDED": padded, "GROUPS": 1024 // padded}
            place = {"stride": "i64"} if stride == "i64" else {}
            group |= constants if place else constants | {"stride": stride}
            yield "_soft_mask_nm_fwd_kernel", forward | place, group, architecture
            yield "_soft_mask_nm_bwd_kernel", backward | place, group, architecture
            kept = {"kept_ptr": "*i1"}
            yield "_hard_mask_nm_kernel", scalars | place | kept, group, architecture


@pytest.fixture(scope="module")
def compiled():
    """(specialisation, PTX) of each."""
    pytest.importorskip("triton")
    chosen = list(specialisations())
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(chosen),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return list(zip(chosen, json.loads(result.stdout), strict=True))


def test_every_specialisation_compiles(compiled):
    for (kernel, *_), ptx in compiled:
        assert f".entry {kernel}" in ptx


def test_all_accesses_but_those_of_the_scalars_are_16_bytes_wide(compiled):
    for specialisation, ptx in compiled:
        if specialisation[0] not in ("_soft_mask_fwd_kernel", "_soft_mask_bwd_kernel"):
            continue  # groups of 4 are 8 bytes of bfloat16, and strided members are no vector
        accesses = [line for line in ptx.splitlines() if "ld.global" in line or "st.global" in line]
        wide = [line for line in accesses if ".v4.b32" in line or ".v2.b64" in line]
        assert wide, specialisation
        assert len(accesses) - len(wide) == 2, specialisation  # t and tau
