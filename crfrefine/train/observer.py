"""The observer of a training run, and how much of the run is done."""

from __future__ import annotations

import threading

from crfrefine.runs.options import Observer
from crfrefine.runs.records import Record

# Share of the shown progress for reading and for trying the starts; the trainings share the rest
# equally.
SCREENING_SHARE = 0.1


class TrainingObserver(Observer[str, Record]):
    """Receives the events of a run.

    The run is described by a text with the number of cases and the plan.
    """

    def stage_started(self, stage: str) -> None:
        """A part of the run begins."""

    def stepped(self, stage: str, start: str, state: str) -> None:
        """The optimizer made a step of a start in a part of the run.

        `state` has its number, the loss and the bandwidths.
        """

    def progressed(self, fraction: float, done: str = "") -> None:
        """About so much of the whole run is done.

        `done` says it in words, where steps of an optimizer do not.
        """

    def stage_ended(self, text: str) -> None:
        """A part of the run is over; `text` is its outcome in a line."""


class Progress:
    """Tells an observer about a run, whose parts may call at the same time.

    The run has `num_parts` trainings of at most `num_steps` optimizer steps.
    """

    def __init__(self, observer: TrainingObserver, num_parts: int, num_steps: int) -> None:
        self._observer = observer
        self._num_parts = num_parts
        self._num_steps = num_steps
        self._screened = 0.0  # share of the trying of starts that is done
        self._steps: dict[str, int] = {}  # optimizer steps that count as made, of each training
        self._lock = threading.Lock()

    def note(self, text: str) -> None:
        """Pass an assumption on."""
        with self._lock:
            self._observer.note(text)

    def stage_started(self, stage: str) -> None:
        """A part of the run begins."""
        with self._lock:
            self._observer.stage_started(stage)

    def start_tried(self, share: float) -> None:
        """A start was tried, which is such a share of the trying of starts."""
        with self._lock:
            self._screened += share
            self._observer.progressed(SCREENING_SHARE * self._screened)

    def stepped(self, training: str, start: str, state: str) -> None:
        """Show one more optimizer step of a training."""
        with self._lock:
            self._steps[training] = min(self._steps.get(training, 0) + 1, self._num_steps)
            self._observer.stepped(training, start, state)
            self._show()

    def training_ended(self, training: str, text: str) -> None:
        """A training of the run is over; `text` is its outcome in a line."""
        with self._lock:
            self._steps[training] = self._num_steps
            self._show()
            self._observer.stage_ended(text)

    def _show(self) -> None:
        share = sum(self._steps.values()) / (self._num_parts * self._num_steps)
        self._observer.progressed(SCREENING_SHARE + (1.0 - SCREENING_SHARE) * share)
