"""A thread that runs the newest of the jobs it is given: while a slider moves, every job but the last is out of date."""

from __future__ import annotations

import threading
from collections.abc import Callable

IsStale = Callable[[], bool]
"""Tells a job whether a newer one waits."""


class NewestOnly:
    """Runs jobs one at a time; a job that waits is replaced by a newer one.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._condition = threading.Condition()
        self._waiting: Callable[[IsStale], None] | None = None
        self._has_ended = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[IsStale], None]) -> None:
        """Run a job next; it may ask from time to time whether it is out of date, and must not raise."""
        with self._condition:
            self._waiting = job
            self._condition.notify()

    def end(self) -> None:
        """Let the running job end, start no other, and wait for the thread."""
        with self._condition:
            self._has_ended = True
            self._condition.notify()
        self._thread.join()

    def _is_stale(self) -> bool:
        return self._has_ended or self._waiting is not None

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._has_ended or self._waiting is not None)
                job, self._waiting = self._waiting, None
            if self._has_ended or job is None:
                return
            job(self._is_stale)
