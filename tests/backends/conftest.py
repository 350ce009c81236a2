"""The builds under test: the CPU sources in each instruction set, and the CUDA sources."""

import platform

import pytest

from instruments.build import CXX
from tests.support.host_builds import LEVELS, CpuBuild, CudaBuild

# The installed extension runs the highest that the machine has; `make test` adds the lowest.
LEVEL_PARAMETERS = [
    pytest.param(level, marks=[] if level == "x86-64" else pytest.mark.slow) for level in LEVELS
]


@pytest.fixture(scope="session")
def portable_build():
    if CXX is None:
        pytest.skip("no C++ compiler")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("levels are those of x86-64")
    return CpuBuild("x86-64")


@pytest.fixture(scope="session")
def cpu_level(portable_build):
    """The highest level that this CPU has."""
    return portable_build.call("cpu_level")


@pytest.fixture(scope="session")
def build_of_level(portable_build, cpu_level):
    """The build of a level, made once."""
    builds = {"x86-64": portable_build}

    def build(level):
        if cpu_level < LEVELS[level]:
            pytest.skip(f"this CPU lacks {level}")
        if level not in builds:
            builds[level] = CpuBuild(level)
        return builds[level]

    return build


@pytest.fixture(scope="session")
def cuda_build():
    if CXX is None:
        pytest.skip("no C++ compiler")
    return CudaBuild()


@pytest.fixture
def cuda(cuda_build):
    """The CUDA kernels on a small device."""
    cuda_build.host.device()
    cuda_build.host.sample_from()
    return cuda_build


@pytest.fixture(params=LEVEL_PARAMETERS)
def kernels(request):
    """The CPU kernels of a level."""
    return request.getfixturevalue("build_of_level")(request.param)


@pytest.fixture(params=[*LEVEL_PARAMETERS, "CUDA"])
def build(request):
    """Any of the builds."""
    if request.param == "CUDA":
        return request.getfixturevalue("cuda")
    return request.getfixturevalue("build_of_level")(request.param)
