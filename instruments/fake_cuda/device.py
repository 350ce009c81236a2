"""A fake device: tensors in the memory of the CPU that count as the device's.

The device records, for each storage, its place and the streams that wrote and read it last. So what
fails on a real device fails here: tensors of several devices in one operation, a forbidden wait for
the device, a stream that reads before another has written, results of a captured graph that was
not replayed. The CPU runs the operations. A backward counts as work of the current stream; PyTorch
runs it on the stream of the forward.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from instruments.fake_cuda.streams import Stream, Streams, Uses

# Operations that copy their result, or its size, to the host.
WAITING = frozenset(
    ("_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "_unique2")
)
TRANSFERS = frozenset(("copy_", "_to_copy"))
INDEXING = frozenset(("index", "index_put", "index_put_", "_index_put_impl_"))
ALLOCATIONS = frozenset(
    ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh")
)

# The allocator rounds sizes up to this many bytes, as PyTorch's does on CUDA.
GRANULE = 512


class Operation(NamedTuple):
    """The schema of an operation.

    Attributes:
        name: its name.
        works: True if it is neither a view nor an allocation.
        written: positions and names of the arguments that it writes.
    """

    name: str
    works: bool
    written: tuple[tuple[int, str], ...]

    @classmethod
    @functools.cache
    def of(cls, call: Any) -> "Operation":
        schema = call._schema
        name = schema.name.split("::")[1]
        results = [result.alias_info for result in schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in results)
        written = tuple(
            (position, argument.name)
            for position, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        return cls(name, not is_view and name not in ALLOCATIONS, written)


@dataclass
class Block:
    """A storage on a device. The weak reference prevents reuse of its address."""

    device: int
    bytes: int
    storage: StorageWeakRef
    uses: Uses = field(default_factory=Uses)


Placed = list[tuple[torch.Tensor, Block | None]]


class Capture:
    """The operations of a graph.

    They run during the capture, because later operations need the shapes of their results. The end
    of the capture undoes their effects: on a real device nothing has run yet.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.made: list[torch.Tensor] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def keep(self, storage: torch.UntypedStorage) -> None:
        self.before.setdefault(storage._cdata, (storage, storage.clone()))

    @_disable_current_modes()
    def undo(self) -> None:
        for tensor in self.made:
            if tensor.is_floating_point():
                storage_of(tensor).fill_(255)  # NaN in every dtype
        for storage, content in self.before.values():
            storage.copy_(content)

    @torch.no_grad()
    def replay(self) -> None:
        for call, args, kwargs, results in self.calls:
            if not Operation.of(call).works:
                continue
            again = call(*args, **kwargs)
            for old, new in zip(tensors_in(results), tensors_in(again), strict=True):
                if storage_of(old)._cdata != storage_of(new)._cdata:
                    old.detach().copy_(new)


