"""The one place of a run where what is done so far changes: each change puts a new value in the place of the old one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from crfrefine.train.budget import Budget
from crfrefine.train.checkpoint import Checkpoint
from crfrefine.train.done import Done, Part


class Journal:
    """Keeps what is done so far, and writes it down now and then.

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
        """What is done so far."""
        return self._done

    def note_screening(self, screening: list[list[float]]) -> None:
        """The starts were tried."""
        self._done = replace(self._done, screening=screening)
        self.save()

    def note_training(self, state: dict[str, Any]) -> None:
        """A training goes on, and has come to this state."""
        self._done = replace(self._done, training=state)
        if self._checkpoint.is_due():
            self.save()

    def part(self, number: int) -> Part:
        """Return what is done of a part of the run."""
        return self._done.parts[number]

    def note_part(self, number: int, part: Part) -> None:
        """Something of a part is finished, and with it the training that was going on."""
        parts = self._done.parts
        # Both at once: an interrupt finds either the training that goes on or what came of it.
        self._done = replace(self._done, parts=(*parts[:number], part, *parts[number + 1 :]), training=None)

    def save(self) -> None:
        """Write down what is done."""
        self._checkpoint.save(replace(self._done, seconds=self._budget.spent_seconds))
