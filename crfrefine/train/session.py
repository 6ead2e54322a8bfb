"""The finished work of a run, which is saved after each part, and its progress: shared by all stages."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from crfrefine.runs.threads import Workers
from crfrefine.train.checkpoint import Checkpoint, Done, Part
from crfrefine.train.observer import TrainingObserver
from crfrefine.train.plan import Plan

SCREENING_SHARE = 0.1
"""Share of the shown progress for reading and for trying the starts; the parts share the rest equally."""


class Session:
    """Handed from stage to stage; each change replaces the finished work by a new value.

    `done` is that of the run that is resumed; without a checkpoint, nothing is saved.
    """

    def __init__(self, plan: Plan, done: Done, checkpoint: Checkpoint | None, workers: Workers, observer: TrainingObserver) -> None:
        self.plan, self.done, self.workers, self.observer = plan, done, workers, observer
        self._checkpoint = checkpoint
        self._started, self._spent_before = time.monotonic(), done.seconds
        self._part, self._num_steps = 0, 0  # the part in progress, and its optimizer steps so far

    @property
    def seconds(self) -> float:
        """Seconds since the run began, without the time between a stop and its resumption."""
        return self._spent_before + time.monotonic() - self._started

    def part(self, number: int) -> Part:
        """Return the finished work of a part of the run."""
        return self.done.parts[number]

    def note_part(self, number: int, **finished: Any) -> None:
        """Record finished pieces of a part, and save them."""
        parts = self.done.parts
        self.done = replace(self.done, parts=(*parts[:number], replace(parts[number], **finished), *parts[number + 1 :]))
        self.save()

    def save(self) -> None:
        """Save the finished work."""
        if self._checkpoint is not None:
            self._checkpoint.save(replace(self.done, seconds=self.seconds))

    def tried(self, screening: list[list[float]], num_starts: int) -> None:
        """Record and show the scores of the starts that were tried so far, of so many."""
        self.done = replace(self.done, screening=screening)
        self.observer.progressed(SCREENING_SHARE * len(screening[0]) / num_starts, None)

    def part_begun(self, number: int) -> None:
        """A part begins, for the progress."""
        self._part, self._num_steps = number, 0

    def stepped(self) -> None:
        """Show one more optimizer step."""
        self._num_steps += 1
        share = min(1.0, self._num_steps / self.plan.num_planned)
        fraction = SCREENING_SHARE + (1.0 - SCREENING_SHARE) * (self._part + share) / len(self.done.parts)
        self.observer.progressed(fraction, self.seconds * (1.0 - fraction) / fraction)
