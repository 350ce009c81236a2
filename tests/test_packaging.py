"""The source distribution and the wheel are complete, with a compiler and without one."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from pdp_kernels.ops.build_record import LEFT_OUT_BY_REQUEST
from tests.support.forks import run_program

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")

# What only a git checkout needs.
NOT_DISTRIBUTED = {".gitignore", ".pre-commit-config.yaml"}
# What the build backend adds.
GENERATED = {"PKG-INFO", "setup.cfg", "pdp_kernels.egg-info"}


def build(kind, cwd, out, **environment):
    """Return the file that the build backend makes, and all it printed."""
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    result = run_program(program, cwd, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    (made,) = out.iterdir()
    return made, result.stdout


def tracked_files():
    """Return the names of the files under version control that are there."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return {name for name in names if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The source distribution of a clean checkout, unpacked out of reach of this one."""
    clean = tmp_path_factory.mktemp("clean")
    for name in tracked_files():
        (clean / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, clean / name)
    sdist, _ = build("sdist", clean, tmp_path_factory.mktemp("sdist"))
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


def python_files(package):
    return {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}


def unpack_and_run(wheel, folder, program):
    """Run a program on an unpacked wheel, and check that it imports that."""
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    result = subprocess.run(
        [sys.executable, "-c", f"{program}\nprint(pdp_kernels.__file__)"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(site))


def is_one_of(name, places):
    return any(name == place or name.startswith(f"{place}/") for place in places)


def test_source_distribution_holds_all_files_but_those_of_git(unpacked):
    paths = (path for path in unpacked.rglob("*") if path.is_file())
    found = {str(path.relative_to(unpacked)) for path in paths}
    expected = {name for name in tracked_files() if not is_one_of(name, NOT_DISTRIBUTED)}
    assert {name for name in found if not is_one_of(name, GENERATED)} == expected


def test_the_citation_and_the_changelog_have_the_version_and_its_date():
    namespace = {}
    exec((ROOT / "pdp_kernels/_version.py").read_text(), namespace)
    citation = dict(re.findall(r"(?m)^([\w-]+): (\S+)$", (ROOT / "CITATION.cff").read_text()))
    assert citation["version"] == namespace["__version__"]
    heading = f"## [{citation['version']}] - {citation['date-released']}"
    assert heading in (ROOT / "CHANGELOG.md").read_text().splitlines()


def package_names(requirements):
    """Return the names, without extras, versions and markers."""
    return {re.match(r"[\w-]+", requirement).group() for requirement in requirements}


def test_the_table_of_dependencies_names_each_and_an_extra_is_a_part_of_its_group():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = {
        name: package_names(requirements)
        for name, requirements in project["dependency-groups"].items()
    }
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## What each dependency is for")[2]
    named = set(re.findall(r"[\w-]+", table))
    assert set().union(*groups.values()) <= named
    extras = project["project"]["optional-dependencies"]
    for name in ("bench", "docs", "test"):
        own = package_names(extras[name]) - {"pdp_kernels"}
        assert own <= groups[name] | groups["test"]


@pytest.mark.slow
def test_wheel_built_from_it_works(unpacked, tmp_path):
    (tmp_path / "out").mkdir()
    wheel, _ = build("wheel", unpacked, tmp_path / "out", PDP_BUILD_CUDA="0")
    program = """
import torch, pdp_kernels
assert pdp_kernels.build_info()["backends"]["native"], pdp_kernels.build_info()
assert pdp_kernels.pdp_mask(torch.tensor([1.0, 2.0]), 0.5).tolist() == [0, 2]
"""
    unpack_and_run(wheel, tmp_path, program)


def test_without_a_compiler_the_pure_package_is_built_and_says_so(unpacked, tmp_path):
    (tmp_path / "out").mkdir()
    wheel, printed = build("wheel", unpacked, tmp_path / "out", CXX="no-such-compiler")
    reason = "no C++ compiler (no-such-compiler) was found"
    assert f"building without _C: {reason}" in printed
    record = json.loads(zipfile.ZipFile(wheel).read("pdp_kernels/_build_record.json"))
    assert record["left_out"] == {"_C": reason, "_C_cuda": reason}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert python_files("pdp_kernels") | {"pdp_kernels/py.typed"} <= names
    assert "pdp_kernels/triton_kernels/soft_mask.py" in names
    assert not any(name.endswith(".so") for name in names)
    assert not any(name.startswith("triton_kernels/") for name in names)
    program = """
import sys
sys.modules["pdp_kernels._C"] = sys.modules["pdp_kernels._C_cuda"] = None  # the checkout's
import torch, pdp_kernels
assert pdp_kernels.pdp_mask(torch.tensor([1.0, 2.0]), 0.5).tolist() == [0, 2]
"""
    unpack_and_run(wheel, tmp_path, program)


def test_asking_for_cuda_without_a_toolkit_is_an_error(unpacked):
    program = """
import pathlib, runpy, sys
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path: path.name != "cuda_runtime.h" and exists(path)
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py")
"""
    result = run_program(program, unpacked, PDP_BUILD_CUDA="1")
    assert result.returncode != 0
    assert "PDP_BUILD_CUDA=1, but" in result.stderr


def add_toolkit(home, answer):
    """Make a folder that pretends to be a CUDA toolkit; its nvcc runs a line of a shell."""
    (home / "include").mkdir(parents=True)
    (home / "include/cuda_runtime.h").touch()
    (home / "bin").mkdir()
    (home / "bin/nvcc").write_text(f"#!/bin/sh\n{answer}\n")
    (home / "bin/nvcc").chmod(0o755)


def run_setup(unpacked, tmp_path, *, torch_cuda, toolkit=None, **environment):
    """Run setup.py build_py with a torch of one CUDA and a toolkit that pretends to be another.

    The folder tmp_path takes the place of /usr/local. Without a toolkit no variable names one.
    """
    if toolkit is not None:
        home = tmp_path / "toolkit"
        known = "compute_75 compute_80 compute_90"
        add_toolkit(home, f"echo release {toolkit}, V{toolkit}.99 {known}")
        environment = {"CUDA_HOME": str(home)} | environment
    program = f"""
import os, sys, torch
torch.version.cuda, torch.__version__ = {torch_cuda!r}, "2.99"
sys.argv = ["setup.py", "build_py", "--build-lib", {str(tmp_path / "lib")!r}]
exec(open("setup.py").read().replace("/usr/local", {str(tmp_path)!r}))
print("built for", os.environ.get("TORCH_CUDA_ARCH_LIST"))
"""
    environment = {"CUDA_HOME": "", "CUDA_PATH": ""} | environment
    result = run_program(program, unpacked, **environment)
    if result.returncode != 0:
        return result, None
    return result, json.loads((tmp_path / "lib/pdp_kernels/_build_record.json").read_text())


@pytest.mark.parametrize(
    ("torch_cuda", "toolkit", "reason"),
    [
        ("13.0", "12.8", "torch 2.99 is built for CUDA 13.0, and {} is CUDA 12.8"),
        ("12.6", "12.0", "{} is CUDA 12.0, and 12.1 or later is needed"),
        (None, "13.0", "torch 2.99 is built without CUDA"),
    ],
)
def test_a_build_records_why_it_leaves_the_cuda_module_out(
    torch_cuda, toolkit, reason, unpacked, tmp_path
):
    result, record = run_setup(unpacked, tmp_path, torch_cuda=torch_cuda, toolkit=toolkit)
    reason = reason.format(tmp_path / "toolkit")
    assert record["left_out"] == {"_C_cuda": reason}
    assert (record["torch_cuda"], record["toolkit"]) == (torch_cuda, toolkit)
    assert f"building without _C_cuda: {reason}" in result.stdout
    assert ("--no-build-isolation" in result.stdout) == reason.startswith("torch")


BROKEN = "exit 3"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (BROKEN, "nvcc does not name its version: Command '['{}', '--version']' returned non-zero"),
        ("echo hello", "nvcc does not name its version: hello"),
        ("case $1 in --version) echo release 13.0;; esac", "nvcc does not name its architectures"),
    ],
)
def test_what_a_broken_nvcc_does_not_say_is_the_reason(answer, reason, unpacked, tmp_path):
    add_toolkit(tmp_path / "broken", answer)
    named = {"CUDA_HOME": str(tmp_path / "broken"), "TORCH_CUDA_ARCH_LIST": ""}
    _, record = run_setup(unpacked, tmp_path, torch_cuda="13.0", **named)
    assert record["left_out"]["_C_cuda"].startswith(reason.format(tmp_path / "broken/bin/nvcc"))
    result, record = run_setup(unpacked, tmp_path, torch_cuda="13.0", **named, PDP_BUILD_CUDA="1")
    assert record is None and "PDP_BUILD_CUDA=1, but nvcc does not name" in result.stderr


