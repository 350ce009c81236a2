"""Replacements, for the fake device, of PyTorch's functions and attributes that name a device."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from instruments.fake_cuda.device import FakeDevice

DEVICE = FakeDevice(count=2)
HOST = torch.device("cpu")

Function = Callable[..., Any]


def index_of(device: object) -> int | None:
    """Return the index of a CUDA device in any form that PyTorch accepts, or None for others."""
    if isinstance(device, int):
        return device
    if isinstance(device, str) and re.fullmatch(r"cuda(:\d+)?", device):
        device = torch.device(device)
    if not isinstance(device, torch.device) or device.type != "cuda":
        return None
    return DEVICE.current if device.index is None else device.index


def stand_in(device: object) -> object:
    """Return the device for an operation: for a CUDA device the CPU, with its index plus 1."""
    index = index_of(device)
    return device if index is None else torch.device("cpu", index + 1)


def attribute(name: str, answer: Callable[[int], object]) -> property:
    """Return an attribute of tensors that has another value on the device."""
    real = getattr(torch.Tensor, name)

    def get(tensor: torch.Tensor) -> object:
        place = DEVICE.place_of(tensor)
        return real.__get__(tensor) if place is None else answer(place)

    return property(get)


def grad_attribute() -> property:
    """Return the attribute grad. It puts a gradient, also a compiled function's, on its device."""
    real = torch.Tensor.grad

    def get(tensor: torch.Tensor) -> torch.Tensor | None:
        grad = real.__get__(tensor)
        DEVICE.put_all(grad, DEVICE.place_of(tensor))
        return grad

    return property(get, real.__set__, real.__delete__)


def factory(real: Function) -> Function:
    """Return the replacement of a function that makes a tensor on a given device."""

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None:
            kwargs["device"] = stand_in(kwargs["device"])
        return real(*args, **kwargs)

    return make


def factory_from_host(real: Function) -> Function:
    """Return the replacement of one that makes it from host memory: it copies, and waits."""

    def make(
        *args: Any, device: object = None, requires_grad: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        made = real(*args, **kwargs)
        source = DEVICE.place_of(args[0]) if isinstance(args[0], torch.Tensor) else None
        target = source if device is None else index_of(device)
        if target is not None and target != DEVICE.place_of(made):
            made = made.to(torch.device("cuda", target))
        return made.requires_grad_() if requires_grad else made

    return make


_to = torch.Tensor.to


def to(tensor: torch.Tensor, *arguments: Any, **kwargs: Any) -> torch.Tensor:
    """Tensor.to, which copies between devices although all of them are the CPU."""
    own = DEVICE.place_of(tensor)
    args = [arg for arg in arguments if arg is not None]
    if args and isinstance(args[0], torch.Tensor):
        args[:1] = [args[0].device, args[0].dtype]
    asked = kwargs.pop("device", None)
    if args and isinstance(args[0], (str, torch.device, int)) and not isinstance(args[0], bool):
        asked = args.pop(0)
    if asked is None and own is None:
        return _to(tensor, *arguments, **kwargs)
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


def cpu(tensor: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return to(tensor, HOST, **kwargs)


def cuda(tensor: torch.Tensor, device: object = None, **kwargs: Any) -> torch.Tensor:
    return to(tensor, "cuda" if device is None else device, **kwargs)


def reader(name: str) -> Function:
    """Return the replacement of a method that reads a tensor's values into Python."""
    real = getattr(torch.Tensor, name)

    def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> object:
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


def deepcopy(tensor: torch.Tensor, memo: dict[int, object]) -> torch.Tensor:
    copied = _deepcopy(tensor, memo)
    DEVICE.put_all(copied, DEVICE.place_of(tensor))
    return copied


def get_device(tensor: torch.Tensor) -> int:
    place = DEVICE.place_of(tensor)
    return -1 if place is None else place


def replacements() -> dict[tuple[object, str], object]:
    """Return the replacements by owner and name."""
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
