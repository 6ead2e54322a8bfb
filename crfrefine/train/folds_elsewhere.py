"""Folds of the cross-validation on a cluster: each on one worker, from reading its cases to measuring those held out.

Only what a fold found comes back, as it stands in a checkpoint: `cross_validate` then finds its work done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import torch

from crfrefine.base.threads import available_threads
from crfrefine.errors import InputError
from crfrefine.runs.execution.executor import Executor
from crfrefine.runs.execution.threads import Workers
from crfrefine.train.budget import Budget
from crfrefine.train.checkpoint import Checkpoint, fingerprint
from crfrefine.train.cross_validation import run_fold
from crfrefine.train.device import choose_device
from crfrefine.train.done import Done, Part
from crfrefine.train.journal import Journal
from crfrefine.train.observer import TrainingObserver
from crfrefine.train.options import TrainingOptions
from crfrefine.train.plan import Plan, make_plan
from crfrefine.train.preparation import prepare
from crfrefine.train.progress import Progress
from crfrefine.train.screening import Screened, screened_cases
from crfrefine.train.session import Session


@dataclass(frozen=True)
class FoldTask:
    """A fold to be trained.

    Attributes:
        number: of the fold.
        options: of the run.
        digest: of the settings and files of the run, which must be those that the worker sees.
        screening: of the run, as in its checkpoint.
        part: what is done of this fold.
    """

    number: int
    options: TrainingOptions
    digest: str
    screening: list[list[float]] | None
    part: Part


class _NoFile(Checkpoint):
    """A worker keeps nothing; the run does."""

    def is_due(self) -> bool:
        return False

    def save(self, done: Done) -> None:
        return


def train_folds_elsewhere(plan: Plan, digest: str, session: Session, executor: Executor) -> None:
    """Train the folds that the journal does not have, and note each as it comes.

    Args:
        plan: of the run.
        digest: of its settings and files.
        session: of the run; its journal gets the folds.
        executor: runs them.

    Raises:
        CrfRefineError: a fold failed; those that are done are in the checkpoint.
    """
    journal = session.journal
    options = replace(plan.options, device=plan.device.name)
    tasks = [
        FoldTask(number, options, digest, journal.done.screening, journal.part(number))
        for number in range(len(plan.folds))
        if journal.part(number).measured is None
    ]

    def started(task: FoldTask) -> None:
        session.observer.stage_started(plan.part_names[task.number])

    with closing(executor.map(train_fold, tasks, started)) as outcomes:
        for task, outcome in outcomes:
            part = outcome.get()
            journal.note_part(task.number, part)
            journal.save()
            if part.fit is not None:
                session.observer.stage_ended(f"{plan.part_names[task.number]}: {part.fit.describe()}")


def train_fold(task: FoldTask) -> Part:
    """Return all work of a fold. Runs on a worker."""
    options = task.options
    device = choose_device(options.device)
    with (
        torch_in_one_thread(),
        Workers(options.threads or available_threads(), one_by_one=device.is_gpu) as workers,
    ):
        plan = make_plan(options, device)
        if fingerprint(plan.settings(), plan.cases.files) != task.digest:
            raise InputError(f"{options.data.images}: the worker sees other files there; all machines need the same shared folders")
        observer, budget = TrainingObserver(), Budget(None)
        parts = tuple(task.part if number == task.number else Part() for number in range(len(plan.part_names)))
        journal = Journal(Done(parts, task.screening), _NoFile(options.checkpoint, task.digest), budget)
        prepared = prepare(plan, workers, observer)
        progress = Progress(plan.num_planned_of_all(len(prepared.starts)), observer, budget)
        session = Session(workers, observer, journal, budget, progress)
        screened = Screened(prepared.starts, tuple(screened_cases(plan.num_cases)), task.screening)
        run_fold(task.number, plan, prepared, screened.starts_for(plan.folds[task.number]), session)
        return journal.part(task.number)


@contextmanager
def torch_in_one_thread() -> Iterator[None]:
    """Sums of several threads depend on how many there are; the time is spent in the engine anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
