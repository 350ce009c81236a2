"""Streams of the fake device, and the order of work that their waits establish.

Each stream has a clock, and knows up to which time it has waited for each other stream; so does the
host. A read of what another stream wrote is an error without a wait for it, although everything
runs in order here.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Uses:
    """The last write of a storage, and each stream's last read since: streams and their times."""

    written: tuple[Stream, int] | None = None
    read: dict[Stream, int] = field(default_factory=dict)


class Stream:
    """The replacement of torch.cuda.Stream."""

    def __init__(self, streams: Streams, device: int) -> None:
        self.streams = streams
        streams.all.append(self)
        self.device_index = device
        self.cuda_stream = id(self)
        self.time = 0
        self.known: dict[Stream, int] = {}  # the times that it has waited for

    def wait_stream(self, other: Stream) -> None:
        learn(self.known, other.everything())

    def wait_event(self, event: Event) -> None:
        learn(self.known, event.known)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.streams, self.device_index)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.streams.host_waits(self)

    def everything(self) -> dict[Stream, int]:
        return self.known | {self: self.time}


class Event:
    """The replacement of torch.cuda.Event. An operation takes a microsecond."""

    def __init__(self, streams: Streams, device: int) -> None:
        self.streams = streams
        self.device_index = device
        self.known: dict[Stream, int] = {}
        self.time = 0

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.streams.current(self.device_index)
        self.known, self.time = stream.everything(), stream.time

    def synchronize(self) -> None:
        learn(self.streams.host, self.known)

    def elapsed_time(self, end: Event) -> float:
        return max(1, end.time - self.time) * 1e-3


class Streams:
    """The streams of all devices, and the current one of each device."""

    def __init__(self) -> None:
        self.host: dict[Stream, int] = {}
        self.all: list[Stream] = []
        self._default: dict[int, Stream] = {}
        self._current: dict[int, Stream] = {}

    def of(self, device: int) -> list[Stream]:
        return [stream for stream in self.all if stream.device_index == device]

    def default(self, device: int) -> Stream:
        if device not in self._default:
            self._default[device] = Stream(self, device)
        return self._default[device]

    def current(self, device: int) -> Stream:
        return self._current.get(device) or self.default(device)

    def set_current(self, stream: Stream) -> None:
        self._current[stream.device_index] = stream

    def host_waits(self, stream: Stream) -> None:
        learn(self.host, stream.everything())

    def launch(self, stream: Stream) -> None:
        """Start an operation: all that the host has waited for happens before it."""
        learn(stream.known, self.host)
        stream.time += 1

    def check(self, uses: Uses, stream: Stream, writes: bool, what: str) -> None:
        before = dict(uses.read) if writes else {}
        if uses.written is not None:
            learn(before, dict([uses.written]))
        for other, time in before.items():
            if other is not stream and stream.known.get(other, 0) < time:
                raise RuntimeError(
                    f"{what} {'writes' if writes else 'reads'} what another stream is still using: "
                    "one must wait for the other"
                )

    def note(self, uses: Uses, stream: Stream, writes: bool) -> None:
        if writes:
            uses.written, uses.read = (stream, stream.time), {}
        else:
            uses.read[stream] = stream.time


def learn(known: dict[Stream, int], more: dict[Stream, int]) -> None:
    for stream, time in more.items():
        known[stream] = max(known.get(stream, 0), time)
