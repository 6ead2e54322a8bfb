"""Copies between host and device through page-locked buffers that are used again, on a stream of their own: the device computes meanwhile.

The rules that make this right, which the stand-in of the tests checks:

- a buffer is written again only after the copy that used it is done;
- a copy into memory of the device begins after all launches that came before, which may still use what was in that memory;
- launches that read what was copied come after the copy, and its memory is given back after it.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

BUFFER_BYTES = 1 << 24
"""Of a page-locked buffer: long enough for the full rate of the bus."""
NUM_BUFFERS = 3
"""One is filled while another is copied; the third evens out."""


class Memory(Protocol):
    """What a copy needs of a device; see `Device`."""

    xp: Any

    def free_bytes(self) -> int | None:
        """Memory that can still be allocated; None: not limited."""
        ...


class Copied(Protocol):
    """A copy that was begun."""

    def wait(self) -> None:
        """Wait, on the host, until it is done."""
        ...


class Lane(Protocol):
    """A stream for copies."""

    def page_locked(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return memory of the host that the device reads and writes by itself."""
        ...

    def follow_launches(self) -> None:
        """Let later copies begin after all launches so far."""
        ...

    def to_device(self, target: Any, source: NDArray[np.uint8]) -> Copied:
        """Begin to copy page-locked bytes to bytes on the device."""
        ...

    def to_host(self, target: NDArray[np.uint8], source: Any) -> Copied:
        """Begin to copy bytes on the device to page-locked bytes."""
        ...

    def precede_launches(self) -> None:
        """Let later launches begin after all copies so far."""
        ...

    def wait(self) -> None:
        """Wait, on the host, until all copies so far are done."""
        ...


class Ring:
    """Page-locked buffers of one direction, made when they are first needed and then kept. One copy of an array at a time uses them."""

    def __init__(self, lane: Lane) -> None:
        """Take a lane."""
        self.lock = threading.Lock()
        self._lane = lane
        self._buffers: list[NDArray[np.uint8]] = []
        self._copies: list[Copied | None] = []
        self._next = 0

    def take(self, num_bytes: int) -> tuple[int, NDArray[np.uint8]]:
        """Return the number of a buffer that no copy uses, and so many bytes of it."""
        number = self._next
        if number == len(self._buffers):
            self._buffers.append(self._lane.page_locked(BUFFER_BYTES))
            self._copies.append(None)
        self._next = (number + 1) % NUM_BUFFERS
        self.finish(number)
        return number, self._buffers[number][:num_bytes]

    def use(self, number: int, copied: Copied) -> None:
        """Note the copy that uses a buffer."""
        self._copies[number] = copied

    def finish(self, number: int) -> None:
        """Wait until no copy uses a buffer."""
        copied, self._copies[number] = self._copies[number], None
        if copied is not None:
            copied.wait()


class Transfers:
    """Copies of whole arrays on a lane. Both directions may run at once, in different threads."""

    def __init__(self, device: Memory, lane: Lane) -> None:
        """Take a device and its lane."""
        self._device, self.lane = device, lane
        self._up, self._down = Ring(lane), Ring(lane)

    def begin_upload(self, array: NDArray[Any]) -> Any:
        """Return an array on the device that is being filled; `Lane.precede_launches` comes before launches that read it.

        Args:
            array: in C order; it may change when this returns.
        """
        target = self._device.xp.empty(array.shape, dtype=array.dtype)
        source, bytes_there = _bytes_of(array), _bytes_of(target)
        with self._up.lock:
            self.lane.follow_launches()
            try:
                for start in range(0, source.size, BUFFER_BYTES):
                    number, buffer = self._up.take(min(BUFFER_BYTES, source.size - start))
                    np.copyto(buffer, source[start : start + buffer.size])
                    self._up.use(number, self.lane.to_device(bytes_there[start : start + buffer.size], buffer))
            except BaseException:
                self.lane.wait()  # or the copies that have begun would write to memory that others have by then
                raise
        return target

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy on the host of an array in C order, after all launches so far are done."""
        found = np.empty(array.shape, dtype=array.dtype)
        target, bytes_there = _bytes_of(found), _bytes_of(array)
        running: list[tuple[int, NDArray[np.uint8], int]] = []
        with self._down.lock:
            self.lane.follow_launches()

            def unload() -> None:
                number, buffer, start = running.pop(0)
                self._down.finish(number)
                np.copyto(target[start : start + buffer.size], buffer)

            for start in range(0, target.size, BUFFER_BYTES):
                if len(running) == NUM_BUFFERS:
                    unload()
                number, buffer = self._down.take(min(BUFFER_BYTES, target.size - start))
                self._down.use(number, self.lane.to_host(buffer, bytes_there[start : start + buffer.size]))
                running.append((number, buffer, start))
            while running:
                unload()
        return found


def _bytes_of(array: Any) -> Any:
    return array.reshape(-1).view(np.uint8)
