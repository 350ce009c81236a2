"""What Triton compiles of the sums of products keeps what rounding loses of each product, once.

The interpreter fuses no product with a sum, so it cannot show what a compiler makes of them.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("80", "90", "100")
PRODUCTS = 2


@pytest.fixture(scope="module")
def ptx():
    """The PTX for each architecture, from another process: in this one, kernels are interpreted."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", __name__],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_what_a_product_loses_is_a_fused_multiply_add(ptx, architecture):
    """A thread has one element of each tile. Its products are rounded: PTX fuses no mul.rn."""
    text = ptx[architecture]
    operations = re.findall(r"^\s*((?:add|sub|mul|fma)\S*f32\S*)\s", text, re.MULTILINE)
    assert operations.count("mul.rn.f32") == PRODUCTS
    assert sum(name.startswith("fma") for name in operations) == PRODUCTS
    assert sum(name.startswith(("add", "sub")) for name in operations) >= 6 * PRODUCTS


def main() -> None:
    """Print the PTX of a kernel that adds up products of float32, by architecture, as JSON."""
    import triton
    from triton.backends.compiler import GPUTarget

    from tests.support.products_kernel import products_kernel

    pointers = ("left_ptr", "right_ptr", "sums_ptr", "errors_ptr")
    source = triton.compiler.ASTSource(
        products_kernel,
        signature=dict.fromkeys(pointers, "*fp32") | {"scale": "fp32", "tile": "constexpr"},
        constexprs={"tile": 128},
    )
    ptx = {}
    for architecture in ARCHITECTURES:
        target = GPUTarget("cuda", int(architecture), 32)
        compiled = triton.compile(source, target=target, options={"num_warps": 4})
        ptx[architecture] = compiled.asm["ptx"]
    print(json.dumps(ptx))


if __name__ == "__main__":
    main()
