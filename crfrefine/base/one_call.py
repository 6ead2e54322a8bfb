"""A lock for what serves one call at a time, and must never wait for itself."""

from __future__ import annotations

import threading

from crfrefine.errors import InputError


class OneCall:
    """A lock that a thread cannot take twice, to be used in a `with` statement.

    A call from a progress callback of the call at work would wait for itself for ever: it is
    refused. Calls of other threads wait or, with `waits` False, are refused, too.
    """

    def __init__(self, problem: str, *, waits: bool) -> None:
        """Take the message of the InputError that a refused call raises."""
        self._problem = problem
        self._waits = waits
        self._lock = threading.Lock()
        self._thread: int | None = None  # the one at work

    def __enter__(self) -> None:
        """Begin a call; raise InputError if it is refused."""
        thread = threading.get_ident()
        if self._thread == thread or not self._lock.acquire(blocking=self._waits):
            raise InputError(self._problem)
        self._thread = thread

    def __exit__(self, *exception: object) -> None:
        """End the call."""
        self._thread = None
        self._lock.release()
