"""The interface to which a training run reports its progress."""

from __future__ import annotations

from dataclasses import dataclass

from crfrefine.runs.records import Observer, Record


@dataclass(frozen=True)
class Step:
    """State of the optimizer.

    Attributes:
        stage: such as "cross-validation fold 2 of 5" or "all cases".
        start: name of the start.
        optimizer_step: of this start, from 1.
        num_optimizer_steps: how many it may make.
        loss: of the cases of this step.
        score: mean Dice of the cases that decide, where they were just measured.
        thetas: current bandwidths as text.
    """

    stage: str
    start: str
    optimizer_step: int
    num_optimizer_steps: int
    loss: float
    score: float | None
    thetas: str


class TrainingObserver(Observer[str, Record]):
    """Receives the events of a run; the run is described by a text with the number of cases and the plan."""

    def stage_started(self, stage: str) -> None:
        """A part of the run begins."""

    def stepped(self, step: Step) -> None:
        """The optimizer made a step."""

    def progressed(self, fraction: float, seconds_left: float | None, done: str = "") -> None:
        """About so much of the whole run is done; `done` says it in words, where steps of an optimizer do not."""

    def stage_ended(self, text: str) -> None:
        """A part of the run is over; `text` is its outcome in a line."""
