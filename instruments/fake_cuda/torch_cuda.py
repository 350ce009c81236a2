"""Replacements of torch.cuda, the profiler and autocast, as far as the GPU tests use them."""

import contextlib
import functools
from types import SimpleNamespace

import torch
import torch._inductor.config  # imports Dynamo, which must see PyTorch's own attributes
from torch.autograd import DeviceType
from torch.utils._python_dispatch import _disable_current_modes

from instruments.fake_cuda import calls
from instruments.fake_cuda.calls import DEVICE, index_of
from instruments.fake_cuda.device import Capture, tensors_in
from instruments.fake_cuda.streams import Event, Stream

PROPERTIES = SimpleNamespace(
    name="fake device", multi_processor_count=132, L2_cache_size=50 * 2**20, total_memory=80 * 2**30
)


def number(device: object = None) -> int:
    return DEVICE.current if device is None else index_of(device)


@contextlib.contextmanager
def on_device(device):
    """torch.cuda.device, and torch.cuda.device_of, which takes a tensor."""
    before = DEVICE.current
    place = DEVICE.place_of(device) if isinstance(device, torch.Tensor) else number(device)
    DEVICE.current = before if place is None else place
    try:
        yield
    finally:
        DEVICE.current = before


@contextlib.contextmanager
def on_stream(stream):
    before = DEVICE.current, DEVICE.streams.current(stream.device_index)
    DEVICE.current = stream.device_index
    DEVICE.streams.set_current(stream)
    try:
        yield
    finally:
        DEVICE.current = before[0]
        DEVICE.streams.set_current(before[1])


class Graph:
    """torch.cuda.CUDAGraph"""

    def __init__(self, keep_graph: bool = False):
        self.capture = Capture()

    def replay(self) -> None:
        self.capture.replay()

    def reset(self) -> None:
        self.capture = Capture()


@contextlib.contextmanager
def capturing(graph, pool=None, stream=None, capture_error_mode="global"):
    """torch.cuda.graph"""
    synchronize()
    with on_stream(stream or Stream(DEVICE.streams, DEVICE.current)):
        DEVICE.capture = graph.capture
        try:
            yield
        finally:
            DEVICE.capture = None
    graph.capture.undo()


class Profile:
    """torch.profiler.profile of a device.

    Every operation that is neither a view nor an allocation counts as one kernel.
    """

    def __enter__(self):
        DEVICE.launched = []
        return self

    def __exit__(self, *error):
        self.launched, DEVICE.launched = DEVICE.launched, None

    def events(self):
        runtime = SimpleNamespace(name="cudaLaunchKernel", device_type=DeviceType.CPU)
        kernels = [SimpleNamespace(name=n, device_type=DeviceType.CUDA) for n in self.launched]
        return [runtime] * len(kernels) + kernels


def profile_of(real):
    def profile(*args, activities=None, **options):
        if activities is None or torch.profiler.ProfilerActivity.CUDA not in activities:
            return real(*args, activities=activities, **options)
        return Profile()

    return profile


def synchronize(device=None) -> None:
    """torch.cuda.synchronize, which is allowed even where other waits are errors."""
    if DEVICE.capture is not None:
        raise RuntimeError("operation not permitted when stream is capturing: synchronize")
    for stream in DEVICE.streams.of(number(device)):
        DEVICE.streams.host_waits(stream)


def reset_peak_memory_stats(device=None) -> None:
    DEVICE.peak = DEVICE.allocated(number(device))


def set_sync_debug_mode(mode) -> None:
    DEVICE.waits_are_errors = mode in ("error", 2)


