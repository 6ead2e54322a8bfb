"""The numbers of an evaluation as the page shows them: regions, rows and shown cases."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from crfrefine.evaluate.results import Evaluation
from crfrefine.metrics.registry import Metric, metric_named
from crfrefine.statistics.comparison import MEAN, SummaryRow
from crfrefine.statistics.verdict import ENDPOINT

if TYPE_CHECKING:
    from crfrefine.base.array_types import Float64


class ShownCase(NamedTuple):
    """A case with a picture on the page."""

    case: str
    # "lowest", "median" or "highest", by the difference in Dice, or by Dice without a baseline.
    place: str
    values: Float64  # Its Dice with the baseline, if there is one, and with the judged method.
    png: bytes = b""  # The picture, once it is drawn.
    problem: str = ""  # The reason why the picture is missing.


class SummaryLine(NamedTuple):
    """A row of a summary table."""

    row: SummaryRow
    metric: Metric
    is_lead: bool  # True if the short table shows the metric in this region.
    mean_before: float  # Mean of the baseline; NaN without a baseline.
    mean_after: float
    num_cases: int  # Number of cases in the means.


class Report(NamedTuple):
    """The numbers of an evaluation as the page shows them."""

    evaluation: Evaluation

    @property
    def baseline(self) -> str | None:
        """The method that the judged one is compared with.

        None if the page shows only the judged one.
        """
        if self.evaluation.verdict is None:
            return None
        return self.evaluation.options.baseline

    @property
    def compared(self) -> list[str]:
        """The baseline, if there is one, and the judged method."""
        judged = self.evaluation.options.name
        if self.baseline is None:
            return [judged]
        return [self.baseline, judged]

    def region_title(self, region: str) -> str:
        """Return the displayed name of a region."""
        if region == MEAN:
            return "mean over regions"
        return self.evaluation.titles.get(region, region)

    def regions_of(self, metric: str) -> tuple[str, ...]:
        """Return the regions with a value of a metric.

        The first is the mean over regions, or the only judged region.
        """
        judged = self.evaluation.judged_regions
        table = self.evaluation.table
        if metric not in table.metrics:
            return ()
        measured = []
        for region in table.regions:
            values = [table.values(method, region, metric) for method in self.compared]
            if not np.isnan(values).all():
                measured.append(region)
        if len(judged) == 1:
            return tuple(sorted(measured, key=lambda region: region not in judged))
        if set(judged) & set(measured):
            return (MEAN, *measured)
        return tuple(measured)

    @property
    def lead_region(self) -> str | None:
        """The region by which cases are drawn and ordered; None if Dice has no value."""
        return next(iter(self.regions_of(ENDPOINT)), None)

    def pairs(self, region: str) -> tuple[tuple[str, ...], Float64]:
        """Return the (n) cases that all compared methods have, and their (methods, n) Dice."""
        table = self.evaluation.table
        values = table.compared(self.compared, region, ENDPOINT, self.evaluation.judged_regions)
        kept = np.flatnonzero(~np.isnan(values).any(axis=0))
        return tuple(table.cases[index] for index in kept), values[:, kept]

    def shown_cases(self, num_each: int) -> list[ShownCase]:
        """Return at most `num_each` cases from the low end, the middle and the high end.

        They are ordered by the difference in Dice, or by Dice without a baseline. No case is shown
        twice.
        """
        if self.lead_region is None:
            return []
        cases, values = self.pairs(self.lead_region)

        order_by = values[-1]
        if self.baseline is not None:
            order_by = values[-1] - values[0]
        order = np.argsort(order_by, kind="stable").tolist()

        num_each = min(num_each, math.ceil(len(order) / 3))
        lowest = order[:num_each]
        middle = order[num_each:-num_each]
        first = max(0, (len(middle) - num_each) // 2)
        median = middle[first : first + num_each]
        highest = order[num_each:][::-1][:num_each]

        shown = []
        for place, indices in (("lowest", lowest), ("median", median), ("highest", highest)):
            for index in indices:
                shown.append(ShownCase(cases[index], place, values[:, index]))
        return shown

    def summary_lines(self, method: str) -> list[SummaryLine]:
        """Return the lines of a method, metric by metric, with the leading region first."""
        rows_by_metric: dict[str, list[SummaryRow]] = {}
        for row in self.evaluation.summary:
            if row.method == method and (row.num_values or row.comparison is not None):
                rows_by_metric.setdefault(row.metric, []).append(row)
        lines = []
        for name, rows in rows_by_metric.items():
            lead = self.regions_of(name)[:1]
            metric = metric_named(name)
            of_metric = []
            for row in rows:
                before = math.nan
                after = row.mean
                num_cases = row.num_values
                if self.baseline is not None:  # The means are over the cases that both have.
                    methods = [self.baseline, row.method]
                    judged = self.evaluation.judged_regions
                    table = self.evaluation.table
                    values = table.compared(methods, row.region, row.metric, judged)
                    values = values[:, ~np.isnan(values).any(axis=0)]
                    num_cases = values.shape[1]
                    if num_cases > 0:
                        before, after = values.mean(axis=1).tolist()
                is_lead = (row.region,) == lead
                of_metric.append(SummaryLine(row, metric, is_lead, before, after, num_cases))
            lines += sorted(of_metric, key=lambda line: not line.is_lead)
        return lines
