"""Comparison of the methods on cases that none of them was fitted to: the table, its summary, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from crfrefine.base.text import printable
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.parameters.model import CrfParameters
from crfrefine.statistics.comparison import ResultTable, SummaryRow, measurements_of, summarize
from crfrefine.statistics.harm import judge_probabilities
from crfrefine.statistics.verdict import Outcome, Verdict, verdict
from crfrefine.train.baselines import VectorScaling
from crfrefine.train.candidates import FitResult
from crfrefine.train.folds import Split
from crfrefine.train.guided_filter import UNGUIDED, Guidance
from crfrefine.train.methods import LARGEST, MEASURED, NETWORK, PROBABILITIES, RIVALS, TRAINED, TRAINED_LARGEST, MethodValues, with_largest
from crfrefine.train.plan import Plan
from crfrefine.train.starts import rounded


@dataclass(frozen=True)
class Tuned:
    """The trained CRF, and the rivals that it must beat, tuned on the same cases."""

    fit: FitResult
    scaling: VectorScaling
    keep_largest: str  # "foreground" or "each"
    guidance: Guidance = UNGUIDED  # UNGUIDED means the network itself


@dataclass(frozen=True)
class FoldResult:
    """A part of the cross-validation: its cases, the trained CRF with its rivals, and the values of each case held out."""

    name: str
    split: Split
    tuned: Tuned
    measured: Mapping[str, MethodValues]


@dataclass(frozen=True)
class Comparison:
    """All methods on cases that no part of them has seen."""

    table: ResultTable  # every method on every case, each measured in the fold that held it out
    summary: list[SummaryRow]  # each method against the network alone
    summary_of_largest: list[SummaryRow]  # the trained CRF with the largest component kept, against the largest component alone
    summary_of_probabilities: list[SummaryRow]  # of the trained CRF against the network's, over all labels or as a mean over regions
    verdict: Verdict  # the one to read
    verdict_alone: Verdict  # the one on the CRF without postprocessing


@dataclass(frozen=True)
class TrainingResult:
    """The results of a run; `final` is tuned on all cases."""

    plan: Plan
    folds: tuple[FoldResult, ...]
    final: Tuned
    comparison: Comparison
    seconds: float
    threads: int

    @property
    def parameters(self) -> CrfParameters:
        """The parameters to write: trained on all cases, with the digits that mean something, and the postprocessing of the verdict.

        They name the cases, after those of an earlier training that this one began with.
        """
        cases = tuple(dict.fromkeys([*self.plan.base.trained_on, *map(printable, self.plan.cases.case_ids)]))
        parameters = replace(rounded(self.final.fit.parameters), trained_on=cases)
        if self.comparison.verdict.method != TRAINED_LARGEST or self.final.fit.is_network:
            return parameters
        return parameters.replace(**{"postprocess.keep_largest": self.final.keep_largest})


def compare(folds: Sequence[FoldResult], plan: Plan) -> Comparison:
    """Return the comparison of the methods on the cases that the folds held out."""
    measured = sorted(((case_id, values) for fold in folds for case_id, values in fold.measured.items()), key=lambda pair: pair[0])
    seed = plan.options.seed

    def table_of(names: Mapping[str, str]) -> ResultTable:
        """Return the measurements of some methods, each with the name that it has among the values of a case."""
        return ResultTable(
            line
            for case_id, values in measured
            for method, name in names.items()
            if name in values
            for line in measurements_of(case_id, method, values[name])
        )

    table, probabilities = table_of({method: method for method in MEASURED}), table_of(PROBABILITIES)
    summary = summarize(table, NETWORK, seed=seed)
    pair = ResultTable(line for line in table if line.method in (LARGEST, TRAINED_LARGEST))
    summary_of_largest = summarize(pair, LARGEST, seed=seed)
    calibration = summarize(probabilities, NETWORK, seed=seed) if probabilities.cases else []
    titles = {} if plan.cases.regions is None else {ALL_LABELS: "the regions, on average,"}
    change = judge_probabilities(calibration, TRAINED, titles=titles)
    read, alone = (replace(judged, probabilities=change) for judged in judge(table, summary, summary_of_largest))
    return Comparison(table, summary, summary_of_largest, calibration, read, alone)


def judge(
    table: ResultTable, summary: Sequence[SummaryRow] | None = None, summary_of_largest: Sequence[SummaryRow] | None = None
) -> tuple[Verdict, Verdict]:
    """Return the main verdict, and the verdict on the trained CRF without postprocessing; harm is looked up in the summaries.

    They are the same unless the largest component alone is the only rival that the CRF does not beat. The two can be combined: the verdict
    is then on what the CRF adds to the largest component, and the rivals keep the largest component too.
    """
    alone = verdict(table, TRAINED, NETWORK, rivals=(*RIVALS, LARGEST), subject="the trained CRF", summary=summary)
    unbeaten = [rival.name for rival in alone.rivals if not rival.is_beaten]
    if alone.outcome not in (Outcome.HELPS, Outcome.NOT_BETTER_THAN_SIMPLE) or unbeaten != [LARGEST]:
        return alone, alone
    subject, rivals = "the trained CRF with the largest component", tuple(map(with_largest, RIVALS))
    return verdict(table, TRAINED_LARGEST, LARGEST, rivals=rivals, subject=subject, summary=summary_of_largest), alone
