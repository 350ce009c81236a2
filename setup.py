"""Builds the native modules: pdp_kernels._C (CPU) and pdp_kernels._C_cuda (with a CUDA toolkit).

PDP_BUILD_CUDA=0 leaves the CUDA module out, =1 makes its absence an error. TORCH_CUDA_ARCH_LIST
names the architectures to build for, from 8.0 on, CUDA_HOME the toolkit. What was left out and why
goes into the package as _build_record.json, which pdp_kernels/ops/build_record.py reads.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from setuptools.command.build_py import build_py

REQUEST = os.environ.get("PDP_BUILD_CUDA", "")
if REQUEST not in ("", "0", "1"):
    sys.exit(f"PDP_BUILD_CUDA must be 0 or 1, got {REQUEST!r}")
# The variable that names the toolkit, if one does.
NAMED_BY = next(filter(os.environ.get, ("CUDA_HOME", "CUDA_PATH")), None)


@functools.cache
def ask_nvcc(toolkit: Path, option: str) -> str:
    """Return what nvcc prints, or why it prints nothing."""
    try:
        return subprocess.check_output([str(toolkit / "bin/nvcc"), option], text=True).strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error)


def version_of(toolkit: Path) -> tuple[int, int] | None:
    """Return the release that nvcc names, or None if it names none."""
    release = re.search(r"release (\d+)\.(\d+)", ask_nvcc(toolkit, "--version"))
    return release and (int(release[1]), int(release[2]))


def dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def has_torchs_major(toolkit: Path) -> bool:
    version = version_of(toolkit)
    return version is not None and str(version[0]) == (torch.version.cuda or "").partition(".")[0]


def is_toolkit(folder: Path) -> bool:
    """Return whether nvcc and the headers are there; nvcc on PATH may be a wrapper elsewhere."""
    return all((folder / file).exists() for file in ("include/cuda_runtime.h", "bin/nvcc"))


def numbers_of(folder: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", folder.name)]


def find_toolkit() -> Path | None:
    """Return the named folder; else the first toolkit of torch's major version, or of any."""
    if NAMED_BY:
        return Path(os.environ[NAMED_BY])
    nvcc = shutil.which("nvcc")
    usual = [Path(nvcc).resolve().parents[1]] if nvcc else []
    newest_first = sorted(Path("/usr/local").glob("cuda-*"), key=numbers_of, reverse=True)
    toolkits = list(filter(is_toolkit, [*usual, Path("/usr/local/cuda"), *newest_first]))
    return next(filter(has_torchs_major, toolkits), toolkits[0] if toolkits else None)


TOOLKIT = None if REQUEST == "0" else find_toolkit()
VERSION = TOOLKIT and version_of(TOOLKIT)
if TOOLKIT is not None:
    os.environ["CUDA_HOME"] = str(TOOLKIT)  # torch reads it when cpp_extension is imported
if not os.environ.get("CXX", "").strip():
    os.environ.pop("CXX", None)  # empty is as good as unset, but not for torch

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
# Conversions of two bfloat16 numbers at once need 8.0. 7.5 lacks the 72.3 KiB of shared memory too.
TOO_OLD = re.compile(r"[1-7]\.\d|Kepler|Maxwell|Pascal|Volta|Turing")
OLDEST_CUDA = (12, 1)  # from this release on kernel arguments may take 32,764 bytes


def requested_architectures() -> list[str]:
    """Return the entries of TORCH_CUDA_ARCH_LIST, which may be names. Empty is as good as unset."""
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if requested != ["native"]:
        return requested
    gpus = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return [f"{major}.{minor}" for major, minor in sorted(set(gpus))]


def architectures() -> list[str]:
    """Return what to build for: of what was requested as much as the kernels can be built for."""
    requested = requested_architectures()
    if not requested:
        known = ask_nvcc(TOOLKIT, "--list-gpu-arch").split()
        usual = [arch for arch in ARCHITECTURES if "compute_" + arch.replace(".", "") in known]
        return [*usual[:-1], *(last + "+PTX" for last in usual[-1:])]
    return [arch for arch in requested if not TOO_OLD.match(arch)]


def obstacle_to_compiling() -> str | None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    return None if shutil.which(compiler) else f"no C++ compiler ({compiler}) was found"


