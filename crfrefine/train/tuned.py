"""The methods tuned on the same cases: the CRF, and the rivals that it must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from crfrefine.train.baselines import LARGEST_KINDS, VectorScaling, fit_vector_scaling
from crfrefine.train.dice_rival import ARGMAX, DiceDecision, tune_decision
from crfrefine.train.done import Part
from crfrefine.train.fit_result import FitResult
from crfrefine.train.folds import Split
from crfrefine.train.guided_filter import UNGUIDED, Guidance
from crfrefine.train.plan import Plan
from crfrefine.train.preparation import Prepared
from crfrefine.train.session import Session
from crfrefine.train.small_objects import ChosenRules, choose_rules_for


@dataclass(frozen=True)
class Tuned:
    """The trained CRF and its rivals.

    Attributes:
        fit: the trained CRF.
        scaling: the recalibrated network.
        sigma_mm: width of the smoothing Gaussian.
        keep_largest: which largest component is kept, "foreground" or "each".
        rules: the small-object rules; None: they were not asked for.
        guidance: the setting of the guided filter; without one, it is the network itself.
        decision: the recalibration before the decision for the best expected Dice; without one, it is the network itself.
    """

    fit: FitResult
    scaling: VectorScaling
    sigma_mm: float
    keep_largest: str
    rules: ChosenRules | None = None
    guidance: Guidance = UNGUIDED
    decision: DiceDecision = ARGMAX


def tune_rivals(number: int, fit: FitResult, split: Split, plan: Plan, prepared: Prepared, session: Session) -> Tuned:
    """Tune the rivals of a trained CRF on the cases that it was trained on, and choose the small-object rules if they are asked for.

    Parts that the journal has are not repeated.

    Args:
        number: of the part of the run.
        fit: the trained CRF.
        split: its cases.
        plan: of the run.
        prepared: what all parts share.
        session: of the run.
    """
    scaling = session.journal.part(number).scaling
    if scaling is None:
        scaling = fit_vector_scaling(prepared.material, split, session.workers)
        session.journal.note_part(number, replace(session.journal.part(number), scaling=scaling))
    decision = session.journal.part(number).decision
    if decision is None:
        decision = tune_decision(prepared.decided, scaling, split, prepared.material, session.workers)
        session.journal.note_part(number, replace(session.journal.part(number), decision=decision))
    rules = session.journal.part(number).rules
    if plan.learns_rules and rules is None:
        session.observer.stage_started(f"{plan.part_names[number]}: choosing small-object rules")
        rules = choose_rules_for(fit, split.seen, prepared.material, session.workers)
        session.journal.note_part(number, replace(session.journal.part(number), rules=rules))
    return tuned_so_far(session.journal.part(number), fit, split.seen, plan, prepared)


def tuned_so_far(part: Part, fit: FitResult, cases: Sequence[int], plan: Plan, prepared: Prepared | None) -> Tuned:
    """Return a trained CRF and its rivals; a rival that was not tuned yet is the network unchanged.

    Args:
        part: of the journal, with the rivals that take time.
        fit: the trained CRF.
        cases: that it was trained on.
        plan: of the run.
        prepared: what all parts share; None: the cases were not read.
    """
    scaling = part.scaling or VectorScaling(1.0, (0.0,) * plan.cases.num_channels)
    if prepared is None:
        return Tuned(fit, scaling, 0.0, LARGEST_KINDS[0], part.rules)
    sigma_mm, kind = prepared.rivals.best_sigma_mm(cases), prepared.rivals.best_kind(cases)
    return Tuned(fit, scaling, sigma_mm, kind, part.rules, prepared.guided.best(cases), part.decision or ARGMAX)
