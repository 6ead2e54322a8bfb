"""Which case is open, and which one is probably next and so read ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from crfrefine.base.limits import thread_pool
from crfrefine.errors import InputError
from crfrefine.tune.results import StaleError
from crfrefine.tune.session import Session
from crfrefine.tune.values import Json

_PAUSE = 0.02  # seconds after which work that gives way to the page looks again


class EndedError(Exception):
    """The page has ended, and so does the work beside it."""


class OpenCase:
    """The case that the page shows. Its methods may be called from any thread.

    The case that is probably opened next is read beside it, and then its result is computed.
    """

    def __init__(
        self,
        session: Session | None,
        read: Callable[[int], Session],
        read_ahead: Callable[[int], Session | None],
    ) -> None:
        """Begin with a case; `read` reads another one, `read_ahead` does if there is memory.

        None means that it cannot be read: it is the first one, and is read once it can be.
        """
        self._session = session
        self._read = read
        self._read_ahead = read_ahead
        self._lock = threading.Lock()  # While it is held, nothing is read or computed.
        self._opening = 0 if session is None else session.number  # the case that was asked for last
        self._thread = thread_pool(1, "read ahead", gives_way=True)
        self._next: int | None = None  # the case that is read ahead
        self._reading: Future[Session | None] | None = None
        self._refining: Future[None] | None = None  # goes on once the case is open
        self._has_ended = False

    @property
    def number(self) -> int:
        """The number of the open case."""
        session = self._session
        return self._opening if session is None else session.number

    def session(self, number: int) -> Session:
        """Return the open case; raise InputError if another one is open."""
        if self._session is None:
            self.open(number)
        session = self._session
        assert session is not None
        if session.number == number:
            return session
        name = session.case.case_id
        raise InputError(f"another case is open now, {name}: reload the page to see it")

    def in_case(self, number: int, act: Callable[[Session], Json]) -> Json:
        """Do something with a case.

        It need not be the open one: a tab may show a case while another tab has opened one.
        """
        session = self._session
        if session is None or session.number != number:
            session = self._read(number)
        try:
            return act(session)
        finally:
            self._forget(session)

    def _forget(self, session: Session) -> None:
        """Free the strokes of a case that is not open."""
        if self._session is None or self._session.drawing is not session.drawing:
            session.drawing.forget()

    def open(self, number: int) -> None:
        """Open a case instead of the open one, whose strokes are kept.

        It stops computing at once. If the other one cannot be read, the case that is open stays
        open. Where several are opened at a time, the last one asked for is.
        """
        with self._lock:
            self._opening = number
            former = self._session
            if former is not None and former.number == number:
                self._stay_open()
                return
            if former is not None:
                former.results.is_left = True
            reading = self._reading
            # One that has not begun waits for a case that nobody opens any more.
            if reading is not None and (reading.cancel() or self._next != number):
                reading = None
            self._next = None
            self._reading = None
        try:
            session = None if reading is None else reading.result()
            if session is None:
                session = self._read(number)
        except BaseException:
            with self._lock:
                if number == self._opening:
                    self._stay_open()
            raise
        with self._lock:
            left: Session | None = session
            if number == self._opening:
                left = self._session
                self._session = session
            if left is not None:
                left.results.is_left = True
                self._forget(left)

    def _stay_open(self) -> None:
        """Let the open case compute again, after another one was not opened."""
        if self._session is not None and not self._has_ended:
            self._session.results.is_left = False

    def read_ahead(self, number: int) -> None:
        """Begin to read the case that is probably opened next, if there is memory for two."""
        with self._lock:
            if number in (self._next, self.number) or self._has_ended:
                return
            if self._reading is not None:
                self._reading.cancel()
            self._next = number
            self._reading = reading = self._thread.submit(self._read_ahead, number)

            def refine() -> None:
                session = reading.result()
                if session is not None:
                    session.refine_ahead(partial(self.give_way, ahead=session))

            self._refining = self._thread.submit(refine)

    def give_way(self, *progress: object, ahead: Session | None = None) -> None:
        """Wait while the page waits for a result; raise EndedError once the page has ended.

        The result of `ahead` does not wait once it is the open case. Raise StaleError if it is
        neither that nor the next one any more.
        """
        while not self._has_ended:
            if ahead is not None and ahead.number not in (self._opening, self._next):
                raise StaleError
            shown = self._session
            if shown is None or shown is ahead or not shown.is_computing:
                return
            time.sleep(_PAUSE)
        raise EndedError

    @property
    def is_busy(self) -> bool:
        """Whether a step of some work has not stopped yet."""
        is_reading = self._refining is not None and not self._refining.done()
        return is_reading or (self._session is not None and self._session.is_computing)

    def end(self) -> None:
        """Stop all work at its next step."""
        self._has_ended = True
        if self._session is not None:
            self._session.results.is_left = True
        self._thread.shutdown(wait=False, cancel_futures=True)
