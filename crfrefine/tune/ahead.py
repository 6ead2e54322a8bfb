"""The case that is probably opened next: it is read ahead, and then its result is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from crfrefine.base.limits import thread_pool
from crfrefine.tune.session import Session

# Reads the case of a number; None means too little memory for it.
Read = Callable[[int], Session | None]
# Called at each step of the result of a session, `ahead`; it may wait, or raise to stop.
GiveWay = Callable[..., None]


class _Next(NamedTuple):
    number: int
    reading: Future[Session | None]
    refining: Future[None]


class ReadAhead:
    """Reads one case ahead, beside the open one. Nothing here waits for it."""

    def __init__(self, read: Read, give_way: GiveWay) -> None:
        self._read = read
        self._give_way = give_way
        self._thread = thread_pool(1, "read ahead", gives_way=True)
        self._next: _Next | None = None
        self._refining: Future[None] | None = None  # goes on once the case is open

    def begin(self, number: int) -> None:
        """Begin to read a case instead of another one, unless it is read ahead already."""
        if self._next is not None and self._next.number == number:
            return
        self.drop()
        reading = self._thread.submit(self._read, number)
        self._refining = self._thread.submit(self._refine, reading)
        self._next = _Next(number, reading, self._refining)

    def take(self, number: int) -> Future[Session | None] | None:
        """Return the reading of a case that is opened; None if it has not begun, or waits.

        Another case is dropped. The result of the case that is opened is computed to its end.
        """
        following = self._next
        if following is None or following.number != number:
            self.drop()
            return None
        self._next = None
        if following.reading.cancel():  # The thread still reads a case that was dropped.
            following.refining.cancel()
            return None
        return following.reading

    def drop(self) -> None:
        """Stop reading, and computing the result of, a case that is not opened."""
        following = self._next
        self._next = None
        if following is None:
            return
        following.refining.cancel()
        is_read = not following.reading.cancel() and following.reading.done()
        if is_read and following.reading.exception() is None:
            session = following.reading.result()
            if session is not None:
                session.results.is_left = True

    @property
    def is_busy(self) -> bool:
        """Whether a case is still being read, or its result computed."""
        return self._refining is not None and not self._refining.done()

    def end(self) -> None:
        """Begin nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _refine(self, reading: Future[Session | None]) -> None:
        session = reading.result()
        if session is not None:
            session.refine_ahead(partial(self._give_way, ahead=session))
