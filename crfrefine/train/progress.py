"""How much of a training run is done, by the time that it takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from crfrefine.base.notes import Note
from crfrefine.base.observer import Observer

TrainingObserver = Observer[str, Any]  # A run is described in a line.

ALL_CASES = "all cases"  # name of the part of the run after the folds

# These shares are of the most optimizer steps that one start may take.
# A fold trains two starts, which mostly end early, and the winner once more: 35 to 120 steps where
# a start may take 40.
STEPS_OF_FOLD = 1.4
STEPS_OF_LAST = 0.5
MAX_OF_FOLD = 3.0
# Share of the steps up to the most possible that are left, of a training that took more than it was
# expected to.
SHARE_LEFT = 0.25
# Weight of the expectation for a fold beside a fold that has ended.
PRIOR_WEIGHT = 0.5
# Share of the time for reading and for trying the starts, as long as no step was made: 0.04 with 80
# hippocampi, 0.2 with small phantoms.
SCREENING_SHARE = 0.1
MEASURING_STEPS = 0.4  # of a case, as long as none was measured


class Progress:
    """Tells an observer about a run, whose parts may call at the same time.

    The run trains `num_folds` folds, measures `num_cases` cases that they hold out, and trains on
    all cases. A start takes at most `num_steps` optimizer steps. The shares that are shown are of
    the time that the whole run is expected to take, if its rest is as fast as its start.
    """

    def __init__(
        self,
        observer: TrainingObserver,
        num_folds: int,
        num_steps: int,
        num_cases: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._observer = observer
        self._num_folds = num_folds
        self._num_steps = num_steps
        self._num_cases = num_cases
        self._clock = clock
        self._began = clock()
        self._work_began = self._began  # the training of the folds
        self._measuring_began = self._began
        self._seconds_of_steps = 0.0  # in which folds were trained
        self._seconds_of_cases = 0.0  # in which cases were measured
        self._screened = 0.0  # share of the trying of starts that is done
        self._num_measured = 0
        self._steps: dict[str, int] = {}  # optimizer steps that were made, of each fold
        self._last_steps = 0  # those of the training on all cases
        self._ended: set[str] = set()  # the trainings that make no more steps
        self._lock = threading.Lock()

    def note(self, note: Note) -> None:
        """Pass an assumption on."""
        with self._lock:
            self._observer.note(note)

    def stage_started(self, stage: str) -> None:
        """A part of the run begins."""
        with self._lock:
            now = self._clock()
            if not self._steps:
                self._work_began = now
            if not self._num_measured:
                self._measuring_began = now
            self._observer.stage_changed("", stage)

    def start_tried(self, share: float) -> None:
        """A start was tried, which is this share of the trying of starts."""
        with self._lock:
            self._screened += share
            self._observer.progressed(SCREENING_SHARE * self._screened)

    def stepped(self, training: str, start: str, state: str) -> None:
        """Show one more optimizer step of a training from a start.

        `state` has its number, the loss and the bandwidths.
        """
        with self._lock:
            if training == ALL_CASES:
                self._last_steps += 1
            else:
                self._steps[training] = self._steps.get(training, 0) + 1
                self._seconds_of_steps = self._clock() - self._work_began
            self._observer.stage_changed(training, f"[{start}] {state}")
            self._show()

    def fold_trained(self, training: str) -> None:
        """A fold makes no more steps; its cases held out are not measured yet."""
        with self._lock:
            self._ended.add(training)
            self._measuring_began = self._clock()
            self._seconds_of_steps = self._measuring_began - self._work_began
            self._show()

    def case_measured(self) -> None:
        """A case that a fold holds out was measured."""
        with self._lock:
            self._num_measured += 1
            self._seconds_of_cases = self._clock() - self._measuring_began
            self._show()

    def training_ended(self, training: str, text: str) -> None:
        """A training of the run is over; `text` is its outcome in a line."""
        with self._lock:
            self._ended.add(training)
            self._show()
            self._observer.stage_ended(text)

    def _show(self) -> None:
        """Show how much of the time is over."""
        num_steps = sum(self._steps.values())
        of_case = 0.0
        if self._num_measured:
            of_case = self._seconds_of_cases / self._num_measured
        of_step = of_case / MEASURING_STEPS  # as in a run that is resumed with trained folds
        if num_steps:
            of_step = self._seconds_of_steps / num_steps
        if not self._num_measured:
            of_case = MEASURING_STEPS * of_step

        # Folds that have ended tell how many steps the others take.
        of_ended = [self._steps.get(name, 0) for name in self._ended - {ALL_CASES}]
        of_fold = PRIOR_WEIGHT * STEPS_OF_FOLD * self._num_steps + sum(of_ended)
        of_fold /= PRIOR_WEIGHT + len(of_ended)
        steps_left = 0.0
        num_waiting = self._num_folds - len(of_ended)
        for name, steps in self._steps.items():
            if name not in self._ended:
                num_waiting -= 1
                possible = MAX_OF_FOLD * self._num_steps - steps
                steps_left += max(of_fold - steps, SHARE_LEFT * possible)
        steps_left += max(0, num_waiting) * of_fold
        if ALL_CASES not in self._ended:
            steps_left += max(0.0, STEPS_OF_LAST * self._num_steps - self._last_steps)

        left = of_step * steps_left + of_case * max(0, self._num_cases - self._num_measured)
        elapsed = self._clock() - self._began
        if elapsed > 0.0:
            self._observer.progressed(elapsed / (elapsed + left))
