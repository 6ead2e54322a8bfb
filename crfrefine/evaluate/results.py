"""All cases together: the full table of measurements, its summary, the verdict, and the smallest detectable effect."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.base.text import counted, listed
from crfrefine.cases.case_files import describe_left_out
from crfrefine.evaluate.measuring import CaseResult
from crfrefine.evaluate.options import DEFAULT_NAME, EvaluationOptions
from crfrefine.evaluate.reading import Settings
from crfrefine.metrics.overlap import measure_masks
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.metrics.registry import CALIBRATION_METRICS, DICE, MASK_METRICS, RegionValues
from crfrefine.runs.records import Observer
from crfrefine.statistics.comparison import Measurement, ResultTable, SummaryRow, correct, summarize
from crfrefine.statistics.paired import ALPHA, smallest_p_value
from crfrefine.statistics.verdict import Verdict, not_tested, power_text, verdict

if TYPE_CHECKING:
    from crfrefine.cases.case_files import IncompleteCase
    from crfrefine.evaluate.pairing import CasePair


@dataclass(frozen=True)
class EmptyMasks:
    """Counts of cases with empty masks, for a method in a region."""

    reference: int  # Cases whose reference lacks the region.
    prediction: int  # Cases whose prediction lacks it.
    both: int  # Cases where both lack it and most metrics are undefined.
    num_cases: int  # Number of measured cases.


@dataclass
class Evaluation:
    """The results of a run."""

    options: EvaluationOptions  # Options of the run.
    settings: Settings  # The settings that the values depend on.
    pairs: Sequence[CasePair]  # The cases, sorted by name.
    results: Sequence[CaseResult]  # Results of the processed cases, in the same order.
    notes: Sequence[str] = ()  # Notes on assumptions and ignored files, one sentence each.
    num_processes: int = 1  # Cases measured at a time.
    seconds: float = 0.0  # Duration of the run.
    has_report: bool = False  # Whether `report.html` is written.
    left_out: Sequence[IncompleteCase] = ()  # The incomplete cases, which no number includes.
    # Cases that the parameters of a method were learned on, by method.
    learned: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def left_out_text(self) -> str:
        """One line: the number of cases left out, and why; empty without any."""
        return describe_left_out(self.left_out, len(self.pairs) + len(self.left_out)) if self.left_out else ""

    @property
    def failures(self) -> list[tuple[str, str]]:
        """Case and message of every failure."""
        return [
            (result.case_id, failure.message if failure.part is None else f"{failure.part}: {failure.message}")
            for result in self.results
            for failure in result.failures
        ]

    @property
    def num_failed(self) -> int:
        """Number of cases with a failure."""
        return sum(bool(result.failures) for result in self.results)

    @cached_property
    def regions(self) -> dict[str, tuple[int, ...]]:
        """Each label that occurs or is named, then the named regions."""
        others = {*self.settings.plan.named, ALL_LABELS}
        found = {int(region) for result in self.results for rows in result.values.values() for region in rows if region not in others}
        return self.settings.plan.all_regions(sorted(found))

    @property
    def judged_regions(self) -> tuple[str, ...]:
        """The regions of the deciding mean."""
        return self.settings.plan.judged or tuple(name for name in self.regions if name not in self.settings.plan.named)

    @cached_property
    def full_table(self) -> ResultTable:
        """Every case, method, region and metric."""
        return ResultTable(
            Measurement(result.case_id, region, metric, value, method)
            for result in self.results
            for method in self.options.methods
            if method in result.values
            for region, row in self._completed(method, result.values[method]).items()
            for metric, value in row.items()
        )

    @cached_property
    def table(self) -> ResultTable:
        """The cases that are summarized, judged and shown: all except those used for learning, or these if there are no others."""
        table = ResultTable(line for line in self.full_table if line.case not in self._learned_cases)
        return table if table.cases else self.full_table

    @property
    def _learned_cases(self) -> set[str]:
        return {case for cases in self.learned.values() for case in cases}

    @cached_property
    def summary(self) -> list[SummaryRow]:
        """Each method, compared with the baseline if there is one; calibration only for methods with probabilities."""
        table = self.table
        if not table.cases:
            return []
        baseline = self.options.baseline or self.options.name
        if baseline not in table.methods:
            baseline = self.options.name
        rows = summarize(table, baseline, metrics=tuple(MASK_METRICS), regions=tuple(self.regions), mean_regions=self.judged_regions)
        calibrated = [metric for metric in CALIBRATION_METRICS if metric in table.metrics]
        rows += summarize(table, baseline, metrics=calibrated, regions=tuple(self.regions), mean_regions=self.judged_regions)
        rows += summarize(table, baseline, metrics=calibrated, regions=(ALL_LABELS,) if calibrated else ())
        return correct(
            [row for row in rows if row.metric not in CALIBRATION_METRICS or row.method in self._calibrated], self.judged_regions
        )

    @cached_property
    def verdict(self) -> Verdict | None:
        """The verdict on the judged method; None without a baseline, or if one of the two has no case.

        Cases that the parameters of a method were learned on say nothing of new cases: it is over the others.
        """
        options, table = self.options, self.table
        others = [name for name, _ in options.baselines[1:]]
        if options.baseline is None or not {options.name, options.baseline} <= set(table.methods):
            return None
        if self._learned_cases.issuperset(table.cases):
            reason = f"{self.learned_text}; the verdict of train-crf is on cases held out"
            judged = not_tested(options.name, options.baseline, self.judged_regions, reason)
            return replace(judged, notes=self.empty_notes)
        judged = verdict(
            table,
            options.name,
            options.baseline,
            rivals=[name for name in others if name in table.methods],
            unmeasured=[name for name in others if name not in table.methods],
            rivals_are_simple=False,
            regions=self.judged_regions,
            subject=_subject(options.name),
            summary=self.summary,
            titles=self.titles,
        )
        start = f"{self.learned_text}. Without {_them(len(self._learned_cases))}: " if self.learned else ""
        return replace(judged, sentence=start + judged.sentence, notes=(*judged.notes, *self.empty_notes))

    @property
    def learned_text(self) -> str:
        """How many cases were used for learning, and for which methods; empty if none is known."""
        if not self.learned:
            return ""
        number, total = len(self._learned_cases), len(self.pairs)
        shown = f"{number} of {counted(total, 'case')}" if number < total else "the only case" if total == 1 else f"all {total} cases"
        was, evidence = ("was", "and is") if number == 1 else ("were", "and are")
        methods = listed(list(map(_subject, self.learned)))
        return f"{shown} {was} used to learn the parameters of {methods} {evidence} no evidence for new cases"

    @property
    def no_verdict(self) -> str | None:
        """One sentence why there is no verdict; None if there is one, or no baseline."""
        if self.options.baseline is None or self.verdict is not None:
            return None
        if not self.regions and any(result.values for result in self.results):
            return "no verdict: all label maps have only background"
        missing = [name for name in (self.options.name, self.options.baseline) if name not in self.table.methods]
        new = "that was not used for learning " if self.learned else ""
        return f"no verdict: no case of {' and '.join(missing)} {new}could be measured"

    @property
    def power_note(self) -> str | None:
        """The smallest difference that this many cases can detect; None without a comparison."""
        judged = self.verdict
        if judged is None or not judged.comparison.num_pairs:
            return None
        comparison, count = judged.comparison, judged.comparison.num_pairs
        cases = counted(count, "case")
        if smallest_p_value(count) > ALPHA:
            return f"with {cases} no difference, however large, could have been significant"
        seen = comparison.detectable_difference
        if not seen > 0:
            return f"the differences of all {cases} are equal: there is no scatter to tell which difference would be found"
        unit = DICE.difference_unit
        scatter = f"{DICE.difference_text(comparison.standard_deviation, '')} {unit}"
        found = power_text(f"{DICE.difference_text(seen, '')} {unit} of {DICE.title}")
        return f"with {cases} and differences that scatter by {scatter}, {found} (level {ALPHA:g})"

    @cached_property
    def empty_masks(self) -> dict[str, dict[str, EmptyMasks]]:
        """Counts of cases with empty masks, by region and method."""
        table = self.table
        found: dict[str, dict[str, EmptyMasks]] = {}
        for region in self.regions if table.cases else ():
            for method in table.methods:
                measured = ~np.isin(table.cases, table.missing_cases(method))
                # Their denominators are the sizes of reference and prediction.
                no_reference = np.isnan(table.values(method, region, "sensitivity")) & measured
                no_prediction = np.isnan(table.values(method, region, "precision")) & measured
                counts = (int(empty.sum()) for empty in (no_reference, no_prediction, no_reference & no_prediction, measured))
                found.setdefault(region, {})[method] = EmptyMasks(*counts)
        return found

    @cached_property
    def empty_predictions(self) -> dict[str, tuple[str, ...]]:
        """The cases whose prediction has no foreground although the reference has, by method; methods without any are left out."""
        table, regions = self.full_table, [region for region in self.regions if region in self.full_table.regions]
        found: dict[str, tuple[str, ...]] = {}
        for method in table.methods if regions else ():
            # Their denominators are the sizes of prediction and reference.
            has_none, has_reference = (
                np.isnan([table.values(method, region, metric) for region in regions]).all(axis=0) == is_empty
                for metric, is_empty in (("precision", True), ("sensitivity", False))
            )
            cases = tuple(case for case, is_empty in zip(table.cases, has_none & has_reference, strict=True) if is_empty)
            if cases:
                found[method] = cases
        return found

    @property
    def empty_notes(self) -> tuple[str, ...]:
        """A sentence for each method with empty predictions."""
        total = counted(len(self.full_table.cases), "case")
        return tuple(
            f"{method} has no foreground in {len(cases)} of {total} though the reference has some: {listed(cases)}."
            for method, cases in self.empty_predictions.items()
        )

    @property
    def titles(self) -> dict[str, str]:
        """The displayed name of each region."""
        return {**{region: self.settings.plan.titles.get(region, region) for region in self.regions}, ALL_LABELS: "all labels"}

    @cached_property
    def _calibrated(self) -> set[str]:
        """The methods that have probabilities in any case."""
        return {name for result in self.results for name, values in result.values.items() if ALL_LABELS in values}

    def _completed(self, method: str, values: RegionValues) -> RegionValues:
        """Return the values of a case with one row per region: a label that neither map has is an empty mask in both."""
        completed: RegionValues = {}
        for region in self.regions:
            completed[region] = {**_EMPTY, **values.get(region, {})}
        if method in self._calibrated:
            # Correctly predicted with probability 0 everywhere; undefined if the case has no probabilities.
            absent = 0.0 if ALL_LABELS in values else math.nan
            for region, row in completed.items():
                of_region: Mapping[str, float] = values.get(region, {})
                row.update({metric: of_region.get(metric, absent) for metric in CALIBRATION_METRICS})
            completed[ALL_LABELS] = dict(values.get(ALL_LABELS, dict.fromkeys(CALIBRATION_METRICS, math.nan)))
        return completed


def _them(number: int) -> str:
    return "it" if number == 1 else "them"


def _subject(method: str) -> str:
    return "the refinement" if method == DEFAULT_NAME else method


EvaluationObserver = Observer[Evaluation, CaseResult]

_NOTHING = np.zeros((1, 1, 1), bool)
_EMPTY = measure_masks(_NOTHING, _NOTHING, (1.0, 1.0, 1.0))
"""The values of two empty masks by convention."""
