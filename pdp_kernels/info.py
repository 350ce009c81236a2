"""What a bug report should say: versions, build, backends, GPUs and environment variables.

    python -m pdp_kernels.info

It reports on an installation whose torch does not load, too.
"""

import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "pybind11", "setuptools")
# Prefixes of the environment variables that change what the package, torch or CUDA do.
VARIABLES = ("PDP_", "CUDA_", "NVIDIA_", "PYTORCH_", "TORCH", "TRITON_", "OMP_", "MKL_", "LD_")


def report() -> str:
    """Return the report. A part that fails states its error, and the others follow."""
    parts = {
        "system": _system,
        "packages": _packages,
        "torch": _torch,
        "pdp_kernels": _pdp_kernels,
        "GPUs": _gpus,
        "environment": _environment,
    }
    return "\n".join(line for name, part in parts.items() for line in _section(name, part))


def _section(name: str, part: Callable[[], Iterator[tuple[str, Any]]]) -> Iterator[str]:
    yield f"{name}:"
    try:
        for key, value in part():
            yield f"  {key}: {value}"
    except Exception as error:
        yield f"  error: {type(error).__name__}: {error}"


def _system() -> Iterator[tuple[str, Any]]:
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", platform.platform()
    yield "C library", " ".join(platform.libc_ver())
    yield "CPUs", os.cpu_count()


def _packages() -> Iterator[tuple[str, Any]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"


def _torch() -> Iterator[tuple[str, Any]]:
    import torch

    yield "version", torch.__version__
    yield "CUDA", torch.version.cuda
    yield "folder", ", ".join(torch.__path__)
    yield "threads", torch.get_num_threads()


def _pdp_kernels() -> Iterator[tuple[str, Any]]:
    from pdp_kernels._version import __version__

    yield "version", __version__
    yield "folder", Path(__file__).parent
    record = Path(__file__).with_name("_build_record.json")
    yield "build", " ".join(record.read_text().split()) if record.exists() else "not built"
    from pdp_kernels._build_info import build_info

    info = build_info()
    yield from ((name, info[name]) for name in ("native", "cuda", "backends"))
    yield from ((f"no {name}", why) for name, why in info["reasons"].items())


def _gpus() -> Iterator[tuple[str, Any]]:
    import torch

    from pdp_kernels.ops.build_record import driver_version

    driver = driver_version()
    yield "CUDA of the driver", driver and ".".join(map(str, driver))
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        yield str(index), f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}"


def _environment() -> Iterator[tuple[str, Any]]:
    yield from ((name, os.environ[name]) for name in sorted(os.environ) if _counts(name))


def _counts(variable: str) -> bool:
    return variable.startswith(VARIABLES)


def main() -> None:
    print(report())


if __name__ == "__main__":
    main()
