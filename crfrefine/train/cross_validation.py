"""The cross-validation stage: in each fold, a CRF is trained on some cases and measured on those held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from crfrefine.parameters.model import CrfParameters
from crfrefine.train.between import mean_of
from crfrefine.train.calibration import calibrate, starts_calibrated, with_calibrated
from crfrefine.train.candidates import CALIBRATION, CRF, FEWEST_CASES, NO_RIVALS, UNTRAINED, Candidate, choose, pooled
from crfrefine.train.fit_result import FitResult, no_crf, taken
from crfrefine.train.folds import Split
from crfrefine.train.measuring import measure_methods
from crfrefine.train.methods import MethodValues
from crfrefine.train.model import mean_defined
from crfrefine.train.output_temperature import calibrate_output
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
    return tuple(run_fold(number, plan, prepared, screened.starts_for(split), session) for number, split in enumerate(plan.folds))


def run_fold(number: int, plan: Plan, prepared: Prepared, starts: Sequence[Start], session: Session) -> FoldResult:
    """Return the result of a fold; parts that the journal has are not repeated."""
    split, name, journal = plan.folds[number], plan.part_names[number], session.journal
    part = journal.part(number)
    if part.measured is None:
        session.observer.stage_started(name)
    if part.fit is None:
        fit = _fit(number, plan, prepared, starts, session)
        fit = calibrate_output(fit, split.seen, prepared.material, session.workers)
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
    """Train on the cases of a fold; with few cases, each half decides about the training on the other half, and their mean is taken."""
    split, journal, material = plan.folds[number], session.journal, prepared.material

    def train_on(cases: Split, schedule: Schedule, chosen: Candidate | None = None) -> FitResult:
        """Train from all starts, or only what is chosen."""
        calibrated = calibrate(material, cases.training, starts[0].parameters, session.workers)
        every = with_calibrated(starts, calibrated if starts_calibrated(plan.learn, len(cases.training)) else None)
        own = [start for start in every if chosen is None or start.name == chosen.start]
        num_left = plan.num_trainings_left(number, len(journal.part(number).halves))
        kind = None if chosen is None else chosen.kind
        rivals = plan.rivals if len(split.seen) >= FEWEST_CASES else NO_RIVALS
        task = Task(plan.part_names[number], cases, own, schedule, num_left, calibrated, rivals, kind)
        return train(task, material, session)

    if not split.decides_in_turns:
        fit = train_on(split, plan.schedule)
        # Once it is chosen, nothing is left to be decided: it is fitted to all cases, as the rival is.
        calibrated = calibrate(material, split.seen, starts[0].parameters, session.workers) if fit.is_calibration else None
        return fit if calibrated is None else replace(fit, parameters=calibrated)
    halves = journal.part(number).halves
    session.progress.training_finished(sum(plan.num_planned_once(half, len(starts)) for half in split.halves()[: len(halves)]))
    for half in split.halves()[len(halves) :]:
        halves = (*halves, train_on(half, plan.schedule))
        journal.note_part(number, replace(journal.part(number), halves=halves))
    network_mean = mean_defined([half.network_score for half in halves])
    is_stopped = any(half.stopped_by_time for half in halves)
    found = pooled([half.candidates for half in halves])
    chosen = choose(found)
    trained = max(halves, key=lambda half: half.score - half.network_score).trained
    if chosen is None:
        gains = next((one.gains for one in found if one.kind == CRF), ())
        nothing = no_crf(starts[0].parameters, network_mean, gains, stopped_by_time=is_stopped, candidates=found)
        return replace(nothing, trained=trained)
    if chosen.kind == UNTRAINED:
        return replace(taken(chosen, network_mean, stopped_by_time=is_stopped, candidates=found), trained=trained)
    if chosen.kind == CALIBRATION:
        calibrated = calibrate(material, split.training, starts[0].parameters, session.workers)
        assert calibrated is not None
        alone = replace(chosen, parameters=calibrated)
        return replace(taken(alone, network_mean, stopped_by_time=is_stopped, candidates=found), trained=trained)
    mean, of_trained = _mean_model(halves, chosen.kind), _mean_model(halves, CRF)
    if mean is not None:
        histories = {f"half {place}: {name}": history for place, half in enumerate(halves, 1) for name, history in half.histories.items()}
        session.progress.training_finished(plan.schedule.num_optimizer_steps)
        result = taken(replace(chosen, parameters=mean), network_mean, histories, stopped_by_time=is_stopped, candidates=found)
        return replace(result, trained=of_trained or mean)
    steps = [one.optimizer_step for half in halves for one in half.candidates if one.kind == chosen.kind]
    fit = train_on(split, Schedule(max(1, round(float(np.mean(steps)))), rungs=()), chosen)
    histories = {**{f"half: {name}": history for half in halves for name, history in half.histories.items()}, **fit.histories}
    return replace(fit, histories=histories, stopped_by_time=fit.stopped_by_time or is_stopped, candidates=tuple(found))


def _mean_model(halves: Sequence[FitResult], kind: str) -> CrfParameters | None:
    """Return the mean of the models of a kind that were trained on two halves; None if they have none."""
    models = [one.parameters for half in halves for one in half.candidates if one.kind == kind]
    return mean_of(*models) if len(models) == len(halves) == 2 else None


def _measure(split: Split, plan: Plan, prepared: Prepared, tuned: Tuned, session: Session) -> dict[str, MethodValues]:
    """Return the values of all methods on the cases held out, by the names of the cases."""
    plan.device.release()
    measure = partial(_measure_case, plan, tuned)
    values = on_cases(measure, split.held_out, session.workers, one_at_a_time=prepared.has_large_cases)
    return dict(zip(plan.names(split.held_out), values, strict=True))


def _measure_case(plan: Plan, tuned: Tuned, number: int, threads: int) -> MethodValues:
    regions = {region.name: region.labels for region in plan.regions}
    return measure_methods(read_case(plan, number, threads), regions, tuned, plan.device.name, threads, plan.cases.postprocessing)