def test_a_build_without_cuda_does_not_ask_nvcc(unpacked, tmp_path):
    add_toolkit(tmp_path / "asked", f"touch {tmp_path}/was_asked; {BROKEN}")
    named = {"CUDA_HOME": str(tmp_path / "asked"), "PDP_BUILD_CUDA": "0"}
    _, record = run_setup(unpacked, tmp_path, torch_cuda="13.0", **named)
    assert record["left_out"] == {"_C_cuda": LEFT_OUT_BY_REQUEST} and record["toolkit"] is None
    assert not (tmp_path / "was_asked").exists()


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_a_named_folder_that_is_no_toolkit_is_the_reason(variable, unpacked, tmp_path):
    add_toolkit(tmp_path / "cuda", "echo release 13.0")
    (tmp_path / "empty").mkdir()
    named = {variable: str(tmp_path / "empty")}
    _, record = run_setup(unpacked, tmp_path, torch_cuda="13.0", **named)
    reason = f"{variable} is {tmp_path}/empty, which lacks bin/nvcc or include/cuda_runtime.h"
    assert record["left_out"] == {"_C_cuda": reason} and record["toolkit"] is None


@pytest.mark.parametrize(
    ("torch_cuda", "chosen"),
    [("12.6", "12.10"), ("13.1", "13.0"), ("9.2", "9.2"), ("14.0", "13.0")],
)
def test_the_newest_toolkit_of_torchs_major_version_is_found(
    torch_cuda, chosen, unpacked, tmp_path
):
    for version in ("9.2", "12.10", "12.8", "13.0"):
        add_toolkit(tmp_path / f"cuda-{version}", f"echo release {version} compute_90")
    add_toolkit(tmp_path / "cuda-13.2", BROKEN)
    (tmp_path / "cuda").symlink_to("cuda-13.0")
    # No nvcc is on this PATH, and any program is a compiler while nothing is compiled.
    elsewhere = {"PATH": str(tmp_path), "CXX": sys.executable}
    _, record = run_setup(unpacked, tmp_path, torch_cuda=torch_cuda, **elsewhere)
    assert record["toolkit"] == chosen


