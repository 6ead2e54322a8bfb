"""The progress of a run: trying the starts counts for a fixed share, and every optimizer step counts equally."""

from __future__ import annotations

from crfrefine.train.budget import Budget
from crfrefine.train.observer import TrainingObserver

SCREENING_SHARE = 0.1
"""Of the progress that is shown, for reading and for trying the starts."""


class Progress:
    """Counts what is done and tells the observer about it.

    Args:
        num_planned: optimizer steps of the run, if no training is stopped early.
        observer: to be told.
        budget: knows how long the run has taken.
    """

    def __init__(self, num_planned: int, observer: TrainingObserver, budget: Budget) -> None:
        self._num_planned = num_planned
        self._observer = observer
        self._budget = budget
        self._num_finished = 0  # planned for the trainings that are over, even if they were stopped early
        self._num_of_training = 0  # made in the training that goes on

    def tried(self, num_starts: int, num_all: int) -> None:
        """Tell that so many of the starts were tried."""
        self._observer.progressed(SCREENING_SHARE * num_starts / num_all, None)

    def training_begun(self, num_optimizer_steps: int = 0) -> None:
        """A training begins, or goes on after so many steps."""
        self._num_of_training = num_optimizer_steps

    def stepped(self) -> None:
        """Tell of one more optimizer step."""
        self._num_of_training += 1
        num_done = self._num_finished + self._num_of_training
        fraction = SCREENING_SHARE + (1.0 - SCREENING_SHARE) * min(1.0, num_done / max(1, self._num_planned))
        self._observer.progressed(fraction, self._budget.spent_seconds * (1.0 - fraction) / fraction)

    def training_finished(self, num_planned: int) -> None:
        """Trainings are over for which so many steps were planned."""
        self._num_finished += num_planned
        self._num_of_training = 0
