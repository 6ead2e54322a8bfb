"""How much of a training run is done."""

from __future__ import annotations

import threading

from crfrefine.base.notes import Note
from crfrefine.base.observer import Observer

# Share of the shown progress for reading and for trying the starts; the trainings share the rest
# equally.
SCREENING_SHARE = 0.1


class Progress:
    """Tells an observer about a run, whose parts may call at the same time.

    The run has `num_parts` trainings of at most `num_steps` optimizer steps.
    """

    def __init__(self, observer: Observer, num_parts: int, num_steps: int) -> None:
        self._observer = observer
        self._num_parts = num_parts
        self._num_steps = num_steps
        self._screened = 0.0  # share of the trying of starts that is done
        self._steps: dict[str, int] = {}  # optimizer steps that count as made, of each training
        self._lock = threading.Lock()

    def note(self, note: Note) -> None:
        """Pass an assumption on."""
        with self._lock:
            self._observer.note(note)

    def stage_started(self, stage: str) -> None:
        """A part of the run begins."""
        with self._lock:
            self._observer.stage_changed("", stage)

    def start_tried(self, share: float) -> None:
        """A start was tried, which is such a share of the trying of starts."""
        with self._lock:
            self._screened += share
            self._observer.progressed(SCREENING_SHARE * self._screened)

    def stepped(self, training: str, start: str, state: str) -> None:
        """Show one more optimizer step of a training from a start.

        `state` has its number, the loss and the bandwidths.
        """
        with self._lock:
            self._steps[training] = min(self._steps.get(training, 0) + 1, self._num_steps)
            self._observer.stage_changed(training, f"[{start}] {state}")
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
