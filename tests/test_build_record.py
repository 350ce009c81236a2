"""A build without kernels says why. On a machine with a GPU the first import says what to do."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pdp_kernels import _build_info, build_info
from pdp_kernels.ops import backends, build_record
from pdp_kernels.ops.build_record import LEFT_OUT_BY_REQUEST, BuildRecord

ROOT = Path(__file__).parents[1]
OTHER_MAJOR = "torch 2.14.1 is built for CUDA 13.0, and /usr/local/cuda is CUDA 12.8"


@pytest.fixture
def installed(monkeypatch):
    """Pretend an installation on a machine with a GPU: what was built, and what is there."""

    def pretend(
        record, *, cuda="13.0", gpus=1, driver=None, capabilities=(), error="No module named 'x'"
    ):
        monkeypatch.setattr(build_record, "build_record", lambda: record)
        monkeypatch.setattr(_build_info, "build_record", lambda: record)
        monkeypatch.setattr(build_record, "driver_version", lambda: driver)
        monkeypatch.setattr(build_record, "gpu_capabilities", lambda: list(capabilities))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        gpu = build_record.obstacle_of_the_gpus()
        reason = build_record.obstacle_of_the_driver() or build_record.reason_of("_C_cuda", error)
        monkeypatch.setattr(backends, "gpu_obstacle", gpu)
        monkeypatch.setattr(backends, "triton_error", gpu)
        monkeypatch.setitem(backends.load_errors, "_C_cuda", gpu or reason)

    return pretend


def left_out(reason, *, torch="2.14.1", torch_cuda="13.0", toolkit=None, compiler=True):
    reasons = {"_C_cuda": reason} if compiler else {"_C": reason, "_C_cuda": reason}
    return BuildRecord(torch, torch_cuda, toolkit, reasons)


def the_warning():
    with pytest.warns(UserWarning, match="pdp_kernels has no CUDA kernels: ") as caught:
        _build_info.warn_without_cuda_kernels()
    (warning,) = caught
    return str(warning.message)


def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _build_info.warn_without_cuda_kernels()
    return True


def test_without_a_compiler(installed):
    installed(left_out("no C++ compiler (c++) was found", compiler=False))
    message = the_warning()
    assert "no C++ compiler (c++) was found. " in message
    assert "Install a C++ compiler and build again" in message


def test_without_a_toolkit(installed):
    installed(left_out("no CUDA toolkit was found (set CUDA_HOME)"))
    message = the_warning()
    assert "no CUDA toolkit was found" in message
    assert "Set CUDA_HOME to a toolkit of CUDA 13, " in message


def test_an_isolated_build_had_another_torch_than_the_one_installed(installed):
    installed(left_out(OTHER_MAJOR, toolkit="12.8"), cuda="12.8")
    message = the_warning()
    assert OTHER_MAJOR in message
    assert "The build had torch 2.14.1: build again for the torch that is installed" in message
    assert "pip install --no-build-isolation" in message


def test_the_toolkit_does_not_fit_the_torch_that_is_installed(installed):
    installed(left_out(OTHER_MAJOR, toolkit="12.8"), cuda="13.0")
    assert "Set CUDA_HOME to a toolkit of CUDA 13, " in the_warning()


def test_a_checkout_that_was_not_built(installed):
    installed(None, error="No module named 'pdp_kernels._C_cuda'")
    message = the_warning()
    assert "the package was not built (No module named 'pdp_kernels._C_cuda')" in message
    assert "pip install --no-build-isolation --editable ." in message


def test_a_driver_older_than_the_toolkit(installed):
    installed(BuildRecord("2.11.0", "13.0", "13.0", {}), cuda="12.6", driver=(12, 4))
    message = the_warning()
    assert "the NVIDIA driver serves CUDA 12.4, and the module is built with 13.0. " in message
    assert "Or, for a driver of CUDA 12.1 or later, set CUDA_HOME to an older toolkit " in message


def test_a_driver_that_takes_short_kernel_arguments_alone(installed):
    record = BuildRecord("2.11.0", "12.8", "12.8", {})
    installed(record, cuda="12.8", driver=(12, 0))
    message = the_warning()
    assert "the NVIDIA driver serves CUDA 12.0, and the module needs 12.1 or later. " in message
    installed(record, cuda="12.8", driver=(12, 1))
    assert build_record.obstacle_of_the_driver() is None


def test_a_driver_of_the_toolkits_major_serves_it(installed):
    installed(BuildRecord("2.11.0", "13.0", "13.2", {}), driver=(13, 0), error="the loader's words")
    assert build_record.obstacle_of_the_driver() is None
    assert "the loader's words. " in the_warning()


def test_gpus_that_are_too_old(installed):
    installed(BuildRecord("2.11.0", "13.0", "13.0", {}), gpus=2, capabilities=[(7, 0), (7, 5)])
    message = the_warning()
    assert "the GPU has compute capability 7.5, and 8.0 or later is needed. " in message
    assert "Everything that has CUDA tensors is computed by slower PyTorch operations" in message
    assert "build again" not in message
    reasons = build_info()["reasons"]
    assert reasons["cuda"] == reasons["triton"] == backends.gpu_obstacle


def test_one_gpu_that_is_new_enough_is_enough(installed):
    installed(BuildRecord("2.11.0", "13.0", "13.0", {}), capabilities=[(7, 5), (8, 0)], error="x")
    assert build_record.obstacle_of_the_gpus() is None
    assert "the GPU" not in the_warning()


def test_a_build_for_older_architectures_alone(installed):
    reason = "TORCH_CUDA_ARCH_LIST is '7.5', and 8.0 or later is needed"
    installed(left_out(reason, toolkit="13.0"), capabilities=[(9, 0)])
    message = the_warning()
    assert f"{reason}. " in message
    assert "Set TORCH_CUDA_ARCH_LIST to 8.0 or later, or unset it, and build again" in message


def test_nothing_is_said_where_nothing_is_lost(installed, monkeypatch):
    installed(left_out(LEFT_OUT_BY_REQUEST))
    assert no_warning(), "the build was asked to leave the module out"
    assert build_info()["reasons"]["cuda"] == LEFT_OUT_BY_REQUEST
    installed(left_out(OTHER_MAJOR), gpus=0)
    assert no_warning(), "no GPU"
    installed(left_out(OTHER_MAJOR), cuda=None)
    assert no_warning(), "a torch without CUDA"
    monkeypatch.setitem(backends.load_errors, "_C_cuda", None)
    assert no_warning(), "the module is loaded"


PROGRAM = """
import ctypes, sys, torch