def obstacle_to_cuda() -> str | None:
    if REQUEST == "0":
        return "it was left out by PDP_BUILD_CUDA=0"
    if TOOLKIT is None:
        return "no CUDA toolkit was found (set CUDA_HOME)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not is_toolkit(TOOLKIT):
        return f"{NAMED_BY} is {TOOLKIT}, which lacks bin/nvcc or include/cuda_runtime.h"
    if VERSION is None:
        return f"nvcc does not name its version: {ask_nvcc(TOOLKIT, '--version')}"
    found = f"{TOOLKIT} is CUDA {dotted(VERSION)}"
    if not has_torchs_major(TOOLKIT):
        return f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, and {found}"
    if VERSION < OLDEST_CUDA:
        return f"{found}, and 12.1 or later is needed"
    if architectures():
        return None
    if not requested_architectures():
        return f"nvcc does not name its architectures: {ask_nvcc(TOOLKIT, '--list-gpu-arch')}"
    requested = os.environ["TORCH_CUDA_ARCH_LIST"]
    return f"TORCH_CUDA_ARCH_LIST is {requested!r}, and 8.0 or later is needed"


def reasons_to_leave_out() -> dict[str, str]:
    """Return why a module is not built, for each that is not."""
    no_compiler = obstacle_to_compiling()
    no_cuda = no_compiler or obstacle_to_cuda()
    if REQUEST == "1" and no_cuda:
        sys.exit(f"PDP_BUILD_CUDA=1, but {with_advice(no_cuda)}")
    reasons = {"_C": no_compiler, "_C_cuda": no_cuda}
    return {module: reason for module, reason in reasons.items() if reason}


def with_advice(reason: str) -> str:
    if not reason.startswith("torch"):
        return reason
    # An isolated build has the newest torch, whatever is installed.
    return f"{reason}; `pip install --no-build-isolation` builds for the torch that is installed"


LEFT_OUT = reasons_to_leave_out()
for module, reason in LEFT_OUT.items():
    print(f"pdp_kernels: building without {module}: {with_advice(reason)}")


class BuildWithRecord(build_py):
    """Copies the Python files, and writes what was left out beside them."""

    def run(self) -> None:
        super().run()
        record = {
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "toolkit": VERSION and dotted(VERSION),
            "left_out": LEFT_OUT,
        }
        # An editable installation runs from the sources.
        folder = Path("." if self.editable_mode else self.build_lib, "pdp_kernels")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build_record.json").write_text(json.dumps(record, indent=2) + "\n")


def cpu_module() -> CppExtension:
    sources = ["csrc/ops_cpu.cpp", *map(str, sorted(Path("csrc/cpu").glob("*.cpp")))]
    return CppExtension(
        "pdp_kernels._C",
        sources,
        define_macros=MACROS,
        extra_compile_args=FLAGS,
        include_dirs=HEADERS,
    )


def cuda_module() -> CUDAExtension:
    chosen = ";".join(architectures())
    too_old = [arch for arch in requested_architectures() if TOO_OLD.match(arch)]
    if too_old:
        reason = f"TORCH_CUDA_ARCH_LIST has {', '.join(too_old)}, and 8.0 or later is needed"
        print(f"pdp_kernels: building the CUDA module for {chosen} alone: {reason}")
    os.environ["TORCH_CUDA_ARCH_LIST"] = chosen  # torch reads it when it compiles
    module = CUDAExtension(
        "pdp_kernels._C_cuda",
        ["csrc/ops_cuda.cu", "csrc/module_cuda.cpp"],
        define_macros=[*MACROS, ("USE_CUDA", None), ("PDP_CUDA_ARCHITECTURES", f'"{chosen}"')],
        extra_compile_args={"cxx": FLAGS, "nvcc": NVCC_FLAGS},
        include_dirs=HEADERS,
        extra_link_args=STATIC_CUDART,
    )
    module.libraries.remove("cudart")
    return module


# pybind11's own headers come before torch's copy, which a stable ABI target may not include.
HEADERS = [pybind11.get_include()]
# The CUDA runtime is linked into the module, as NVIDIA links it into NCCL and cuBLAS. Any torch
# loads the module then, whatever CUDA it brings, if the driver is new enough for the toolkit. All
# runtimes of a process share the device's primary context, and with it torch's streams and memory.
# The functions are hidden, since torch loads its own copies of them for the whole process.
STATIC_CUDART = ["-lcudart_static", "-ldl", "-lpthread", "-lrt"]
STATIC_CUDART += ["-Wl,--exclude-libs,libcudart_static.a"]

BUILDERS = {"_C": cpu_module, "_C_cuda": cuda_module}
setup(
    ext_modules=[build() for module, build in BUILDERS.items() if module not in LEFT_OUT],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildWithRecord},
)
