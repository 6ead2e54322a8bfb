"""The cross-validation stage: in each fold, a CRF is trained on some cases and measured on those held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from crfrefine.parameters.model import CrfParameters
from crfrefine.train.between import mean_of
from crfrefine.train.calibration import calibrate, calibrate_output, starts_calibrated, with_calibrated
from crfrefine.train.candidates import (
    CALIBRATION,
    CRF,
    MIN_CASES,
    NO_RIVALS,
    UNTRAINED,
    Candidate,
    FitResult,
    choose,
    no_crf,
    pooled,
    taken,
)
from crfrefine.train.comparison import FoldResult
from crfrefine.train.fitting import Task, train
from crfrefine.train.folds import Split
from crfrefine.train.measuring import measure_methods
from crfrefine.train.methods import MethodValues
from crfrefine.train.model import mean_defined
from crfrefine.train.preparation import Prepared
from crfrefine.train.screening import starts_for
from crfrefine.train.session import Session
from crfrefine.train.starts import Schedule
from crfrefine.train.tuned import Tuned, tune_rivals


def cross_validate(prepared: Prepared, session: Session) -> tuple[FoldResult, ...]:
    """Return the result of every fold; what the session has is not repeated."""
    return tuple(run_fold(number, prepared, session) for number in range(len(session.plan.folds)))


def run_fold(number: int, prepared: Prepared, session: Session) -> FoldResult:
    """Return the result of a fold; what the session has is not repeated."""
    plan, part = session.plan, session.part(number)
    split, name, fit, measured = plan.folds[number], plan.part_names[number], part.fit, part.measured
    if measured is None:
        session.observer.stage_started(name)
    if fit is None:
        fit = calibrate_output(_fit(number, prepared, session), split.seen, prepared.material, session.workers)
        session.note_part(number, fit=fit)
    else:
        session.training_finished(plan.num_planned(split, len(prepared.starts)))
    tuned = tune_rivals(number, fit, split, prepared, session)
    if measured is None:
        session.observer.stage_started(f"{name}: measuring the cases held out")
        measured = _measure(split, prepared, tuned, session)
        session.note_part(number, measured=measured)
        session.save()
        session.observer.stage_ended(f"{name}: {fit.describe()}")
    return FoldResult(name, split, tuned, measured)


def _fit(number: int, prepared: Prepared, session: Session) -> FitResult:
    """Train on the cases of a fold; with few cases, each half decides about the training on the other half, and their mean is taken."""
    plan, material = session.plan, prepared.material
    split = plan.folds[number]
    starts = starts_for(split, prepared, session)

    def train_on(cases: Split, schedule: Schedule, chosen: Candidate | None = None) -> FitResult:
        """Train from all starts, or only what is chosen."""
        calibrated = calibrate(material, cases.training, starts[0].parameters, session.workers)
        every = with_calibrated(starts, calibrated if starts_calibrated(plan.learn, len(cases.training)) else None)
        own = [start for start in every if chosen is None or start.name == chosen.start]
        num_left = plan.num_trainings_left(number, len(session.part(number).halves))
        kind = None if chosen is None else chosen.kind
        rivals = plan.rivals if len(split.seen) >= MIN_CASES else NO_RIVALS
        task = Task(plan.part_names[number], cases, own, schedule, num_left, calibrated, rivals, kind)
        return train(task, material, session)

    if not split.decides_in_turns:
        fit = train_on(split, plan.schedule)
        # Once it is chosen, nothing is left to be decided: it is fitted to all cases, as the rival is.
        calibrated = calibrate(material, split.seen, starts[0].parameters, session.workers) if fit.is_calibration else None
        return fit if calibrated is None else replace(fit, parameters=calibrated)
    halves = session.part(number).halves
    session.training_finished(sum(plan.num_planned_once(half, len(starts)) for half in split.halves()[: len(halves)]))
    for half in split.halves()[len(halves) :]:
        halves = (*halves, train_on(half, plan.schedule))
        session.note_part(number, halves=halves)
    network_mean = mean_defined([half.network_score for half in halves])
    found = pooled([half.candidates for half in halves])
    chosen = choose(found)
    is_stopped = any(half.stopped_by_time for half in halves)
    trained = max(halves, key=lambda half: half.score - half.network_score).trained
    more = {"stopped_by_time": is_stopped, "candidates": tuple(found), "trained": trained}
    if chosen is None:
        gains = next((one.gains for one in found if one.kind == CRF), ())
        return no_crf(starts[0].parameters, network_mean, gains, **more)
    if chosen.kind == UNTRAINED:
        return taken(chosen, network_mean, **more)
    if chosen.kind == CALIBRATION:
        calibrated = calibrate(material, split.training, starts[0].parameters, session.workers)
        assert calibrated is not None
        return taken(replace(chosen, parameters=calibrated), network_mean, **more)
    mean, of_trained = _mean_model(halves, chosen.kind), _mean_model(halves, CRF)
    if mean is not None:
        histories = {f"half {place}: {name}": history for place, half in enumerate(halves, 1) for name, history in half.histories.items()}
        session.training_finished(plan.schedule.num_optimizer_steps)
        more["trained"] = of_trained or mean
        return taken(replace(chosen, parameters=mean), network_mean, histories=histories, **more)
    steps = [one.optimizer_step for half in halves for one in half.candidates if one.kind == chosen.kind]
    fit = train_on(split, Schedule(max(1, round(float(np.mean(steps)))), rungs=()), chosen)
    histories = {**{f"half: {name}": history for half in halves for name, history in half.histories.items()}, **fit.histories}
    return replace(fit, histories=histories, stopped_by_time=fit.stopped_by_time or is_stopped, candidates=tuple(found))


def _mean_model(halves: Sequence[FitResult], kind: str) -> CrfParameters | None:
    """Return the mean of the models of a kind that were trained on two halves; None if they have none."""
    models = [one.parameters for half in halves for one in half.candidates if one.kind == kind]
    return mean_of(*models) if len(models) == len(halves) == 2 else None


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