sys.modules["pdp_kernels._C"] = None  # the checkout's
torch.version.cuda = "13.0"
torch.cuda.device_count = lambda: 1

class Libraries:
    def __init__(self, name):
        if name != "libcuda.so.1" and (name != "libnvidia-ml.so.1" or not {capabilities}):
            raise OSError(name)
    def cuDriverGetVersion(self, version):
        version._obj.value = 12040
        return 0
    def nvmlInit_v2(self):
        return 0
    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = len({capabilities})
        return 0
    def nvmlDeviceGetHandleByIndex_v2(self, index, gpu):
        gpu._obj.value = index
        return 0
    def nvmlDeviceGetCudaComputeCapability(self, gpu, major, minor):
        major._obj.value, minor._obj.value = {capabilities}[gpu.value or 0]
        return 0
    def nvmlShutdown(self):
        return 0

ctypes.CDLL = Libraries
import pdp_kernels
print(pdp_kernels.build_info()["reasons"]["cuda"])
for name in ("soft_mask", "soft_mask_nm", "channel_norms", "thresholds"):
    print(name, torch._C._dispatch_has_kernel_for_dispatch_key("pdp::" + name, "CUDA"))
"""


def import_copy(folder, record, capabilities=()):
    """Run the program on a copy of the package whose CUDA module must not be loaded."""
    package = folder / "pdp_kernels"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build_record.json")
    shutil.copytree(ROOT / "pdp_kernels", package, ignore=ignored)
    shutil.copytree(ROOT / "triton_kernels", package / "triton_kernels", ignore=ignored)
    (package / "_C_cuda.py").write_text("raise ImportError('this is the CUDA module')\n")
    if record is not None:
        (package / "_build_record.json").write_text(json.dumps(record._asdict()))
    program = PROGRAM.replace("{capabilities}", repr(list(capabilities)))
    (folder / "program.py").write_text(textwrap.dedent(program))
    result = subprocess.run(
        [sys.executable, "program.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result


def test_the_first_import_warns_at_the_users_line(tmp_path):
    result = import_copy(tmp_path, None)
    line = PROGRAM.splitlines().index("import pdp_kernels") + 1
    assert f"program.py:{line}: UserWarning: pdp_kernels has no CUDA kernels" in result.stderr
    assert result.stdout.startswith("the package was not built (this is the CUDA module)\n")


def test_kernels_that_the_driver_cannot_run_are_not_loaded(tmp_path):
    result = import_copy(tmp_path, BuildRecord("2.11.0", "13.0", "13.0", {}))
    assert result.stdout.startswith("the NVIDIA driver serves CUDA 12.4")
    assert "UserWarning: pdp_kernels has no CUDA kernels" in result.stderr


def test_no_kernel_is_registered_for_gpus_that_are_too_old(tmp_path):
    record = BuildRecord("2.11.0", "12.8", "12.8", {})
    result = import_copy(tmp_path, record, [(7, 0), (7, 5)])
    reason, *registered = result.stdout.splitlines()
    assert reason == "the GPU has compute capability 7.5, and 8.0 or later is needed"
    assert registered == [
        f"{name} False" for name in ("soft_mask", "soft_mask_nm", "channel_norms", "thresholds")
    ]
    assert "UserWarning: pdp_kernels has no CUDA kernels" in result.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_a_gpu_that_is_new_enough_takes_the_kernels_that_are_there(tmp_path):
    record = BuildRecord("2.11.0", "12.8", "12.8", {})
    result = import_copy(tmp_path, record, [(7, 5), (9, 0)])
    reason, *registered = result.stdout.splitlines()
    assert reason == "this is the CUDA module"
    assert registered[:3] == [f"{n} True" for n in ("soft_mask", "soft_mask_nm", "channel_norms")]