def plain(function):
    """Return a function that runs on CPU tensors and puts its results on the first one's device."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        DEVICE.has_compiled = True
        places = map(DEVICE.place_of, tensors_in(args, kwargs))
        place = next((place for place in places if place is not None), None)
        with PATCHES.lifted():
            results = function(*args, **kwargs)
        DEVICE.put_all(results, place)
        return results

    return run


def compile_of(real):
    """Return torch.compile for the CPU, without Inductor and so without its code for GPUs."""

    def compile(model=None, *, mode=None, backend="aot_eager", **options):
        if model is None:
            return lambda model: compile(model, backend=backend, **options)
        return plain(real(model, backend=backend, **options))

    return compile


def backward_of(real):
    """Return a backward function that runs compiled functions on CPU tensors."""

    def run(*args, **kwargs):
        if not DEVICE.has_compiled:
            return real(*args, **kwargs)
        with PATCHES.lifted():
            return real(*args, **kwargs)

    return run


def grad_of(real):
    run = backward_of(real)

    def grad(outputs, inputs, *args, **kwargs):
        results = run(outputs, inputs, *args, **kwargs)
        for result, of in zip(results, tensors_in(inputs), strict=True):
            DEVICE.put_all(result, DEVICE.place_of(of))
        return results

    return grad


def of_cpu(real):
    """Return a function of autocast that treats the device type "cuda" as "cpu"."""
    return lambda kind: real("cpu" if kind == "cuda" else kind)


_start_autocast = torch.autocast.__init__


def start_autocast(self, device_type, *args, **kwargs):
    _start_autocast(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def replacements() -> dict[tuple[object, str], object]:
    """Return the replacements by owner and name."""
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: DEVICE.count,
        "current_device": lambda: DEVICE.current,
        "set_device": lambda device: setattr(DEVICE, "current", number(device)),
        "device": on_device,
        "device_of": on_device,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: PROPERTIES,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "synchronize": synchronize,
        "empty_cache": lambda: None,
        "Stream": lambda device=None: Stream(DEVICE.streams, number(device)),
        "Event": lambda enable_timing=False: Event(DEVICE.streams, DEVICE.current),
        "stream": on_stream,
        "current_stream": lambda device=None: DEVICE.streams.current(number(device)),
        "default_stream": lambda device=None: DEVICE.streams.default(number(device)),
        "_sleep": lambda cycles: None,
        "CUDAGraph": Graph,
        "graph": capturing,
        "is_current_stream_capturing": lambda: DEVICE.capture is not None,
        "set_sync_debug_mode": set_sync_debug_mode,
        "memory_allocated": lambda device=None: DEVICE.allocated(number(device)),
        "max_memory_allocated": lambda device=None: DEVICE.peak,
        "reset_peak_memory_stats": reset_peak_memory_stats,
    }
    return {
        **{(torch.cuda, name): value for name, value in cuda.items()},
        (torch.profiler, "profile"): profile_of(torch.profiler.profile),
        (torch, "compile"): compile_of(torch.compile),
        (torch.library, "opcheck"): lambda operator, args, **checks: operator(*args),
        (torch.autograd, "backward"): backward_of(torch.autograd.backward),
        (torch.autograd, "grad"): grad_of(torch.autograd.grad),
        (torch, "is_autocast_enabled"): of_cpu(torch.is_autocast_enabled),
        (torch, "get_autocast_dtype"): of_cpu(torch.get_autocast_dtype),
        (torch.autocast, "__init__"): start_autocast,
    }


class Patches:
    """Replacements of functions and attributes, which are set and removed together."""

    def __init__(self, *tables: dict[tuple[object, str], object]) -> None:
        self.values = {place: value for table in tables for place, value in table.items()}
        self.real = {(owner, name): vars(owner).get(name, MISSING) for owner, name in self.values}

    def put(self, values: dict[tuple[object, str], object]) -> None:
        for (owner, name), value in values.items():
            if value is MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)

    @contextlib.contextmanager
    def lifted(self):
        """Restore PyTorch's own functions within the context."""
        self.put(self.real)
        try:
            with _disable_current_modes():
                yield
        finally:
            self.put(self.values)


MISSING = object()
PATCHES = Patches(calls.replacements(), replacements())
