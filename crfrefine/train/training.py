"""One training as part of a run: within its share of the time, reported step by step, and resumed where a stopped run left off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crfrefine.parameters.model import CrfParameters
from crfrefine.train.candidates import NO_RIVALS, Rivals
from crfrefine.train.fit_result import FitResult
from crfrefine.train.fitting import Fit, Hooks
from crfrefine.train.folds import Split
from crfrefine.train.material import Material
from crfrefine.train.observer import Step
from crfrefine.train.schedule import Schedule
from crfrefine.train.session import Session
from crfrefine.train.starts import Start
from crfrefine.train.trajectory import Trajectory


@dataclass(frozen=True)
class Task:
    """A training to be done.

    Attributes:
        name: of the part of the run.
        split: the cases that are trained on and those that decide.
        starts: at least one.
        schedule: how long it goes on.
        num_left: trainings that are still to be done in the run, this one included.
        calibrated: the network recalibrated on the cases that are trained on; None: that is not learned.
        rivals: what else is tried.
        kind: of the one candidate, where it is chosen already.
    """

    name: str
    split: Split
    starts: Sequence[Start]
    schedule: Schedule
    num_left: int
    calibrated: CrfParameters | None = None
    rivals: Rivals = NO_RIVALS
    kind: str | None = None


def train(task: Task, material: Material, session: Session) -> FitResult:
    """Do a training, and return what came of it; the caller notes it in the journal."""

    def stepped(trajectory: Trajectory, loss: float, score: float | None) -> None:
        text = ", ".join(f"{name} {_numbers(value)}" for name, value in trajectory.thetas().items())
        steps = trajectory.optimizer_step, trajectory.num_optimizer_steps
        session.observer.stepped(Step(task.name, trajectory.name, *steps, loss, score, text))
        session.progress.stepped()

    session.budget.start_part(task.num_left)
    state = session.journal.done.training
    fit = Fit(
        material,
        task.split,
        task.starts,
        session.workers,
        task.schedule,
        state,
        calibrated=task.calibrated,
        rivals=task.rivals,
        kind=task.kind,
    )
    session.progress.training_begun(fit.num_optimizer_steps)
    result = fit.run(Hooks(stepped, session.journal.note_training, session.budget.is_part_over))
    session.progress.training_finished(task.schedule.num_planned(len(task.starts)))
    if result.stopped_by_time and result.is_network:
        session.observer.note(f"{task.name}: the time ran out before a CRF was better than the network alone")
    return result


def _numbers(value: Any) -> str:
    return "/".join(f"{number:.3g}" for number in (value if isinstance(value, list) else (value,)))
