"""Arrays of the next case, copied to the device while it computes another one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from numpy.typing import NDArray

if TYPE_CHECKING:
    from crfrefine.engines.cuda.transfers import Memory, Transfers

SHARE = 8
"""An array is copied ahead if it takes at most the free memory over this."""

_MOST_CASES = 2
"""The next case may be there before the present one has taken its own."""


class _Entry(NamedTuple):
    """An array of a case: of the host, which is kept so that its address is its own, and on the device."""

    key: tuple[Any, ...]
    host: NDArray[Any]
    there: Any


class Ahead:
    """What was copied ahead to a device. Nothing of it is needed: if memory is short, it is given back."""

    def __init__(self, device: Memory) -> None:
        """Take a device."""
        self._device = device
        self._lock = threading.Lock()
        self._cases: list[list[_Entry]] = []
        self._reserved = 0.0

    def begin(self, transfers: Transfers, arrays: tuple[NDArray[Any], ...]) -> None:
        """Begin to copy the arrays of the next case, as far as there is room; without arrays, forget all.

        Args:
            transfers: of the device.
            arrays: in C order; they must not change until they are taken.
        """
        with self._lock:
            if not arrays:
                self._forget(transfers, len(self._cases))
                return
            self._forget(transfers, len(self._cases) - _MOST_CASES + 1)
            entries: list[_Entry] = []
            self._cases.append(entries)
            for array in arrays:
                free = self._device.free_bytes()
                if free is None or array.nbytes * SHARE <= free - self._reserved:
                    entries.append(_Entry(_key(array), array, transfers.begin_upload(array)))

    def take(self, transfers: Transfers | None, array: NDArray[Any]) -> Any:
        """Return an array of a case on the device, for launches from now on; None: it was not copied ahead.

        What was copied before for other cases is forgotten.
        """
        key = _key(array)
        with self._lock:
            for number, entries in enumerate(self._cases):
                for place, entry in enumerate(entries):
                    if transfers is not None and entry.key == key:
                        transfers.lane.precede_launches()
                        del entries[place]
                        self._forget(transfers, number)
                        return entry.there
        return None

    def make_room(self, transfers: Transfers | None) -> None:
        """Give the memory back that was taken ahead."""
        with self._lock:
            if transfers is not None:
                self._forget(transfers, len(self._cases))

    def reserve(self, num_bytes: float) -> None:
        """Leave so much memory free: what was estimated to fit begins."""
        self._reserved = num_bytes

    @contextmanager
    def run(self) -> Iterator[None]:
        """Return the context of a run, after which nothing is reserved for it."""
        try:
            yield
        finally:
            self._reserved = 0.0

    def _forget(self, transfers: Transfers, count: int) -> None:
        """Give the arrays of the oldest cases back, once they are not being filled any more."""
        if count > 0 and any(self._cases[:count]):
            transfers.lane.wait()
        del self._cases[: max(0, count)]


def _key(array: NDArray[Any]) -> tuple[Any, ...]:
    return array.__array_interface__["data"][0], array.shape, array.strides, array.dtype.str
