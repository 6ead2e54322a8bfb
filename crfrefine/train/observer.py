"""The observer of a training run, how much of the run is done, and the threads that cases share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

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
    """Tells an observer how much of a run is done.

    The run has `num_parts` trainings of at most `num_steps` optimizer steps.
    """

    def __init__(self, observer: TrainingObserver, num_parts: int, num_steps: int) -> None:
        self.observer = observer
        self._num_parts = num_parts
        self._num_steps = num_steps
        self._num_ended = 0  # trainings that are over
        self._step = 0  # optimizer steps of the present training

    def stepped(self, stage: str, start: str, state: str) -> None:
        """Show one more optimizer step."""
        self._step += 1
        self.observer.stepped(stage, start, state)
        share_of_part = min(1.0, self._step / self._num_steps)
        share = (self._num_ended + share_of_part) / self._num_parts
        self.observer.progressed(SCREENING_SHARE + (1.0 - SCREENING_SHARE) * share)

    def part_ended(self) -> None:
        """A training of the run is over."""
        self._num_ended += 1
        self._step = 0


Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers(ThreadPoolExecutor):
    """Divides threads between items and the computation of each.

    With `one_by_one`, models run one at a time.
    """

    def __init__(self, threads: int, *, one_by_one: bool = False) -> None:
        super().__init__(threads, "case")
        self.threads = threads
        self._one_by_one = one_by_one

    def run_on_device(
        self, function: Callable[[Item, int], Result], items: Sequence[Item]
    ) -> list[Result]:
        """Like `run`, for computations of the model."""
        return self.run(function, items, one_by_one=self._one_by_one)

    def run(
        self,
        function: Callable[[Item, int], Result],
        items: Sequence[Item],
        *,
        one_by_one: bool = False,
    ) -> list[Result]:
        """Return `function(item, number of threads)` of each item, in order.

        The first item's error is raised.
        """
        return list(self.iterate(function, items, one_by_one=one_by_one))

    def iterate(
        self,
        function: Callable[[Item, int], Result],
        items: Sequence[Item],
        *,
        one_by_one: bool = False,
    ) -> Iterator[Result]:
        """Like `run`, for results that are looked at one after the other."""
        runs_in_turn = one_by_one or len(items) < self.threads or self.threads == 1
        if runs_in_turn:  # Each item gets all threads.
            return (function(item, self.threads) for item in items)
        return self.map(lambda item: function(item, 1), items)
