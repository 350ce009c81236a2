"""What the build left out and why, as setup.py recorded it."""

import ctypes
import functools
import json
from pathlib import Path
from typing import NamedTuple

RECORD = Path(__file__).parents[1] / "_build_record.json"
LEFT_OUT_BY_REQUEST = "it was left out by PDP_BUILD_CUDA=0"
# The oldest GPUs that kernels are compiled for, by setup.py and by Triton, whose own list of
# supported hardware begins there too.
OLDEST_CAPABILITY = (8, 0)
OLDEST_DRIVER = (12, 1)  # from this CUDA on kernel arguments may take 32,764 bytes


class BuildRecord(NamedTuple):
    """The fields of the file."""

    torch: str
    torch_cuda: str | None
    toolkit: str | None  # the version of the CUDA toolkit that was found
    left_out: dict[str, str]  # why, for each extension module that was not built


@functools.cache
def build_record() -> BuildRecord | None:
    """Return the record, or None if the package was not built, as in a fresh checkout."""
    try:
        return BuildRecord(**json.loads(RECORD.read_text()))
    except FileNotFoundError:
        return None


def reason_of(module: str, load_error: str) -> str:
    """Return why an extension module is not there: the build's reason, else the loader's."""
    record = build_record()
    if record is None:
        return f"the package was not built ({load_error})"
    return record.left_out.get(module, load_error)


def obstacle_of_the_driver() -> str | None:
    """Return why the machine's driver cannot run the CUDA module, or None.

    Only the version is asked for: this does not initialise CUDA.
    """
    record = build_record()
    if record is None or record.toolkit is None or "_C_cuda" in record.left_out:
        return None
    driver = driver_version()
    if driver is None:
        return None
    served = f"the NVIDIA driver serves CUDA {_dotted(driver)}"
    if driver[0] < major(record.toolkit):
        return f"{served}, and the module is built with {record.toolkit}"
    if driver < OLDEST_DRIVER:
        return f"{served}, and the module needs {_dotted(OLDEST_DRIVER)} or later"
    return None


def obstacle_of_the_gpus() -> str | None:
    """Return why no GPU of the machine can run the kernels, or None. Does not initialise CUDA."""
    newest = max(gpu_capabilities(), default=OLDEST_CAPABILITY)
    if newest >= OLDEST_CAPABILITY:
        return None
    return f"the GPU has compute capability {_dotted(newest)}, and 8.0 or later is needed"


def gpu_capabilities() -> list[tuple[int, int]]:
    """Return the compute capabilities of the machine's NVIDIA GPUs, as NVML has them."""
    found = []
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return []
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        for index in range(count.value):
            gpu, first, second = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            numbers = (ctypes.byref(first), ctypes.byref(second))
            if (
                nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(gpu)) == 0
                and nvml.nvmlDeviceGetCudaComputeCapability(gpu, *numbers) == 0
            ):
                found.append((first.value, second.value))
        nvml.nvmlShutdown()
    except (OSError, AttributeError):  # no NVML, or one without these functions
        return []
    return found


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def major(version: str) -> int:
    """Return 13 for "13.0"."""
    return int(version.partition(".")[0])


def driver_version() -> tuple[int, int] | None:
    """Return the newest CUDA that the NVIDIA driver serves, or None without a driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except OSError:
        return None
    return version.value // 1000, version.value % 1000 // 10
