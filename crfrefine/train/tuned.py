"""The methods tuned on the same cases: the CRF, and the rivals that it must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crfrefine.train.baselines import MAX_KINDS, VectorScaling, fit_scaling
from crfrefine.train.candidates import FitResult
from crfrefine.train.checkpoint import Part
from crfrefine.train.dice_rival import ARGMAX, DiceDecision, tune_decision
from crfrefine.train.folds import Split
from crfrefine.train.guided_filter import UNGUIDED, Guidance
from crfrefine.train.plan import Plan
from crfrefine.train.preparation import Prepared
from crfrefine.train.session import Session
from crfrefine.train.small_objects import ChosenRules, choose_rules_for


@dataclass(frozen=True)
class Tuned:
    """The trained CRF and its rivals.

    `keep_largest` is "foreground" or "each"; without rules, they were not asked for; UNGUIDED and ARGMAX are the network itself.
    """

    fit: FitResult
    scaling: VectorScaling
    sigma_mm: float
    keep_largest: str
    rules: ChosenRules | None = None
    guidance: Guidance = UNGUIDED
    decision: DiceDecision = ARGMAX


def tune_rivals(number: int, fit: FitResult, split: Split, prepared: Prepared, session: Session) -> Tuned:
    """Tune the rivals of a trained CRF on the cases that it was trained on, and choose the small-object rules if they are asked for.

    What the session has of this part of the run is not repeated.
    """
    plan, material, workers = session.plan, prepared.material, session.workers
    scaling = session.part(number).scaling
    if scaling is None:
        scaling = fit_scaling(material, split.seen, workers)
        session.note_part(number, scaling=scaling)
    if session.part(number).decision is None:
        session.note_part(number, decision=tune_decision(prepared.decided, scaling, split.seen, material, workers))
    if plan.learns_rules and session.part(number).rules is None:
        session.observer.stage_started(f"{plan.part_names[number]}: choosing small-object rules")
        session.note_part(number, rules=choose_rules_for(fit, split.seen, material, workers))
    return tuned_so_far(session.part(number), fit, split.seen, plan, prepared)


def tuned_so_far(part: Part, fit: FitResult, cases: Sequence[int], plan: Plan, prepared: Prepared | None) -> Tuned:
    """Return a trained CRF and its rivals; a rival that was not tuned yet, or all if the cases were not read, is the network unchanged."""
    scaling = part.scaling or VectorScaling(1.0, (0.0,) * plan.cases.num_channels)
    if prepared is None:
        return Tuned(fit, scaling, 0.0, MAX_KINDS[0], part.rules)
    sigma_mm, kind = prepared.smoothing.best(cases), prepared.largest.best(cases)
    return Tuned(fit, scaling, sigma_mm, kind, part.rules, prepared.guided.best(cases), part.decision or ARGMAX)
