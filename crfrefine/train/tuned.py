"""The methods tuned on the same cases: the CRF, and the rivals that it must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crfrefine.runs.threads import Workers
from crfrefine.train.baselines import VectorScaling, fit_scaling
from crfrefine.train.candidates import FitResult
from crfrefine.train.guided_filter import UNGUIDED, Guidance
from crfrefine.train.preparation import Prepared


@dataclass(frozen=True)
class Tuned:
    """The trained CRF and its rivals."""

    fit: FitResult
    scaling: VectorScaling
    keep_largest: str  # "foreground" or "each"
    guidance: Guidance = UNGUIDED  # UNGUIDED means the network itself


def tune_rivals(fit: FitResult, scaling: VectorScaling | None, cases: Sequence[int], prepared: Prepared, workers: Workers) -> Tuned:
    """Tune the rivals of a trained CRF on the cases that it may have seen; vector scaling only if it is not given."""
    scaling = scaling or fit_scaling(prepared.material, cases, workers)
    return Tuned(fit, scaling, prepared.largest.best(cases), prepared.guided.best(cases))