@pytest.mark.parametrize("compiler", ["", " "])
def test_an_empty_compiler_is_the_default(compiler, unpacked, tmp_path):
    result, record = run_setup(unpacked, tmp_path, **CUDA_13, CXX=compiler)
    assert record["left_out"] == {} and "built for" in result.stdout


def test_asking_for_cuda_with_another_torch_than_the_toolkits_names_the_mend(unpacked, tmp_path):
    versions = {"torch_cuda": "13.0", "toolkit": "12.8"}
    result, record = run_setup(unpacked, tmp_path, **versions, PDP_BUILD_CUDA="1")
    assert record is None
    assert "PDP_BUILD_CUDA=1, but torch 2.99 is built for CUDA 13.0" in result.stderr
    assert "`pip install --no-build-isolation` builds for the torch" in result.stderr


CUDA_13 = {"torch_cuda": "13.0", "toolkit": "13.0"}


@pytest.mark.parametrize(
    ("requested", "built", "too_old"),
    [
        ("", "8.0;9.0+PTX", None),
        (" ; ", "8.0;9.0+PTX", None),
        ("8.6", "8.6", None),
        ("7.0;7.5 8.6;9.0+PTX", "8.6;9.0+PTX", "7.0, 7.5"),
        ("Volta+Tegra;Turing;Ampere", "Ampere", "Volta+Tegra, Turing"),
        ("10.0;6.1+PTX", "10.0", "6.1+PTX"),
    ],
)
def test_the_cuda_module_is_built_for_the_architectures_that_it_can_be_built_for(
    requested, built, too_old, unpacked, tmp_path
):
    result, record = run_setup(unpacked, tmp_path, **CUDA_13, TORCH_CUDA_ARCH_LIST=requested)
    assert record["left_out"] == {}
    assert f"built for {built}\n" in result.stdout
    printed = [line for line in result.stdout.splitlines() if "alone" in line]
    assert printed == [
        f"pdp_kernels: building the CUDA module for {built} alone: TORCH_CUDA_ARCH_LIST has "
        f"{too_old}, and 8.0 or later is needed"
    ] * (too_old is not None)


def test_native_without_a_gpu_is_the_default(unpacked, tmp_path):
    hidden = {"TORCH_CUDA_ARCH_LIST": "native", "CUDA_VISIBLE_DEVICES": ""}
    result, _ = run_setup(unpacked, tmp_path, **CUDA_13, **hidden)
    assert "built for 8.0;9.0+PTX\n" in result.stdout


def test_without_an_architecture_that_is_new_enough_the_cuda_module_is_left_out(unpacked, tmp_path):
    result, record = run_setup(unpacked, tmp_path, **CUDA_13, TORCH_CUDA_ARCH_LIST="7.5")
    reason = "TORCH_CUDA_ARCH_LIST is '7.5', and 8.0 or later is needed"
    assert record["left_out"] == {"_C_cuda": reason}
    assert f"building without _C_cuda: {reason}" in result.stdout


def test_asking_for_cuda_without_such_an_architecture_is_an_error(unpacked, tmp_path):
    requests = {"TORCH_CUDA_ARCH_LIST": "Turing", "PDP_BUILD_CUDA": "1"}
    result, record = run_setup(unpacked, tmp_path, **CUDA_13, **requests)
    assert record is None
    assert "PDP_BUILD_CUDA=1, but TORCH_CUDA_ARCH_LIST is 'Turing', and 8.0" in result.stderr


def test_another_request_for_cuda_is_an_error(unpacked):
    program = "import runpy; runpy.run_path('setup.py')"
    result = run_program(program, unpacked, PDP_BUILD_CUDA="yes")
    assert result.returncode != 0
    assert "PDP_BUILD_CUDA must be 0 or 1, got 'yes'" in result.stderr
