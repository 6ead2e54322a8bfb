"""The newest result of the computation, and waiting for a newer one."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crfrefine.base.failures import describe_failure

if TYPE_CHECKING:
    from crfrefine.arrays.label_maps import Box
    from crfrefine.base.array_types import Array


@dataclass(frozen=True, eq=False)
class Shown:
    """A result."""

    number: int  # Of the request that it answers.
    box: Box | None  # The part of the grid that it covers; None: all of it.
    labels: Array  # (*grid), or (*box).
    facts: dict[str, Any]  # What to say about it, as JSON.


class News:
    """What is under way, and the newest result. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.number = 0  # Of the newest request.
        self.shown: Shown | None = None  # The newest result.
        self.has_ended = False  # Whether the page is about to end.
        self._version = self._serial = 0
        self._working = ""
        self._error: dict[str, Any] | None = None

    def begin(self) -> int:
        """Return the number of a new request, which is larger than that of earlier ones."""
        with self._changed:
            self.number += 1
            self._error, self._working = None, "box"
            self._tell()
            return self.number

    def publish(self, shown: Shown, working: str) -> None:
        """Show a result unless there is a newer one; `working` is what follows: "whole", or "": nothing."""
        with self._changed:
            if self.shown is not None and self.shown.number > shown.number:
                return
            self.shown = shown
            self._serial += 1
            if shown.number == self.number:
                self._working = working
            self._tell()

    def fail(self, number: int, error: Exception) -> None:
        """Tell of an error, if it is that of the newest request."""
        with self._changed:
            if number == self.number:
                self._error, self._working = {"number": number, "text": describe_failure(error).message}, ""
            self._tell()

    def end(self) -> None:
        """Answer all that wait: the page is about to end."""
        with self._changed:
            self.has_ended = True
            self._tell()

    def wait(self, after: int, seconds: float) -> dict[str, Any]:
        """Return the state as soon as it is newer than a version, or after some seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._version > after or self.has_ended, seconds)
            shown = self.shown
            return {
                "version": self._version,
                "number": self.number,
                "working": self._working,
                "error": self._error,
                "has_ended": self.has_ended,
                "result": None if shown is None else {"number": shown.number, "serial": self._serial, **shown.facts},
            }

    def _tell(self) -> None:
        self._version += 1
        self._changed.notify_all()
