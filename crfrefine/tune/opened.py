"""Which case is open, and which one is probably next and so read ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from crfrefine.errors import InputError
from crfrefine.tune.ahead import Read, ReadAhead
from crfrefine.tune.session import Session
from crfrefine.tune.values import Json

_PAUSE = 0.02  # seconds after which work that gives way to the page looks again


class EndedError(Exception):
    """The page has ended, and so does the work beside it."""


class OpenCase:
    """The case that the page shows. Its methods may be called from any thread."""

    def __init__(
        self, session: Session | None, read: Callable[[int], Session], read_ahead: Read
    ) -> None:
        """Begin with a case; `read` reads another one, `read_ahead` does if there is memory.

        None means that it cannot be read: it is the first one, and is read once it can be.
        """
        self._session = session
        self._read = read
        self._lock = threading.Lock()  # While it is held, nothing is read or computed.
        self._opening = 0 if session is None else session.number  # the case that was asked for last
        self._ahead = ReadAhead(read_ahead, self.give_way)
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
            is_open = self._session is not None and number == self._session.number
            if is_open:
                self._stay_open()
            else:
                if self._session is not None:
                    self._session.results.is_left = True
                reading = self._ahead.take(number)
        if not is_open:
            self._open(number, reading)

    def _open(self, number: int, reading: Future[Session | None] | None) -> None:
        """Read a case, unless it is read ahead, and open it, unless another one was asked for."""
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
            if number != self.number and not self._has_ended:
                self._ahead.begin(number)

    def give_way(self, *progress: object, ahead: Session | None = None) -> None:
        """Wait while the page waits for a result; raise EndedError once the page has ended.

        The result of `ahead` does not wait once it is the open case.
        """
        while not self._has_ended:
            shown = self._session
            if shown is None or shown is ahead or not shown.is_computing:
                return
            time.sleep(_PAUSE)
        raise EndedError

    @property
    def is_busy(self) -> bool:
        """Whether a step of some work has not stopped yet."""
        is_computing = self._session is not None and self._session.is_computing
        return self._ahead.is_busy or is_computing

    def end(self) -> None:
        """Stop all work at its next step."""
        self._has_ended = True
        if self._session is not None:
            self._session.results.is_left = True
        self._ahead.end()
