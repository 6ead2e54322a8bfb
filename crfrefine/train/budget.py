"""The time budget of a run: time spent, time left, and when to stop each part so that the run ends in time."""

from __future__ import annotations

import time

RESERVED_SHARE = 0.15
"""Share of the allowed time reserved for reading, measuring and writing."""


class Budget:
    """Divides the allowed time among the parts of a run.

    Args:
        max_minutes: None: no limit.
        spent_seconds: time spent by the run that this one resumes.
    """

    def __init__(self, max_minutes: float | None, spent_seconds: float = 0.0) -> None:
        self._started = time.monotonic() - spent_seconds
        self._limit = None if max_minutes is None else 60.0 * max_minutes
        self._part_ends: float | None = None

    @property
    def spent_seconds(self) -> float:
        """Seconds since the run began, without the time between a stop and its resumption."""
        return time.monotonic() - self._started

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return self._limit is not None

    def start_part(self, parts_left: int) -> None:
        """Give the part that begins now its share of the remaining time; `parts_left` includes it."""
        if self._limit is not None:
            left = self._limit * (1.0 - RESERVED_SHARE) - self.spent_seconds
            self._part_ends = self.spent_seconds + max(0.0, left) / max(1, parts_left)

    def is_part_over(self) -> bool:
        """Return whether the current part has used up its share."""
        return self._part_ends is not None and self.spent_seconds >= self._part_ends
