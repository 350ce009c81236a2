"""The backends under test, and the state every test starts from."""

import functools
import os

# One thread in each test process, of which there is one for each core. Threads that wait for each
# other spin, and beside other work take several times the time of one. OpenMP reads this on import.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

# Triton kernels run through the interpreter where there is no GPU; Triton reads this on import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Inductor would compile with a process for each core, beside as many that pytest-xdist has started.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from tests.support.backends import GPU, dispatched, interpreted
from tests.support.ranks import close_groups

torch.set_num_threads(1)

# Files whose tests take longest: first, so that no process is left with one of them at the end.
LONGEST = (
    "test_compiled_kernels.py",
    "test_cpu_instruction_sets.py",
    "test_pruner_sharded.py",
    "test_programs.py",
    "test_gpu_logic.py",
    "test_cuda_races.py",
    "test_operators.py",
    "test_soft_mask_nm.py",
    "test_soft_mask_channel.py",
    "test_soft_mask.py",
    "test_builds.py",
    "test_cuda_host_build.py",
    "test_packaging.py",
    "test_examples.py",
    "test_notebook.py",
    "test_pruner_compatibility.py",
    "test_traffic.py",
)


def pytest_collectstart(collector):
    """What a module draws while it is imported does not depend on the modules before it."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
    if torch.cuda.is_available():
        return
    without_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(without_gpu)


@pytest.fixture(autouse=True, scope="session")
def ranks_that_end():
    """Process groups last until the last test, and end while coverage is still measured."""
    yield
    close_groups()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill fresh memory with NaN (integers: the largest), so that elements not written show.

    This covers torch.empty of Python and of C++.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def set_threads():
    """torch.set_num_threads, for a test whose promise is about threads."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(params=["cpu", GPU])
def device(request):
    return "cuda" if request.param == "gpu" else "cpu"


@pytest.fixture(params=["native", GPU])
def selection(request):
    """thresholds, hard_mask and prune_counts of a backend, and the device it serves.

    Host builds of the kernels are tested in tests/backends.
    """
    return dispatched(request.param)


@pytest.fixture(params=["native", "triton-interpreter", GPU])
def masking(request):
    """The mask operators of a backend, and the device it serves."""
    if request.param != "triton-interpreter":
        return dispatched(request.param)
    if torch.cuda.is_available():
        pytest.skip("with a GPU, Triton compiles")
    request.getfixturevalue("rounding_interpreter")
    return interpreted()


@pytest.fixture
def quick_interpreter(monkeypatch):
    """Speed Triton's interpreter up.

    It looks through triton.language in each function that a kernel calls, and reduces by xor (in a
    sort) number by number.
    """
    pytest.importorskip("triton")
    from triton.language import core, standard
    from triton.runtime import interpreter

    @functools.cache
    def languages(function):
        values = function.__globals__.values()
        return [value for value in values if value is interpreter.tl or value is core]

    def call(self, *args, **kwargs):
        if any(core.is_builtin(language.arange) for language in languages(self.fn)):
            interpreter._patch_lang(self.fn)  # the kernel's module has not seen to that
        return self.rewrite()(*args, **kwargs)

    reduce_any = interpreter.ReduceOps.apply_impl

    def reduce(self, values):
        if self.combine_fn != standard._xor_combine:
            return reduce_any(self, values)
        numbers, along = values[0].handle.data, {"axis": self.axis, "keepdims": self.keep_dims}
        return self.to_tensor(np.bitwise_xor.reduce(numbers, **along), values[0].dtype)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    monkeypatch.setattr(interpreter.ReduceOps, "apply_impl", reduce)


@pytest.fixture
def rounding_interpreter(monkeypatch, quick_interpreter):
    """Make Triton's interpreter convert to bfloat16 and back as torch does.

    It truncates where a GPU rounds to nearest even, and gets denormals wrong both ways.
    """
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_as_a_gpu_does(values, from_dtype, to_dtype, rounding_mode):
        values = np.ascontiguousarray(values)
        if (from_dtype.name, to_dtype.name) == ("fp32", "bf16"):
            rounded = torch.from_numpy(values).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if (from_dtype.name, to_dtype.name) == ("bf16", "fp32"):
            return values.astype(np.uint32) << 16
        return convert(values, from_dtype, to_dtype, rounding_mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert_as_a_gpu_does)
