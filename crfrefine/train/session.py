"""What the stages of a run share and change: the finished work, which is saved from time to time, and the progress that is shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from crfrefine.runs.execution.threads import Workers
from crfrefine.train.budget import Budget
from crfrefine.train.checkpoint import Checkpoint, Done, Part
from crfrefine.train.observer import TrainingObserver
from crfrefine.train.plan import Plan

SCREENING_SHARE = 0.1
"""Of the progress that is shown, for reading and for trying the starts; the optimizer steps share the rest equally."""


class Session:
    """Handed from stage to stage; each change replaces the finished work by a new value.

    `done` is what the run has that this one resumes; without a checkpoint, nothing is saved.
    """

    def __init__(
        self, plan: Plan, done: Done, checkpoint: Checkpoint | None, budget: Budget, workers: Workers, observer: TrainingObserver
    ) -> None:
        self.plan = plan
        self.done = done
        self._checkpoint = checkpoint
        self.budget = budget
        self.workers = workers
        self.observer = observer
        self.num_planned = 0
        """Optimizer steps of the run, if no training is stopped early."""

        self._num_finished = 0  # planned for the trainings that are over, even if they were stopped early
        self._num_of_training = 0  # made in the training that goes on

    def part(self, number: int) -> Part:
        """Return the finished work of a part of the run."""
        return self.done.parts[number]

    def note_part(self, number: int, **finished: Any) -> None:
        """Record finished pieces of a part; the training in progress has ended with them."""
        parts = self.done.parts
        part = replace(parts[number], **finished)
        # Both at once: an interrupt finds either the training in progress or its result.
        self.done = replace(self.done, parts=(*parts[:number], part, *parts[number + 1 :]), training=None)

    def note_training(self, state: dict[str, Any]) -> None:
        """Record the state of the training in progress."""
        self.done = replace(self.done, training=state)
        if self._checkpoint is not None and self._checkpoint.is_due():
            self.save()

    def save(self) -> None:
        """Save the finished work."""
        if self._checkpoint is not None:
            self._checkpoint.save(replace(self.done, seconds=self.budget.spent_seconds))

    def tried(self, screening: list[list[float]], num_starts: int) -> None:
        """Record and tell how the starts did that were tried so far, of so many."""
        self.done = replace(self.done, screening=screening)
        self.save()
        self.observer.progressed(SCREENING_SHARE * len(screening[0]) / num_starts, None)

    def training_begun(self, num_optimizer_steps: int) -> None:
        """A training begins, or goes on after so many steps."""
        self._num_of_training = num_optimizer_steps

    def stepped(self) -> None:
        """Tell of one more optimizer step."""
        self._num_of_training += 1
        num_done = self._num_finished + self._num_of_training
        fraction = SCREENING_SHARE + (1.0 - SCREENING_SHARE) * min(1.0, num_done / max(1, self.num_planned))
        self.observer.progressed(fraction, self.budget.spent_seconds * (1.0 - fraction) / fraction)

    def training_finished(self, num_planned: int) -> None:
        """Trainings are over for which so many steps were planned."""
        self._num_finished += num_planned
        self._num_of_training = 0
