"""The only mutable record of a run's finished work: each change replaces the old value by a new one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from crfrefine.train.budget import Budget
from crfrefine.train.checkpoint import Checkpoint
from crfrefine.train.done import Done, Part


class Journal:
    """Keeps the finished work of a run, and saves it from time to time.

    Args:
        done: by the run that this one resumes, or nothing yet.
        checkpoint: the file to write to.
        budget: knows how long the run has taken.
    """

    def __init__(self, done: Done, checkpoint: Checkpoint, budget: Budget) -> None:
        self._done = done
        self._checkpoint = checkpoint
        self._budget = budget

    @property
    def done(self) -> Done:
        """The finished work so far."""
        return self._done

    def note_screening(self, screening: list[list[float]]) -> None:
        """Record the starts that were tried so far."""
        self._done = replace(self._done, screening=screening)
        self.save()

    def note_training(self, state: dict[str, Any]) -> None:
        """Record the state of the training in progress."""
        self._done = replace(self._done, training=state)
        if self._checkpoint.is_due():
            self.save()

    def part(self, number: int) -> Part:
        """Return the finished work of a part of the run."""
        return self._done.parts[number]

    def note_part(self, number: int, part: Part) -> None:
        """Record a finished piece of a part; the training in progress has ended with it."""
        parts = self._done.parts
        # Both at once: an interrupt finds either the training in progress or its result.
        self._done = replace(self._done, parts=(*parts[:number], part, *parts[number + 1 :]), training=None)

    def save(self) -> None:
        """Save the finished work."""
        self._checkpoint.save(replace(self._done, seconds=self._budget.spent_seconds))
