"""The cross-validation stage: in each fold, a CRF is trained on some cases and measured on those held out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from crfrefine.train.calibration import calibrate, calibrate_output, starts_calibrated, with_calibrated
from crfrefine.train.candidates import MIN_CASES, NO_CRF, NO_RIVALS, UNTRAINED, FitResult
from crfrefine.train.comparison import FoldResult
from crfrefine.train.fitting import Task, train
from crfrefine.train.folds import Split
from crfrefine.train.measuring import measure_methods
from crfrefine.train.methods import MethodValues
from crfrefine.train.preparation import Prepared
from crfrefine.train.screening import starts_for
from crfrefine.train.session import Session
from crfrefine.train.tuned import Tuned, tune_rivals


def cross_validate(prepared: Prepared, session: Session) -> tuple[FoldResult, ...]:
    """Return the result of every fold; finished folds of the session are not repeated."""
    return tuple(run_fold(number, prepared, session) for number in range(len(session.plan.folds)))


def run_fold(number: int, prepared: Prepared, session: Session) -> FoldResult:
    """Return the result of a fold."""
    plan, part = session.plan, session.part(number)
    split, name = plan.folds[number], plan.part_names[number]
    session.part_begun(number)
    if part.fit is not None and part.scaling is not None and part.measured is not None:
        return FoldResult(name, split, tune_rivals(part.fit, part.scaling, split.seen, prepared, session.workers), part.measured)
    session.observer.stage_started(name)
    fit = calibrate_output(_fit(number, prepared, session), split.seen, prepared.material, session.workers)
    tuned = tune_rivals(fit, None, split.seen, prepared, session.workers)
    session.observer.stage_started(f"{name}: measuring the cases held out")
    measured = _measure(split, prepared, tuned, session)
    session.note_part(number, fit=fit, scaling=tuned.scaling, measured=measured)
    session.observer.stage_ended(f"{name}: {fit.describe()}")
    return FoldResult(name, split, tuned, measured)


def _fit(number: int, prepared: Prepared, session: Session) -> FitResult:
    """Train on the cases of a fold that supply gradients; its deciding cases choose the candidate."""
    plan, material = session.plan, prepared.material
    split = plan.folds[number]
    starts = starts_for(split, prepared, session)
    calibrated = calibrate(material, split.training, starts[0].parameters, session.workers)
    if calibrated is not None and starts_calibrated(plan.learn, len(split.training)):
        starts = with_calibrated(starts, calibrated)
    rivals = plan.rivals if len(split.seen) >= MIN_CASES else NO_RIVALS
    task = Task(plan.part_names[number], split, starts, plan.num_optimizer_steps, calibrated=calibrated, rivals=rivals)
    fit = train(task, material, session)
    return fit if fit.kind in (NO_CRF, UNTRAINED) else _fit_to_all(fit, task, prepared, session)


def _fit_to_all(fit: FitResult, task: Task, prepared: Prepared, session: Session) -> FitResult:
    """Fit what was chosen to all cases of the fold, those that decided too, as the rivals are: nothing is left to be decided."""
    material, seen = prepared.material, tuple(task.split.seen)
    calibrated = calibrate(material, seen, task.starts[0].parameters, session.workers)
    if fit.is_calibration:
        return fit if calibrated is None else replace(fit, parameters=calibrated)
    starts = [*task.starts, *([] if calibrated is None else with_calibrated(task.starts, calibrated))]
    start = next(start for start in reversed(starts) if start.name == fit.start)
    steps = fit.best_optimizer_step
    fitted = train(replace(task, split=Split(seen, seen, ()), starts=[start], num_optimizer_steps=steps, kind=fit.kind), material, session)
    return fit if fitted.is_network else replace(fit, parameters=fitted.parameters, trained=fitted.trained)


def _measure(split: Split, prepared: Prepared, tuned: Tuned, session: Session) -> dict[str, MethodValues]:
    """Return the values of all methods on the cases held out, by the names of the cases."""
    plan = session.plan
    plan.device.release()
    regions = {region.name: region.labels for region in plan.regions}

    def measure(number: int, threads: int) -> MethodValues:
        return measure_methods(plan.read(number, threads), regions, tuned, plan.device.name, threads)

    run = session.workers.run_one_by_one if prepared.has_large_cases else session.workers.run
    return dict(zip(plan.names(split.held_out), run(measure, split.held_out), strict=True))


@contextmanager
def torch_in_one_thread() -> Iterator[None]:
    """Sums of several threads depend on how many there are; the time is spent in the engine anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
