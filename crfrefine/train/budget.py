"""The time budget of a run: time spent, time left, and when to stop each part so that the run ends in time."""

from __future__ import annotations

import time

RESERVED_SHARE = 0.15
"""Share of the allowed time that no training gets: for the comparison and for writing."""

MAX_FINISHING_SECONDS = 10.0
"""Work ends this long before the limit, or a tenth of the time before it if that is shorter, so that the results can still be written."""


class TimeIsUpError(Exception):
    """The allowed time is over; the run ends with what there is."""


class Budget:
    """Divides the allowed time among the parts of a run, and ends the run when it is over.

    `started` is a reading of the monotonic clock, by default now. The time spent by the run that this one resumes does not count.
    """

    def __init__(self, max_minutes: float | None, spent_seconds: float = 0.0, *, started: float | None = None) -> None:
        self._started = time.monotonic() if started is None else started
        self.spent_before = spent_seconds
        self._limit = None if max_minutes is None else 60.0 * max_minutes
        self._part_ends: float | None = None
        self._asked: float | None = None
        self._around = 0.0  # seconds that the slowest part so far took beside its training, such as for measuring

    @property
    def spent_seconds(self) -> float:
        """Seconds since the run began, without the time between a stop and its resumption."""
        return self.spent_before + self._elapsed

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def check(self) -> None:
        """Raise TimeIsUpError if only the time to write is left; called before each piece of work, such as a case."""
        if self._limit is not None and self._elapsed >= self._limit - min(MAX_FINISHING_SECONDS, 0.1 * self._limit):
            raise TimeIsUpError

    def start_part(self, parts_left: int) -> None:
        """Give the training that begins now its share of the remaining time; `parts_left` includes it."""
        if self._limit is None:
            return
        now = self._elapsed
        if self._asked is not None:
            self._around = max(self._around, now - self._asked)
        share = max(0.0, self._limit * (1.0 - RESERVED_SHARE) - now) / max(1, parts_left)
        # Of the first part nothing is known: half of its share is kept for what follows the training.
        self._part_ends = now + max(0.0, share - (self._around if self._asked is not None else share / 2))
        self._asked = now

    def is_part_over(self) -> bool:
        """Return whether the current training has used up its share; called between its steps."""
        self._asked = self._elapsed
        return self._part_ends is not None and self._asked >= self._part_ends
