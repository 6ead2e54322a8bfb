"""The result of a run that ran out of time: the folds that were measured, and the best model so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from crfrefine.train.candidates import CRF, Candidate, is_gain
from crfrefine.train.final import gains_held_out
from crfrefine.train.fit_result import FitResult, no_crf, taken
from crfrefine.train.journal import Journal
from crfrefine.train.model import mean_defined
from crfrefine.train.plan import Plan
from crfrefine.train.preparation import Prepared
from crfrefine.train.results import FoldResult
from crfrefine.train.screening import screened_cases
from crfrefine.train.tuned import Tuned, tuned_so_far


def measured_folds(plan: Plan, prepared: Prepared | None, journal: Journal) -> tuple[FoldResult, ...]:
    """Return the folds whose cases were all measured; none if not even the cases were read."""
    folds = []
    for number, split in enumerate(plan.folds if prepared is not None else ()):
        part = journal.part(number)
        if part.fit is not None and part.measured is not None:
            tuned = tuned_so_far(part, part.fit, split.seen, plan, prepared)
            names = plan.names(split.training), plan.names(split.deciding), plan.names(split.held_out)
            folds.append(FoldResult(plan.part_names[number], *names, tuned, part.measured))
    return tuple(folds)


def best_so_far(plan: Plan, prepared: Prepared | None, folds: Sequence[FoldResult], journal: Journal) -> Tuned:
    """Return the best model that was found, with what is tuned of its rivals.

    It is that of all cases, or else of the fold that gained most, or the best start; no CRF if none helped the cases that it had not seen.
    """
    part = journal.part(len(plan.folds))
    fit = part.fit or replace(_best_of_folds(plan, folds, journal) or _best_start(plan, prepared, journal), stopped_by_time=True)
    return tuned_so_far(part, fit, range(plan.num_cases), plan, prepared)


def _best_of_folds(plan: Plan, folds: Sequence[FoldResult], journal: Journal) -> FitResult | None:
    fits = [(name, part.fit) for name, part in zip(plan.part_names, journal.done.parts, strict=True) if part.fit is not None]
    if not fits:
        return None
    name, best = max(fits, key=lambda named: (not named[1].is_network, named[1].score - named[1].network_score))
    gains = gains_held_out(folds)
    if best.is_network or (gains and not is_gain(gains)):
        return no_crf(best.parameters, best.network_score, gains)
    start = best.start if best.is_calibration else f"{name}: {best.start}"
    return replace(best, start=start, best_optimizer_step=0, histories={})


def _best_start(plan: Plan, prepared: Prepared | None, journal: Journal) -> FitResult:
    """Return the start that gained most of those that were tried, without any training."""
    if prepared is None or journal.done.screening is None:
        return no_crf(plan.base, math.nan)
    dice = np.array(journal.done.screening, dtype=float)
    network = prepared.rivals.smoothing[screened_cases(plan.num_cases), 0]  # with a width of 0
    best = max(range(dice.shape[1]), key=lambda start: np.nan_to_num(mean_defined(dice[:, start]), nan=-1.0))
    differences = dice[:, best] - network
    gains = tuple(differences[~np.isnan(differences)].tolist())
    start = prepared.starts[best]
    if not is_gain(gains):
        return no_crf(start.parameters, mean_defined(network), gains)
    return taken(Candidate(CRF, start.name, start.parameters, 0, gains), mean_defined(network))
