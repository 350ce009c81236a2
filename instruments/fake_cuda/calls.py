"""What names a device or tells of one in PyTorch's functions and attributes, for the fake one."""

import re
from collections.abc import Callable

import torch
from torch.utils._device import _device_constructors

from instruments.fake_cuda.device import FakeDevice

DEVICE = FakeDevice(count=2)
HOST = torch.device("cpu")


def index_of(device: object) -> int | None:
    """The number of a CUDA device in any form PyTorch takes; None for another kind of device."""
    if isinstance(device, int):
        return device
    if isinstance(device, str) and re.fullmatch(r"cuda(:\d+)?", device):
        device = torch.device(device)
    if not isinstance(device, torch.device) or device.type != "cuda":
        return None
    return DEVICE.current if device.index is None else device.index


def stand_in(device: object) -> object:
    """What stands for a device in operations: for CUDA's the CPU, with a number."""
    index = index_of(device)
    return device if index is None else torch.device("cpu", index + 1)


def attribute(name: str, answer: Callable[[int], object]) -> property:
    """An attribute of tensors that has another answer on the device."""
    real = getattr(torch.Tensor, name)

    def get(tensor):
        place = DEVICE.place_of(tensor)
        return real.__get__(tensor) if place is None else answer(place)

    return property(get)


def grad_attribute() -> property:
    """A gradient is where its tensor is, whatever a compiled function knew of places."""
    real = torch.Tensor.grad

    def get(tensor):
        grad = real.__get__(tensor)
        DEVICE.put_all(grad, DEVICE.place_of(tensor))
        return grad

    return property(get, real.__set__, real.__delete__)


def factory(real: Callable) -> Callable:
    """A function that makes a tensor on a device it is given."""

    def make(*args, **kwargs):
        if kwargs.get("device") is not None:
            kwargs["device"] = stand_in(kwargs["device"])
        return real(*args, **kwargs)

    return make


def factory_from_host(real: Callable) -> Callable:
    """One that makes it of the host's numbers, and then copies it, which waits."""

    def make(*args, device=None, requires_grad=False, **kwargs):
        made = real(*args, **kwargs)
        source = DEVICE.place_of(args[0]) if isinstance(args[0], torch.Tensor) else None
        target = source if device is None else index_of(device)
        if target is not None and target != DEVICE.place_of(made):
            made = made.to(torch.device("cuda", target))
        return made.requires_grad_() if requires_grad else made

    return make


_to = torch.Tensor.to


def to(tensor, *args, **kwargs):
    """Tensor.to, which copies between devices though all of them are the CPU."""
    own = DEVICE.place_of(tensor)
    args = [arg for arg in args if arg is not None]
    if args and isinstance(args[0], torch.Tensor):
        args[:1] = [args[0].device, args[0].dtype]
    asked = kwargs.pop("device", None)
    if args and isinstance(args[0], (str, torch.device, int)) and not isinstance(args[0], bool):
        asked = args.pop(0)
    if asked is None and own is None:
        return _to(tensor, *args, **kwargs)
    target = own if asked is None else index_of(asked)
    moves = target != own
    if args and isinstance(args[0], torch.dtype):
        kwargs["dtype"] = args.pop(0)
    dtype = kwargs.pop("dtype", None) or tensor.dtype
    if not moves and dtype == tensor.dtype and not kwargs.get("copy") and len(kwargs) == 0:
        return tensor
    device = stand_in(HOST if target is None else torch.device("cuda", target))
    return _to(
        tensor, device, dtype, *args, **kwargs | {"copy": kwargs.get("copy", False) or moves}
    )


def cpu(tensor, **kwargs):
    return to(tensor, HOST, **kwargs)


def cuda(tensor, device=None, **kwargs):
    return to(tensor, "cuda" if device is None else device, **kwargs)


def reader(name: str) -> Callable:
    """A method that reads a tensor's numbers into Python."""
    real = getattr(torch.Tensor, name)

    def read(tensor, *args, **kwargs):
        place = DEVICE.place_of(tensor)
        if place is not None and name != "tolist":
            raise TypeError(
                f"can't convert cuda:{place} device type tensor to numpy. Use Tensor.cpu() to copy "
                "the tensor to host memory first."
            )
        if place is not None:
            DEVICE.wait(name)
        return real(tensor, *args, **kwargs)

    return read


_deepcopy = torch.Tensor.__deepcopy__


def deepcopy(tensor, memo):
    copied = _deepcopy(tensor, memo)
    DEVICE.put_all(copied, DEVICE.place_of(tensor))
    return copied


def get_device(tensor) -> int:
    place = DEVICE.place_of(tensor)
    return -1 if place is None else place


def replacements() -> dict[tuple[object, str], object]:
    """What to put where, by owner and name."""
    tensor = torch.Tensor
    from_host = ("tensor", "as_tensor", "asarray")
    makers = {real.__name__ for real in _device_constructors() if hasattr(torch, real.__name__)}
    makers |= {f"{name}_like" for name in ("empty", "zeros", "ones", "full", "rand", "randn")}
    methods = [f"new_{name}" for name in ("empty", "zeros", "ones", "full")]
    return {
        **{(torch, name): factory(getattr(torch, name)) for name in makers.difference(from_host)},
        **{(torch, name): factory_from_host(getattr(torch, name)) for name in from_host},
        **{(tensor, name): factory(getattr(tensor, name)) for name in methods},
        (tensor, "new_tensor"): factory_from_host(tensor.new_tensor),
        (tensor, "device"): attribute("device", lambda place: torch.device("cuda", place)),
        (tensor, "is_cuda"): attribute("is_cuda", lambda place: True),
        (tensor, "is_cpu"): attribute("is_cpu", lambda place: False),
        (tensor, "grad"): grad_attribute(),
        (tensor, "get_device"): get_device,
        (tensor, "to"): to,
        (tensor, "cpu"): cpu,
        (tensor, "cuda"): cuda,
        (tensor, "pin_memory"): lambda values: values.clone(),
        (tensor, "tolist"): reader("tolist"),
        (tensor, "numpy"): reader("numpy"),
        (tensor, "__array__"): reader("__array__"),
        (tensor, "__deepcopy__"): deepcopy,
    }
