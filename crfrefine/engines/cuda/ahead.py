"""Arrays of the next case, copied to the device while it computes another one."""

from __future__ import annotations

import math
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
        self._filling = threading.Lock()  # while arrays are copied; taken before the next one
        self._lock = threading.Lock()  # of the list of cases
        self._cases: list[list[_Entry]] = []
        self._reserving = threading.Lock()
        self._reserved: dict[int, float] = {}

    def begin(self, transfers: Transfers, arrays: tuple[NDArray[Any], ...]) -> None:
        """Begin to copy the arrays of the next case, as far as there is room; without arrays, forget all.

        Args:
            transfers: of the device.
            arrays: in C order; they must not change until they are taken.
        """
        with self._filling:
            entries: list[_Entry] = []
            with self._lock:
                self._forget(transfers, len(self._cases) - _MOST_CASES + 1 if arrays else len(self._cases))
                if arrays:
                    self._cases.append(entries)
            for array in arrays:
                free = self._device.free_bytes()
                if free is None or array.nbytes * SHARE <= free - self._reserved_bytes():
                    entry = _Entry(_key(array), array, transfers.begin_upload(array))
                    with self._lock:
                        entries.append(entry)

    def take(self, transfers: Transfers | None, array: NDArray[Any]) -> Any:
        """Return an array of a case on the device, for launches from now on; None: it was not copied ahead.

        What was copied before for other cases is forgotten. It does not wait for the case after this one, which may be being copied.
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

    def room(self, transfers: Transfers | None, num_bytes: float) -> float:
        """Return the free memory, counting what was copied ahead; if so many bytes fit only in place of that, it is given back.

        So whether they fit does not depend on how far the copies are.
        """
        free = self._device.free_bytes()
        if free is None or num_bytes <= free:
            return math.inf if free is None else free
        with self._filling, self._lock:
            free = self._device.free_bytes() or 0
            taken: int = sum(entry.there.nbytes for entries in self._cases for entry in entries)
            if transfers is not None and free < num_bytes <= free + taken:
                self._forget(transfers, len(self._cases))
            return free + taken

    def reserve(self, num_bytes: float) -> None:
        """Leave so much memory free until this thread's run ends: what was estimated to fit begins.

        A run estimates its parts as well: its largest estimate counts. Outside of a run nothing is reserved.
        """
        thread = threading.get_ident()
        with self._reserving:
            if thread in self._reserved:
                self._reserved[thread] = max(self._reserved[thread], num_bytes)

    @contextmanager
    def run(self) -> Iterator[None]:
        """Return the context of a run in this thread, after which nothing is reserved for it; one inside another is a part of it."""
        thread = threading.get_ident()
        with self._reserving:
            is_part = thread in self._reserved
            if not is_part:
                self._reserved[thread] = 0.0
        try:
            yield
        finally:
            if not is_part:
                with self._reserving:
                    del self._reserved[thread]

    def _reserved_bytes(self) -> float:
        with self._reserving:
            return sum(self._reserved.values())

    def _forget(self, transfers: Transfers, count: int) -> None:
        """Give the arrays of the oldest cases back, once they are not being filled any more."""
        if count > 0 and any(self._cases[:count]):
            transfers.lane.wait()
        del self._cases[: max(0, count)]


def _key(array: NDArray[Any]) -> tuple[Any, ...]:
    return array.__array_interface__["data"][0], array.shape, array.strides, array.dtype.str
