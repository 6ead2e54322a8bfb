"""What a run found: of each fold, of the training on all cases, of the comparison; how it becomes files, `report.py` knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from crfrefine.metrics.regions import Region
from crfrefine.parameters.model import CrfParameters
from crfrefine.statistics.comparison import ResultTable, SummaryRow
from crfrefine.statistics.verdict import Verdict
from crfrefine.train.dataset import LabeledCases
from crfrefine.train.methods import TRAINED_LARGEST, MethodValues
from crfrefine.train.options import TrainingOptions
from crfrefine.train.rounding import rounded
from crfrefine.train.tuned import Tuned


@dataclass(frozen=True)
class FoldResult:
    """A part of the cross-validation.

    Attributes:
        name: such as "fold 1 of 5".
        training: names of the cases whose gradients were followed.
        deciding: names of the cases on which early stopping and the choice of the start rest.
        held_out: names of the cases that were measured.
        tuned: the trained CRF and its rivals.
        measured: values of each case held out.
    """

    name: str
    training: tuple[str, ...]
    deciding: tuple[str, ...]
    held_out: tuple[str, ...]
    tuned: Tuned
    measured: Mapping[str, MethodValues]


@dataclass(frozen=True)
class Comparison:
    """All methods on cases that no part of them has seen.

    Attributes:
        table: every method on every case, each measured in the fold that held it out.
        summary: each method against the network alone.
        summary_of_largest: the trained CRF with the largest component kept, against the largest component alone.
        summary_of_rules: the trained CRF with small-object rules against the rules alone; empty if no rules were chosen.
        summary_of_probabilities: those of the trained CRF against the network's, over all labels or as a mean over regions.
        verdict: the one to read.
        verdict_alone: the one on the CRF without postprocessing.
    """

    table: ResultTable
    summary: list[SummaryRow]
    summary_of_largest: list[SummaryRow]
    summary_of_rules: list[SummaryRow]
    summary_of_probabilities: list[SummaryRow]
    verdict: Verdict
    verdict_alone: Verdict


@dataclass(frozen=True)
class TrainingResult:
    """All that a run found.

    Attributes:
        options: what was asked for.
        cases: the cases.
        regions: what was measured.
        base: the model that was started from.
        folds: of the cross-validation that were measured.
        final: tuned on all cases, or the best so far if the time ran out.
        comparison: of the methods, on the cases that the folds held out.
        seconds: of the run.
        device: where the CRF was computed.
        threads: CPU threads.
        num_folds: of the cross-validation; more than `folds` if the time ran out.
    """

    options: TrainingOptions
    cases: LabeledCases
    regions: tuple[Region, ...]
    base: CrfParameters
    folds: tuple[FoldResult, ...]
    final: Tuned
    comparison: Comparison
    seconds: float
    device: str
    threads: int
    num_folds: int

    @property
    def num_cut_short(self) -> int:
        """Folds whose training the time limit ended."""
        return num_cut_short(self.folds)

    @property
    def keeps_largest(self) -> bool:
        """Whether the verdict is on the CRF with the largest component, so that `infer` is to keep it."""
        return self.comparison.verdict.method == TRAINED_LARGEST and not self.final.fit.is_network

    @property
    def parameters(self) -> CrfParameters:
        """What is written: trained on all cases, with as many digits as mean something, and the postprocessing that the verdict is on."""
        parameters = rounded(self.final.fit.parameters)
        if self.final.rules is not None:
            return parameters.replace(postprocess=self.final.rules.trained)
        return parameters.replace(**{"postprocess.keep_largest": self.final.keep_largest}) if self.keeps_largest else parameters


def num_cut_short(folds: tuple[FoldResult, ...]) -> int:
    """Return the number of folds whose training the time limit ended."""
    return sum(fold.tuned.fit.stopped_by_time for fold in folds)
