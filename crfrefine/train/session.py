"""The objects that the stages of a run share: workers, observer, journal, budget and progress."""

from __future__ import annotations

from dataclasses import dataclass

from crfrefine.runs.execution.threads import Workers
from crfrefine.train.budget import Budget
from crfrefine.train.journal import Journal
from crfrefine.train.observer import TrainingObserver
from crfrefine.train.progress import Progress


@dataclass(frozen=True)
class Session:
    """Handed from stage to stage.

    Attributes:
        workers: to compute with.
        observer: told what happens.
        journal: of what is done.
        budget: of the time.
        progress: told of every optimizer step.
    """

    workers: Workers
    observer: TrainingObserver
    journal: Journal
    budget: Budget
    progress: Progress
