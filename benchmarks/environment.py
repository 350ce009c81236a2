"""Device, versions and commit of a result."""

import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import pdp_kernels
from studies.provenance import checkout_commit

# Names in a result, and the fields of nvidia-smi.
GPU_STATE = {
    "driver": "driver_version",
    "SM clock": "clocks.sm",
    "highest SM clock": "clocks.max.sm",
    "memory clock": "clocks.mem",
    "temperature": "temperature.gpu",
    "power": "power.draw",
    "highest power": "power.limit",
}


def describe_environment(device: torch.device) -> dict[str, object]:
    """Return device, versions and commit, which every result states."""
    backends = pdp_kernels.build_info()["backends"]
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": installed_version("triton"),
        "python": platform.python_version(),
        "commit": checkout_commit(),
        "pdp_kernels": pdp_kernels.__version__,
        "backends": ", ".join(name for name, live in backends.items() if live),
    } | (gpu_state() if device.type == "cuda" else {})


def gpu_state() -> dict[str, str]:
    """Return the current driver and clocks of the first GPU; "unknown" without nvidia-smi."""
    query = f"--query-gpu={','.join(GPU_STATE.values())}"
    command = ["nvidia-smi", query, "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return dict.fromkeys(GPU_STATE, "unknown")
    return dict(zip(GPU_STATE, answer.stdout.strip().split(", "), strict=True))


def device_is_lost(device: torch.device) -> bool:
    """Return whether an error such as an illegal access makes all later calls fail."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def installed_version(package: str) -> str:
    """Return the version of a package, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
