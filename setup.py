"""Builds the native modules: pdp_kernels._C (CPU) and pdp_kernels._C_cuda (with a CUDA toolkit).

PDP_BUILD_CUDA=0 leaves the CUDA module out, =1 makes its absence an error. TORCH_CUDA_ARCH_LIST
names the architectures to build for, CUDA_HOME the toolkit.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup


def find_toolkit() -> Path | None:
    """Return a folder that holds the CUDA headers; nvcc on PATH may be a wrapper elsewhere."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [Path(nvcc).resolve().parents[1] if nvcc else None, "/usr/local/cuda"]
    candidates += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    folders = (Path(folder) for folder in candidates if folder)
    return next((each for each in folders if (each / "include/cuda_runtime.h").exists()), None)


TOOLKIT = find_toolkit()
if TOOLKIT is not None:
    os.environ["CUDA_HOME"] = str(TOOLKIT)  # torch reads it when cpp_extension is imported

import pybind11  # noqa: E402
import torch  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

# The oldest torch whose stable ABI is used: one build serves 2.11 and every later release.
MACROS = [("TORCH_TARGET_VERSION", "0x020b000000000000")]
# No kernel reads errno or floating point exceptions; where they might, compilers do not vectorise
# square roots and, below AVX-512, conditions.
FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-Wall"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden"]

# Ampere, Hopper, Blackwell. Later GPUs compile the PTX of the last.
ARCHITECTURES = ("8.0", "9.0", "10.0")
OLDEST_CUDA = (12, 1)  # from this release on kernel arguments may take 32,764 bytes


def ask_nvcc(option: str) -> str:
    return subprocess.check_output([TOOLKIT / "bin" / "nvcc", option], text=True)


def obstacle_to_cuda() -> str | None:
    if TOOLKIT is None:
        return "no CUDA toolkit was found (set CUDA_HOME)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    major, minor = map(int, re.search(r"release (\d+)\.(\d+)", ask_nvcc("--version")).groups())
    if major != int(torch.version.cuda.split(".")[0]):
        return f"torch is built for CUDA {torch.version.cuda}, and {TOOLKIT} is CUDA {major}"
    if (major, minor) < OLDEST_CUDA:
        return f"{TOOLKIT} is CUDA {major}.{minor}, and 12.1 or later is needed"
    return None


def wants_cuda() -> bool:
    request = os.environ.get("PDP_BUILD_CUDA", "")
    if request not in ("", "0", "1"):
        sys.exit(f"PDP_BUILD_CUDA must be 0 or 1, got {request!r}")
    obstacle = obstacle_to_cuda()
    if request == "1" and obstacle:
        sys.exit(f"PDP_BUILD_CUDA=1, but {obstacle}")
    if obstacle:
        print(f"pdp_kernels: building without CUDA: {obstacle}")
    return request != "0" and not obstacle


def extensions() -> list:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        print(f"pdp_kernels: no C++ compiler ({compiler}): installing without native kernels")
        return []
    # pybind11's own headers come before torch's copy, which a stable ABI target may not include.
    headers = pybind11.get_include()
    cpu = ["csrc/ops_cpu.cpp", *map(str, sorted(Path("csrc/cpu").glob("*.cpp")))]
    options = {"define_macros": MACROS, "extra_compile_args": FLAGS}
    modules = [CppExtension("pdp_kernels._C", cpu, include_dirs=[headers], **options)]
    if wants_cuda():
        known = ask_nvcc("--list-gpu-arch").split()
        usual = [arch for arch in ARCHITECTURES if "compute_" + arch.replace(".", "") in known]
        chosen = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(usual) + "+PTX")
        macros = [*MACROS, ("USE_CUDA", None), ("PDP_CUDA_ARCHITECTURES", f'"{chosen}"')]
        flags = {"cxx": FLAGS, "nvcc": NVCC_FLAGS}
        options = {"define_macros": macros, "extra_compile_args": flags, "include_dirs": [headers]}
        cuda = ["csrc/ops_cuda.cu", "csrc/module_cuda.cpp"]
        modules.append(CUDAExtension("pdp_kernels._C_cuda", cuda, **options))
    return modules


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
