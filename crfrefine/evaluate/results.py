"""All cases together: the full table of measurements, its summary, the verdict, and the smallest detectable effect."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.base.array_types import Bool
from crfrefine.base.text import counted, listed
from crfrefine.evaluate.measuring import CaseResult, Settings
from crfrefine.evaluate.options import DEFAULT_NAME, EvaluationOptions
from crfrefine.metrics.overlap import measure_case
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.metrics.registry import (
    CALIBRATION_METRICS,
    DICE,
    MASK_METRICS,
    RegionValues,
    metric_named,
)
from crfrefine.runs.cases.case_files import Incomplete, describe_left_out
from crfrefine.runs.options import Observer
from crfrefine.statistics.comparison import (
    ResultTable,
    SummaryRow,
    correct,
    measurements_of,
    summarize,
)
from crfrefine.statistics.verdict import Verdict, not_tested, power_text, verdict

if TYPE_CHECKING:
    from crfrefine.evaluate.pairing import CasePair


# Metrics of which `--ceiling` reports the recovered share.
OF_RESOLUTION = (DICE.name, "surface_dice")


@dataclass
class Evaluation:
    """The results of a run."""

    options: EvaluationOptions
    settings: Settings  # The settings that the values depend on.
    pairs: Sequence[CasePair]  # The cases, sorted by name.
    results: Sequence[CaseResult] = ()  # Results of the processed cases, in the same order.
    notes: Sequence[str] = ()  # Notes on assumptions and ignored files, one sentence each.
    num_processes: int = 1  # Cases measured at a time.
    seconds: float = 0.0
    has_report: bool = False  # True once `report.html` is written.
    left_out: Incomplete = field(default_factory=dict)  # No number includes these cases.
    learned: Mapping[str, Sequence[str]] = field(
        default_factory=dict
    )  # By method, the cases that its parameters were learned on.

    @property
    def left_out_text(self) -> str:
        """One line: the number of cases left out, and why; empty without any."""
        return (
            describe_left_out(self.left_out, len(self.pairs) + len(self.left_out))
            if self.left_out
            else ""
        )

    @property
    def failures(self) -> list[tuple[str, str]]:
        """Case and message of every failure."""
        return [
            (
                result.case_id,
                failure.message if failure.part is None else f"{failure.part}: {failure.message}",
            )
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
        names = {
            region for result in self.results for rows in result.values.values() for region in rows
        }
        return self.settings.all_regions(
            [int(name) for name in names - {*self.settings.named, ALL_LABELS}]
        )

    @property
    def judged_regions(self) -> tuple[str, ...]:
        """The regions of the deciding mean."""
        return self.settings.judged or tuple(
            name for name in self.regions if name not in self.settings.named
        )

    @property
    def titles(self) -> dict[str, str]:
        """The displayed name of each region."""
        return {
            **{region: self.settings.titles.get(region, region) for region in self.regions},
            ALL_LABELS: "all labels",
        }

    @cached_property
    def full_table(self) -> ResultTable:
        """Every case, method, region and metric."""
        return ResultTable(
            line
            for result in self.results
            for method in self.options.methods
            if method in result.values
            for line in measurements_of(
                result.case_id, method, self._completed(method, result.values[method])
            )
        )

    @cached_property
    def table(self) -> ResultTable:
        """The cases that are summarized, judged and shown: all except those used for learning, or these if there are no others."""
        table = ResultTable(
            line for line in self.full_table if line.case not in self._learned_cases
        )
        return table if table.cases else self.full_table

    @cached_property
    def _learned_cases(self) -> set[str]:
        return {case for cases in self.learned.values() for case in cases}

    @cached_property
    def summary(self) -> list[SummaryRow]:
        """Each method, compared with the baseline if there is one; calibration only for methods with probabilities."""
        table, regions = self.table, tuple(self.regions)
        if not table.cases:
            return []
        baseline = (
            self.options.baseline if self.options.baseline in table.methods else self.options.name
        )
        calibrated = [metric for metric in CALIBRATION_METRICS if metric in table.metrics]
        rows = summarize(
            table,
            baseline,
            metrics=(*MASK_METRICS, *calibrated),
            regions=regions,
            mean_regions=self.judged_regions,
        )
        if calibrated:  # All labels together, which no mean over regions includes.
            rows += summarize(table, baseline, metrics=calibrated, regions=(ALL_LABELS,))
        kept = [
            row
            for row in rows
            if row.metric not in CALIBRATION_METRICS or row.method in self._calibrated
        ]
        return correct(kept, self.judged_regions)

    @cached_property
    def verdict(self) -> Verdict | None:
        """The verdict on the judged method; None without a baseline, or if one of the two has no case."""
        # It leaves out the cases that the parameters of a method were learned on.
        options, table = self.options, self.table
        if options.baseline is None or not {options.name, options.baseline} <= set(table.methods):
            return None
        if self._learned_cases.issuperset(table.cases):
            reason = f"{self.learned_text}; the verdict of train-crf is on cases held out"
            judged = not_tested(options.name, options.baseline, self.judged_regions, reason)
        else:
            judged = verdict(
                table,
                options.name,
                options.baseline,
                rivals=[name for name, _ in options.baselines[1:] if name != options.ceiling],
                regions=self.judged_regions,
                subject=_subject(options.name),
                summary=self.summary,
                titles=self.titles,
            )
            if self.learned:
                judged = replace(
                    judged, sentence=f"{self.learned_text}. Without these: {judged.sentence}"
                )
        return replace(judged, notes=(*judged.notes, *self.empty_notes))

    @cached_property
    def recovered(self) -> dict[str, dict[str, float]]:
        """Share of the ceiling's lead over the baseline that the judged method has, by metric and region, where there is a lead."""
        name, ceiling = self.options.name, self.options.ceiling
        rows = (
            {(row.metric, row.region, row.method): row.comparison for row in self.summary}
            if ceiling is not None
            else {}
        )
        shares: dict[str, dict[str, float]] = {}
        for (metric, region, method), comparison in rows.items():
            best = rows.get((metric, region, str(ceiling)))
            if (
                metric in OF_RESOLUTION
                and method == name
                and comparison
                and best
                and best.mean_difference > 0
            ):
                shares.setdefault(metric, {})[region] = (
                    comparison.mean_difference / best.mean_difference
                )
        return shares

    @property
    def recovered_text(self) -> str:
        """One line on the shares that are recovered, of the mean over regions if there are several; empty without a ceiling."""
        options = self.options
        if options.ceiling is None:
            return ""
        # The mean is the last region.
        shares = [
            f"{100 * [*row.values()][-1]:.0f} % of {metric_named(metric).title}"
            for metric, row in self.recovered.items()
        ]
        lost = f"of what {options.baseline} loses against {options.ceiling}"
        return f"{_subject(options.name)} recovers, {lost}: {listed(shares) or 'nothing, as there is no lead'}"

    @property
    def learned_text(self) -> str:
        """How many cases were used for learning, and for which methods; empty if none is known."""
        if not self.learned:
            return ""
        number, methods = len(self._learned_cases), listed(list(map(_subject, self.learned)))
        return f"{number} of {counted(len(self.pairs), 'case')} used to learn the parameters of {methods}: no evidence for new cases"

    @property
    def no_verdict(self) -> str | None:
        """One sentence why there is no verdict; None if there is one, or no baseline."""
        if self.options.baseline is None or self.verdict is not None:
            return None
        missing = [
            name
            for name in (self.options.name, self.options.baseline)
            if name not in self.table.methods
        ]
        return (
            f"no verdict: no case has a region that could be measured for {' and '.join(missing)}"
        )

    @property
    def power_note(self) -> str | None:
        """The smallest difference that this many cases can detect; None if none can be told."""
        power = "" if self.verdict is None else power_text(self.verdict.comparison)
        return (
            f"with {counted(self.verdict.comparison.num_pairs, 'case')}, {power}"
            if self.verdict is not None and power
            else None
        )

    @cached_property
    def empty_masks(self) -> dict[str, dict[str, dict[str, int]]]:
        """By region and method: cases without the region in the reference, in the prediction or in both, and measured cases."""
        table = self.table
        counts_of: dict[str, dict[str, dict[str, int]]] = {}
        for method in table.methods:
            measured = ~np.isin(table.cases, table.missing_cases(method))
            for region in self.regions:
                reference, prediction = _empty(table, method, region) & measured
                empty = {
                    "reference": reference,
                    "prediction": prediction,
                    "both": reference & prediction,
                    "num_cases": measured,
                }
                counts_of.setdefault(region, {})[method] = {
                    name: int(cases.sum()) for name, cases in empty.items()
                }
        return counts_of

    @cached_property
    def empty_predictions(self) -> dict[str, tuple[str, ...]]:
        """The cases whose prediction has no foreground although the reference has, by method; methods without any are left out."""
        table, empty_cases = self.full_table, {}
        regions = [region for region in self.regions if region in table.regions]
        for method in table.methods if regions else ():
            reference, prediction = np.all(
                [_empty(table, method, region) for region in regions], axis=0
            )
            if cases := tuple(np.array(table.cases)[~reference & prediction].tolist()):
                empty_cases[method] = cases
        return empty_cases

    @property
    def empty_notes(self) -> tuple[str, ...]:
        """A sentence for each method with empty predictions."""
        total = counted(len(self.full_table.cases), "case")
        return tuple(
            f"{method} has no foreground in {len(cases)} of {total} though the reference has some: {listed(cases)}."
            for method, cases in self.empty_predictions.items()
        )

    @cached_property
    def _calibrated(self) -> set[str]:
        """The methods that have probabilities in any case."""
        return {
            name
            for result in self.results
            for name, values in result.values.items()
            if ALL_LABELS in values
        }

    def _completed(self, method: str, values: RegionValues) -> RegionValues:
        """Return the values of a case with one row per region: a label that neither map has is an empty mask in both."""
        # Without a channel, a label is correctly predicted with probability 0 everywhere; undefined if the case has no probabilities.
        absent = dict.fromkeys(
            CALIBRATION_METRICS if method in self._calibrated else (),
            0.0 if ALL_LABELS in values else math.nan,
        )
        completed = {
            region: {**_EMPTY, **absent, **values.get(region, {})} for region in self.regions
        }
        return {**completed, ALL_LABELS: values.get(ALL_LABELS, absent)} if absent else completed


def _empty(table: ResultTable, method: str, region: str) -> Bool:
    """Return in which cases reference and prediction, (2, cases), lack a region: its sizes are the denominators of the two metrics."""
    return np.isnan(
        [table.values(method, region, metric) for metric in ("sensitivity", "precision")]
    )


def _subject(method: str) -> str:
    return "the refinement" if method == DEFAULT_NAME else method


EvaluationObserver = Observer[Evaluation, CaseResult]

# The values of two empty masks by convention.
_EMPTY = measure_case(np.zeros(1, bool), np.zeros(1, bool), {"": (1,)}, (1.0,))[""]