class FakeDevice:
    """The state of `count` devices. `current` is the index of the default one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.blocks: dict[int, Block] = {}
        self.reset()

    def reset(self) -> None:
        """Restore the state at the start of a process. Memory in use stays."""
        self.current = 0
        self.blocks = {
            address: Block(block.device, block.bytes, block.storage)
            for address, block in self.blocks.items()
            if not block.storage.expired()
        }
        self.streams = Streams()
        self.waits_are_errors = False
        self.capture: Capture | None = None
        self.launched: list[str] | None = None
        self.peak: int | None = None
        self.has_compiled = False

    def block_of(self, tensor: torch.Tensor) -> Block | None:
        if not self.blocks:
            return None
        storage = storage_of(tensor)
        return None if storage is None else self.blocks.get(storage._cdata)

    def place_of(self, tensor: torch.Tensor) -> int | None:
        """Return the index of the tensor's device, or None for the host."""
        block = self.block_of(tensor)
        return None if block is None else block.device

    def put(self, tensor: torch.Tensor, device: int) -> Block | None:
        """Record that a tensor is on a device, unless its storage has a place already."""
        storage = storage_of(tensor)
        if storage is None:
            return None
        block = self.blocks.get(storage._cdata)
        if block is None:
            size = -(-storage.nbytes() // GRANULE) * GRANULE
            block = self.blocks[storage._cdata] = Block(device, size, StorageWeakRef(storage))
            if self.capture is not None:
                self.capture.made.append(tensor)
        return block

    def put_all(self, results: object, device: int | None) -> None:
        if device is not None:
            for tensor in tensors_in(results):
                self.put(tensor, device)

    def wait(self, reason: str) -> None:
        """Let the host wait for the current stream, or raise if that is forbidden."""
        if self.capture is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {reason}")
        if self.waits_are_errors:
            raise RuntimeError(f"called a synchronizing CUDA operation: {reason}")
        self.streams.host_waits(self.streams.current(self.current))

    def allocated(self, device: int) -> int:
        for address in [a for a, block in self.blocks.items() if block.storage.expired()]:
            del self.blocks[address]
        return sum(block.bytes for block in self.blocks.values() if block.device == device)


class DeviceWork(TorchDispatchMode):
    """Checks the places of the tensors of every operation, and records those of its results."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self.device = device

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # compiled functions run without this mode

    def __torch_dispatch__(
        self,
        call: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        device, operation = self.device, Operation.of(call)
        asked = kwargs.get("device")
        target = asked.index - 1 if asked is not None and asked.index else None
        blocks = [
            (tensor, device.block_of(tensor)) for tensor in tensors_in(*args, *kwargs.values())
        ]
        if target is None and all(block is None for _, block in blocks):
            return call(*args, **kwargs)
        if operation.name in TRANSFERS:
            place = self._transfer(operation.name, call, args, kwargs, target)
        else:
            place = self._common_place(operation.name, call, args, kwargs, target, blocks)
        at = place if place is not None else next(b.device for _, b in blocks if b is not None)
        stream = device.streams.current(at)
        if operation.works:
            self._launch(operation, call, stream, args, kwargs, blocks)
        results = call(*args, **kwargs)
        for tensor in tensors_in(results) if place is not None else ():
            block = device.put(tensor, place)
            if operation.works and block is not None and device.capture is None:
                device.streams.note(block.uses, stream, writes=True)
        if device.capture is not None:
            device.capture.calls.append((call, args, kwargs, results))
        if device.peak is not None:
            device.peak = max(device.peak, device.allocated(device.current))
        return results

    def _transfer(
        self,
        name: str,
        call: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        target: int | None,
    ) -> int | None:
        """Return the target of a copy, None for the host. Wait if host and device take part."""
        source = self.device.place_of(args[1] if name == "copy_" else args[0])
        if name == "copy_":
            target = self.device.place_of(args[0])
        elif kwargs.get("device") is None:
            target = source
        non_blocking = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if (source is None) != (target is None) and not non_blocking and not in_backward():
            self.device.wait(f"{call} between host and device")
        return source if target is None and in_backward() else target

    def _common_place(
        self,
        name: str,
        call: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        target: int | None,
        blocks: Placed,
    ) -> int:
        """Return the device of an operation, or raise if its tensors are on several."""
        if target is not None and kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        devices = {block.device for _, block in blocks if block is not None}
        on_host = [tensor for tensor, block in blocks if block is None]
        if len(devices) > 1 or (on_host and not self._may_be_on_host(call, name, args, on_host)):
            found = sorted({"cpu" if b is None else f"cuda:{b.device}" for _, b in blocks})
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{' and '.join(found)}! ({call})"
            )
        by_mask = name in INDEXING and any(
            tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors_in(args[1])
        )
        if name in WAITING or by_mask:
            self.device.wait(name)
        return devices.pop() if target is None else target

    def _may_be_on_host(
        self, call: Any, name: str, args: tuple[Any, ...], on_host: list[torch.Tensor]
    ) -> bool:
        if in_backward():  # a gradient that a compiled function made has no place yet
            return True
        if call.namespace != "aten":
            return False
        if name in INDEXING and all(tensor is not args[0] for tensor in on_host):
            self.device.wait(f"{call} copies indices to the device")
            return True
        return all(tensor.dim() == 0 for tensor in on_host)

    def _launch(
        self,
        operation: Operation,
        call: Any,
        stream: Stream,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        blocks: Placed,
    ) -> None:
        device = self.device
        written = set()
        for position, name in operation.written:
            given = args[position] if position < len(args) else kwargs.get(name)
            written.update(map(id, tensors_in(given)))
        if device.launched is not None:
            device.launched.append(str(call))
        if device.capture is not None:
            for tensor, _ in blocks:
                if id(tensor) in written:
                    device.capture.keep(storage_of(tensor))
            return
        device.streams.launch(stream)
        for tensor, block in blocks:
            if block is not None:
                device.streams.check(block.uses, stream, id(tensor) in written, str(call))
                device.streams.note(block.uses, stream, id(tensor) in written)


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def tensors_in(*values: object) -> list[torch.Tensor]:
    """Return the tensors among the values, and in their lists, tuples and dictionaries."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """Return the storage of a tensor, or of the tensor inside a wrapper of torch.func.

    A sparse tensor has several storages: the result is None.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    try:
        return torch._C.TensorBase.untyped_storage(tensor)
    except (NotImplementedError, RuntimeError):
        return None
