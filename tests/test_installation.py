"""The package works, and says so, with and without its native modules and Triton."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import version

import pytest
import torch

import pdp_kernels
from pdp_kernels import ops


def run(program, **environment):
    """Run a program in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


WITHOUT = """
    import sys
    for missing in {missing}:
        sys.modules[missing] = None
    import torch
    import pdp_kernels
    info = pdp_kernels.build_info()
"""


def test_build_info_says_what_is_live():
    info = pdp_kernels.build_info()
    assert info["version"] == pdp_kernels.__version__
    assert info["torch"] == torch.__version__
    assert set(info["backends"]) == {"reference", "native", "cuda", "triton"}
    assert info["backends"]["native"]
    assert info["native"]["torch"] and info["native"]["compiler"]
    for name, live in info["backends"].items():
        assert live == (name not in info["reasons"])


@pytest.mark.installed
def test_metadata_states_the_same_version():
    assert version("pdp_kernels") == pdp_kernels.__version__


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_a_cuda_build_keeps_its_native_kernels_on_a_cpu_only_torch():
    info = pdp_kernels.build_info()
    assert info["backends"]["native"]
    assert info["cuda"] is None
    assert info["reasons"]["cuda"] != "torch finds no CUDA device"  # the loader's own words


def test_native_kernels_are_registered():
    """`make test` builds the extension: tests of it must not pass on the reference."""
    for name in ops.schemas.SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pdp::{name}", "CPU")


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
def test_cuda_kernels_are_linked_and_registered():
    """With a CUDA build of torch the module loads, GPU or not, unless the build left it out."""
    info = pdp_kernels.build_info()
    if "_C_cuda" in ops.build_record.build_record().left_out:
        pytest.skip("built without CUDA")
    assert info["cuda"]["architectures"], info["reasons"]
    for name in ("prune_counts", "thresholds", "hard_mask", "soft_mask_list"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pdp::{name}", "CUDA")


@pytest.mark.skipif(not shutil.which("readelf"), reason="readelf is not there")
def test_the_modules_need_no_library_but_torchs_and_the_systems():
    """The CUDA runtime is linked in and hidden: torch's own copy takes no part, and gets none."""
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libdl.so.2"}
    system |= {"libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    checked = 0
    for module in ("_C", "_C_cuda"):
        spec = importlib.util.find_spec(f"pdp_kernels.{module}")
        if spec is None:
            continue
        command = ["readelf", "--wide", "--dynamic", "--dyn-syms", spec.origin]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        libraries = set(re.findall(r"NEEDED.*\[(.*)\]", text))
        assert libraries - system <= {"libc10.so", "libtorch_cpu.so", "libtorch_cuda.so"}
        symbols = {line.split()[7] for line in text.splitlines() if "GLOBAL" in line}
        assert not {name for name in symbols if name.startswith(("cuda", "__cuda"))}
        checked += 1
    assert checked > 0


def test_works_without_the_extension():
    missing = ["pdp_kernels._C", "pdp_kernels._C_cuda"]
    result = run(
        WITHOUT.format(missing=missing)
        + """
    assert not info["backends"]["native"] and not info["backends"]["cuda"]
    assert info["native"] is None and info["cuda"] is None
    assert set(info["reasons"]) >= {"native", "cuda"}
    weight = torch.tensor([3.0, -1.0, -4.0, 2.0], requires_grad=True)
    assert pdp_kernels.pdp_threshold(weight, 0.5).item() == 2.5
    assert pdp_kernels.pdp_thresholds([weight], torch.tensor([0.25])).tolist() == [1.5]
    assert pdp_kernels.hard_mask(weight, 0.5).tolist() == [True, False, True, False]
    w_hat = pdp_kernels.pdp_mask(weight, 0.5)
    w_hat.sum().backward()
    assert w_hat.tolist() == [3, 0, -4, 0] and weight.grad.tolist() == [1, 0, 1, 0]
    """
    )
    assert result.returncode == 0, result.stderr


def test_imports_without_triton():
    result = run(
        """
    import importlib.util, sys
    find_spec = importlib.util.find_spec
    def without_triton(name, *rest):
        return None if name == "triton" else find_spec(name, *rest)
    importlib.util.find_spec = without_triton
    sys.modules["triton"] = None
    import torch, pdp_kernels
    info = pdp_kernels.build_info()
    assert not info["backends"]["triton"]
    assert info["reasons"]["triton"] == "No module named 'triton'"
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("pdp::soft_mask", "CUDA")
    pdp_kernels.pdp_mask(torch.randn(10), 0.5)
    """
    )
    assert result.returncode == 0, result.stderr


def test_importing_does_not_import_triton_kernels():
    result = run(
        """
    import sys, torch, pdp_kernels
    pdp_kernels.pdp_mask(torch.randn(10), 0.5)
    assert "pdp_kernels.triton_kernels.soft_mask" not in sys.modules
    """
    )
    assert result.returncode == 0, result.stderr


def test_all_lists_every_public_name():
    for name in pdp_kernels.__all__:
        assert getattr(pdp_kernels, name) is not None
    public = {name for name in pdp_kernels.__all__ if not name.startswith("_")}
    imported = {name for name in vars(pdp_kernels) if callable(getattr(pdp_kernels, name))}
    assert public == imported
