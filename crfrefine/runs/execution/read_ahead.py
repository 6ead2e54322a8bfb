"""Read items ahead of the computation, in threads: several at once where reading is the bottleneck, as far as memory has room for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")

Admit = Callable[[int], None]
"""Called with the bytes that an item will take, before it takes them; returns when there is room."""


class _ClosedError(BaseException):
    """Nobody needs the item any more. No error of the item, so not one that its reader handles."""


@dataclass
class _Begun(Generic[Loaded]):
    """An item that is being read, or waits to be taken."""

    bytes: int | None = None  # that it takes; None: it is not known yet
    loaded: Loaded | None = None
    error: BaseException | None = None
    is_done: bool = False  # whether it can be taken


class ReadAhead(Generic[Item, Loaded]):
    """Items in memory before they are needed; reading begins with `start`.

    One is read ahead at first. Each time that the computation has to wait for one, another reader begins, until there are `most_readers`.
    An item that is not the next one waits to be read until it and all before it take no more than `most_bytes`.

    Args:
        items: in the order in which they are taken.
        read: of an item, in a reading thread; an item for which it returns None is left out. It calls its second argument once it knows how
            large the item is.
        stop: when set, no further item is begun.
        most_readers: items that may be read or wait at the same time.
        most_bytes: of all of them.
    """

    def __init__(
        self,
        items: Iterable[Item],
        read: Callable[[Item, Admit], Loaded | None],
        stop: threading.Event,
        *,
        most_readers: int = 1,
        most_bytes: int = 0,
    ) -> None:
        self._items = enumerate(items)
        self._read, self._stop = read, stop
        self._most_readers, self._most_bytes = most_readers, most_bytes
        self._changed = threading.Condition()  # of the fields below; its owner may take its lock again
        self._begun: dict[int, _Begun[Loaded]] = {}
        self._num_readers = self._num_ended = self._num_taken = 0
        self._is_closed = False
        self._pool = ThreadPoolExecutor(most_readers, "read")

    def start(self) -> None:
        """Begin to read in another thread, unless there are enough of them, or the system has none left for more than one."""
        if self._num_readers == self._most_readers:
            return
        self._num_readers += 1
        try:
            self._pool.submit(self._read_items)
        except RuntimeError:
            if self._num_readers == 1:
                raise
            self._num_readers -= 1
            self._most_readers = self._num_readers

    def take(self, waiting: Callable[[], None]) -> Loaded | None:
        """Return the next item, once it is read; None: there is no other, or the run was stopped.

        Raises what reading it raised. `waiting` is called if it is not there yet.
        """

        def can_take() -> bool:
            return self._begun[min(self._begun)].is_done if self._begun else self._num_ended == self._num_readers

        with self._changed:
            if not can_take():
                if self._num_taken:
                    self.start()
                waiting()
                self._changed.wait_for(can_take)
            if not self._begun:
                return None
            taken = self._begun.pop(min(self._begun))
            self._num_taken += 1
            self._changed.notify_all()
        if taken.error is not None:
            raise taken.error
        loaded, taken.loaded = taken.loaded, None  # Its reader still has `taken`.
        return loaded

    def close(self, *, waits: bool) -> None:
        """Begin no other item; those that wait for room are given up.

        With `waits`, those that are being read are waited for: they are not needed any more, but their readers may have to say so.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._pool.shutdown(wait=waits)

    def _read_items(self) -> None:
        """Read one item after the other, each when the one before has been taken."""
        try:
            while True:
                with self._changed:
                    next_one = None if self._is_closed or self._stop.is_set() else next(self._items, None)
                    if next_one is None:
                        return
                    number, item = next_one
                    begun = self._begun[number] = _Begun()
                try:
                    begun.loaded = self._read(item, partial(self._admit, number))
                except _ClosedError:
                    begun.loaded = None
                except BaseException as error:  # whoever takes the item gets it
                    begun.error = error
                with self._changed:
                    if begun.loaded is None and begun.error is None:
                        del self._begun[number]
                    begun.is_done = True
                    self._changed.notify_all()
                    while not self._is_closed and number in self._begun:
                        self._changed.wait()
        finally:
            with self._changed:
                self._num_ended += 1
                self._changed.notify_all()

    def _admit(self, number: int, size: int) -> None:
        """Wait until an item is the next one, or there is room for it: then the sizes of all before it are known."""

        def may_go_on() -> bool:
            before = [begun for other, begun in self._begun.items() if other < number]
            are_known = all(begun.bytes is not None for begun in before)
            has_room = are_known and sum(begun.bytes or 0 for begun in self._begun.values()) + size <= self._most_bytes
            return self._is_closed or not before or has_room

        with self._changed:
            self._changed.wait_for(may_go_on)
            if self._is_closed:
                raise _ClosedError
            self._begun[number].bytes = size
