"""The copies of the strict device: none happens before somebody waits for it, and each finds out whether its rules were kept.

That is the latest that a GPU may copy; what a copy overtakes if it comes early is checked when it begins.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import strict_device
from numpy.typing import NDArray


class _Copy:
    """A copy that has not happened yet."""

    def __init__(self, lane: StrictLane, happen: Callable[[], None]) -> None:
        self._lane, self.happen = lane, happen

    def wait(self) -> None:
        self._lane.happen_until(self)


class StrictLane:
    """See `Lane`."""

    def __init__(self) -> None:
        self._pending: list[_Copy] = []
        self._followed = -1
        self.num_page_locked = self.num_copies = 0

    def page_locked(self, num_bytes: int) -> NDArray[np.uint8]:
        self.num_page_locked += 1
        return np.frombuffer(bytearray(b"\x7f") * num_bytes, dtype=np.uint8)

    def follow_launches(self) -> None:
        self._followed = strict_device.counts()["allocations"]

    def to_device(self, target: Any, source: NDArray[np.uint8]) -> _Copy:
        block = self._block(target)
        given = _digest(source)
        address, size = target.ctypes.data, source.nbytes
        strict_device.BEING_FILLED.append(block)

        def happen() -> None:
            strict_device.BEING_FILLED.remove(block)
            if strict_device.block_at(address, size) != block:
                raise strict_device.StrictError("memory of the device was given back while it was being filled")
            if _digest(source) != given:
                raise strict_device.StrictError("a page-locked buffer was written before its copy was done")
            ctypes.memmove(address, source.ctypes.data, size)

        return self._begin(happen)

    def to_host(self, target: NDArray[np.uint8], source: Any) -> _Copy:
        block = self._block(source)
        address, size = source.ctypes.data, target.nbytes
        target[:] = 0x7F

        def happen() -> None:
            if strict_device.block_at(address, size) != block:
                raise strict_device.StrictError("memory of the device was given back before it was copied")
            ctypes.memmove(target.ctypes.data, address, size)

        return self._begin(happen)

    def precede_launches(self) -> None:
        self.wait()

    def wait(self) -> None:
        while self._pending:
            self._pending.pop(0).happen()

    def happen_until(self, last: _Copy) -> None:
        while last in self._pending:
            self._pending.pop(0).happen()

    def _begin(self, happen: Callable[[], None]) -> _Copy:
        self.num_copies += 1
        self._pending.append(_Copy(self, happen))
        return self._pending[-1]

    def _block(self, array: Any) -> int:
        block = strict_device.block_of(array)
        if not block:
            raise strict_device.StrictError("a copy between host and device has no array of the device")
        if block > self._followed:
            raise strict_device.StrictError("a copy may overtake launches that use the same memory")
        return block


def _digest(values: NDArray[np.uint8]) -> bytes:
    return hashlib.blake2b(values.tobytes()).digest()
