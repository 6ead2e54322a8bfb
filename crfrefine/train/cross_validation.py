"""The cross-validation stage: in each fold, a CRF is trained on some cases and measured on those held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from crfrefine.train.fit_result import FitResult, is_gain, no_crf
from crfrefine.train.folds import Split
from crfrefine.train.measuring import measure_methods
from crfrefine.train.methods import MethodValues
from crfrefine.train.model import mean_defined
from crfrefine.train.plan import Plan
from crfrefine.train.preparation import Prepared
from crfrefine.train.reading import on_cases, read_case
from crfrefine.train.results import FoldResult
from crfrefine.train.schedule import Schedule
from crfrefine.train.screening import Screened
from crfrefine.train.session import Session
from crfrefine.train.starts import Start
from crfrefine.train.training import Task, train
from crfrefine.train.tuned import Tuned, tune_rivals


def cross_validate(plan: Plan, prepared: Prepared, screened: Screened, session: Session) -> tuple[FoldResult, ...]:
    """Return the result of every fold; parts that the journal has are not repeated."""
    return tuple(_run_fold(number, plan, prepared, screened.starts_for(split), session) for number, split in enumerate(plan.folds))


def _run_fold(number: int, plan: Plan, prepared: Prepared, starts: Sequence[Start], session: Session) -> FoldResult:
    split, name, journal = plan.folds[number], plan.part_names[number], session.journal
    part = journal.part(number)
    if part.measured is None:
        session.observer.stage_started(name)
    if part.fit is None:
        fit = _fit(number, plan, prepared, starts, session)
        journal.note_part(number, replace(journal.part(number), fit=fit))
    else:
        fit = part.fit
        session.progress.training_finished(plan.num_planned(split, len(prepared.starts)))
    tuned = tune_rivals(number, fit, split, plan, prepared, session)
    measured = part.measured
    if measured is None:
        session.observer.stage_started(f"{name}: measuring the cases held out")
        measured = _measure(split, plan, prepared, tuned, session)
        journal.note_part(number, replace(journal.part(number), measured=measured))
        journal.save()
        session.observer.stage_ended(f"{name}: {fit.describe()}")
    return FoldResult(name, plan.names(split.training), plan.names(split.deciding), plan.names(split.held_out), tuned, measured)


def _fit(number: int, plan: Plan, prepared: Prepared, starts: Sequence[Start], session: Session) -> FitResult:
    """Train on the cases of a fold; with few cases, each half first decides about the training on the other half."""
    split, journal = plan.folds[number], session.journal

    def train_on(cases: Split, starts: Sequence[Start], schedule: Schedule) -> FitResult:
        num_left = plan.num_trainings_left(number, len(journal.part(number).halves))
        return train(Task(plan.part_names[number], cases, starts, schedule, num_left), prepared.material, session)

    if not split.decides_in_turns:
        return train_on(split, starts, plan.schedule)
    halves = journal.part(number).halves
    session.progress.training_finished(len(halves) * plan.schedule.num_planned(len(starts)))
    for half in split.halves()[len(halves) :]:
        halves = (*halves, train_on(half, starts, plan.schedule))
        journal.note_part(number, replace(journal.part(number), halves=halves))
    gains = [gain for half in halves for gain in half.gains]
    found = [half for half in halves if not half.is_network]
    is_stopped = any(half.stopped_by_time for half in halves)
    if not is_gain(gains) or not found:
        network_mean = mean_defined([half.network_score for half in halves])
        return no_crf(starts[0].parameters, network_mean, gains, stopped_by_time=is_stopped)
    best = max(found, key=lambda half: half.score - half.network_score)
    num_optimizer_steps = max(1, round(float(np.mean([half.best_optimizer_step for half in found]))))
    chosen = [start for start in starts if start.name == best.start]
    fit = train_on(split, chosen, Schedule(num_optimizer_steps, rungs=()))
    histories = {**{f"half: {name}": history for name, history in best.histories.items()}, **fit.histories}
    return replace(fit, histories=histories, stopped_by_time=fit.stopped_by_time or is_stopped)


def _measure(split: Split, plan: Plan, prepared: Prepared, tuned: Tuned, session: Session) -> dict[str, MethodValues]:
    """Return the values of all methods on the cases held out, by the names of the cases."""
    plan.device.release()
    measure = partial(_measure_case, plan, tuned)
    values = on_cases(measure, split.held_out, session.workers, one_at_a_time=prepared.has_large_cases)
    return dict(zip(plan.names(split.held_out), values, strict=True))


def _measure_case(plan: Plan, tuned: Tuned, number: int, threads: int) -> MethodValues:
    regions = {region.name: region.labels for region in plan.regions}
    return measure_methods(read_case(plan, number, threads), regions, tuned, plan.device.name, threads, plan.cases.postprocessing)
