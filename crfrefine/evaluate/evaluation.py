"""All cases together: the tables of their measurements, and the summary."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from crfrefine.base.array_types import Bool
from crfrefine.base.failures import Failure
from crfrefine.base.notes import Note
from crfrefine.base.observer import Observer
from crfrefine.cases.incomplete import Incomplete, note_on_left_out
from crfrefine.evaluate.measured import CasePair, MeasuredRegions
from crfrefine.evaluate.measuring import CaseResult
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.metrics.lesion_scores import measure_lesions
from crfrefine.metrics.overlap import measure_case
from crfrefine.metrics.regions import ALL_LABELS, Regions
from crfrefine.metrics.registry import (
    CALIBRATION_METRICS,
    DICE,
    LESION_METRICS,
    MASK_METRICS,
)
from crfrefine.statistics.comparison import (
    MEAN,
    ResultTable,
    SummaryRow,
    correct,
    measurements_of,
    summarize,
)
from crfrefine.statistics.verdict import Verdict

# `--ceiling` reports the recovered share of these metrics.
OF_RESOLUTION = (DICE.name, "surface_dice")


@dataclass
class Evaluation:
    """The results of a run."""

    options: EvaluationOptions
    measured: MeasuredRegions
    pairs: Sequence[CasePair]  # the cases, sorted by name
    results: Sequence[CaseResult] = ()  # results of the processed cases, in the same order
    found: Sequence[str] = ()  # how many cases each pattern has
    notes: list[Note] = field(default_factory=list)  # on assumptions and ignored files
    num_processes: int = 1  # cases measured at a time
    seconds: float = 0.0
    written: list[Path] = field(default_factory=list)  # the files with results
    left_out: Incomplete = field(default_factory=dict)  # cases that no number includes
    # By method, the cases that its parameters were learned on.
    learned: Mapping[str, Sequence[str]] = field(default_factory=dict)
    # The methods whose label maps `infer` has written, by its records.
    refined: Collection[str] = ()
    verdict: Verdict | None = None  # once all cases are measured; None without a baseline

    @property
    def note_on_left_out(self) -> Note | None:
        """The number of cases left out, and why; None without any."""
        if not self.left_out:
            return None
        return note_on_left_out(self.left_out, len(self.pairs) + len(self.left_out))

    @property
    def failures(self) -> list[Failure]:
        """Every failure, with its case."""
        failures = []
        for result in self.results:
            for failure in result.failures:
                failures.append(replace(failure, case_id=result.case_id))
        return failures

    @property
    def num_failed(self) -> int:
        """Number of cases with a failure."""
        return sum(bool(result.failures) for result in self.results)

    @cached_property
    def regions(self) -> Regions:
        """Each label that occurs or is named, then the named regions."""
        names: set[str] = set()
        for result in self.results:
            for values in result.values.values():
                names.update(values)
        labels = names - {*self.measured.named, ALL_LABELS}
        return self.measured.all_regions([int(label) for label in labels])

    @property
    def judged_regions(self) -> tuple[str, ...]:
        """The regions whose mean decides the verdict."""
        labels = [name for name in self.regions if name not in self.measured.named]
        return self.measured.judged or tuple(labels)

    @property
    def leading_region(self) -> str:
        """The mean over the judged regions, or the only one of them."""
        if len(self.judged_regions) == 1:
            return self.judged_regions[0]
        return MEAN

    @cached_property
    def titles(self) -> dict[str, str]:
        """The displayed name of each region.

        That of a `dataset.json`, else of the first file that names the label, the reference before
        the methods.
        """
        names: dict[int, str] = {}
        for reading in reversed([*self.measured.readings.values()]):
            names.update(reading.label_names)
        for result in reversed(self.results):
            for names_of_file in reversed(result.names.values()):
                names.update(names_of_file)
        names.update(self.measured.names.names)
        names.update(self.measured.label_names)
        titles = {region: region for region in self.regions}
        for label, name in names.items():
            if str(label) in titles:
                titles[str(label)] = f"{label} {name}"
        titles[ALL_LABELS] = "all labels"
        return titles

    @cached_property
    def full_table(self) -> ResultTable:
        """Every case, method, region and metric."""
        # The values of two empty masks by convention.
        nothing = np.zeros(1, bool)
        of_empty = measure_case(nothing, nothing, {"": (1,)}, 1.0)[""]
        rules = self.options.lesion_rules
        if rules is not None:
            of_empty |= measure_lesions(nothing, nothing, {"": (1,)}, 1.0, rules)[""].values
        measurements = []
        for result in self.results:
            for method, values in result.values.items():
                absent = {}
                if method in self._calibrated:
                    # A label without a channel is correctly predicted with probability 0
                    # everywhere; its values are undefined if the case has no probabilities.
                    default = 0.0 if ALL_LABELS in values else math.nan
                    absent = dict.fromkeys(CALIBRATION_METRICS, default)
                completed = {}
                for region in self.regions:  # A label that neither map has is empty in both.
                    completed[region] = {**of_empty, **absent, **values.get(region, {})}
                if absent:
                    completed[ALL_LABELS] = values.get(ALL_LABELS, absent)
                measurements += measurements_of(result.case_id, method, completed)
        return ResultTable(measurements)

    @cached_property
    def table(self) -> ResultTable:
        """The cases that are summarized, judged and shown.

        These are all but those that parameters were learned on, or all if there are no others.
        """
        table = ResultTable(line for line in self.full_table if line.case not in self.learned_cases)
        if not table.cases:
            return self.full_table
        return table

    @cached_property
    def learned_cases(self) -> set[str]:
        """The cases that the parameters of a method were learned on."""
        return set().union(*self.learned.values())

    @cached_property
    def summary(self) -> list[SummaryRow]:
        """Each method, compared with the baseline if there is one.

        Calibration has rows only for methods with probabilities.
        """
        table = self.table
        if not table.cases:
            return []
        baseline = self.options.baseline
        if baseline not in table.methods:
            baseline = self.options.name
        calibrated = [metric for metric in CALIBRATION_METRICS if metric in table.metrics]
        of_lesions = LESION_METRICS if self.options.lesions is not None else ()
        rows = summarize(
            table,
            baseline,
            metrics=(*MASK_METRICS, *of_lesions, *calibrated),
            regions=tuple(self.regions),
            mean_regions=self.judged_regions,
        )
        if calibrated:  # All labels together, which no mean over regions includes.
            rows += summarize(table, baseline, metrics=calibrated, regions=(ALL_LABELS,))
        shown = []
        for row in rows:
            if row.metric not in CALIBRATION_METRICS or row.method in self._calibrated:
                shown.append(row)
        return correct(shown, self.judged_regions)

    @property
    def compared(self) -> list[str]:
        """The methods that charts and pictures compare, the judged one last."""
        if self.verdict is None:
            return [self.options.name]
        return [self.verdict.baseline, self.options.name]

    @cached_property
    def recovered(self) -> dict[str, dict[str, float]]:
        """Share of the ceiling's lead over the baseline that the judged method recovers.

        It is by metric and region, for those with a lead.
        """
        comparisons = {}
        for row in self.summary:
            if row.metric in OF_RESOLUTION and row.comparison is not None:
                comparisons[row.method, row.metric, row.region] = row.comparison
        shares: dict[str, dict[str, float]] = {}
        for (method, metric, region), comparison in comparisons.items():
            lead = comparisons.get((self.options.ceiling or "", metric, region))
            if method == self.options.name and lead is not None and lead.mean_difference > 0:
                share = comparison.mean_difference / lead.mean_difference
                shares.setdefault(metric, {})[region] = share
        return shares

    @cached_property
    def empty_masks(self) -> dict[str, dict[str, dict[str, int]]]:
        """Numbers of cases by region and method.

        They count the cases without the region in the reference, in the prediction or in both, and
        the measured cases.
        """
        table = self.table
        counts: dict[str, dict[str, dict[str, int]]] = {}
        for method in table.methods:
            measured = ~np.isin(table.cases, table.missing_cases(method))
            for region in self.regions:
                reference, prediction = _empty(table, method, region) & measured
                counts.setdefault(region, {})[method] = {
                    "reference": int(reference.sum()),
                    "prediction": int(prediction.sum()),
                    "both": int((reference & prediction).sum()),
                    "num_cases": int(measured.sum()),
                }
        return counts

    @cached_property
    def empty_predictions(self) -> dict[str, tuple[str, ...]]:
        """The cases whose prediction has no foreground although the reference has, by method.

        Methods without such cases are left out.
        """
        table = self.full_table
        empty_cases: dict[str, tuple[str, ...]] = {}
        if not self.regions:
            return empty_cases
        for method in table.methods:
            is_empty = np.all([_empty(table, method, region) for region in self.regions], axis=0)
            reference, prediction = is_empty
            cases = np.array(table.cases)[~reference & prediction].tolist()
            if cases:
                empty_cases[method] = tuple(cases)
        return empty_cases

    @cached_property
    def _calibrated(self) -> set[str]:
        """The methods that have probabilities in any case."""
        methods = set()
        for result in self.results:
            methods |= {method for method, row in result.values.items() if ALL_LABELS in row}
        return methods


EvaluationObserver = Observer[Evaluation, CaseResult]


def _empty(table: ResultTable, method: str, region: str) -> Bool:
    """Return in which cases reference and prediction, (2, cases), lack a region."""
    # The sizes of the region are the denominators of these metrics.
    sensitivity = table.values(method, region, "sensitivity")
    precision = table.values(method, region, "precision")
    return np.isnan([sensitivity, precision])
