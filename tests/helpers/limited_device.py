"""A stand-in for a GPU with little memory: what its arrays take is counted as they come and go, and more than there is cannot be had."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
from counting_device import CountingDevice


class LimitedDevice(CountingDevice):
    """Counts the memory of its arrays, not that of the host's.

    Args:
        limit: bytes that it has.
        is_told: whether it says how much is free; else an allocation that does not fit is the first that anybody hears of it.

    Attributes:
        most: bytes that were in use at the same time.
    """

    def __init__(self, limit: int = 1 << 40, *, is_told: bool = True) -> None:
        self.limit, self.most, self._used, self._is_told = limit, 0, 0, is_told
        self._alive: set[int] = set()
        super().__init__()

    def free_bytes(self) -> int | None:
        return self.limit - self._used if self._is_told else None

    def own(self, value: Any) -> Any:
        found = super().own(value)
        if isinstance(found, np.ndarray):
            self._count(found)
        return found

    def _count(self, array: np.ndarray) -> None:
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        place, size = id(owner), owner.nbytes
        if place in self._alive:
            return
        if self._used + size > self.limit:
            raise MemoryError(f"{size} bytes where {self.limit - self._used} are free")

        def release() -> None:
            self._alive.discard(place)
            self._used -= size

        self._alive.add(place)
        self._used += size
        self.most = max(self.most, self._used)
        weakref.finalize(owner, release)
