"""The numbers of an evaluation as the page shows them: rows of tables, regions, shown cases."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
        return [*([] if self.baseline is None else [self.baseline]), self.evaluation.options.name]

    def region_title(self, region: str) -> str:
        """Return the displayed name of a region."""
        if region == MEAN:
            return "mean over regions"
        return self.evaluation.titles.get(region, region)

    def regions_of(self, metric: str) -> tuple[str, ...]:
        """Return the regions with a value of a metric: first the mean over regions, or the only judged region."""
        table = self.evaluation.table
        means = self.evaluation.judged_regions
        if metric not in table.metrics:
            return ()
        measured = [
            r
            for r in table.regions
            if any(not np.isnan(table.values(method, r, metric)).all() for method in self.compared)
        ]
        if len(means) == 1:
            return tuple(sorted(measured, key=lambda region: region not in means))
        return (*((MEAN,) if set(means) & set(measured) else ()), *measured)

    def pairs(self, region: str) -> tuple[tuple[str, ...], Float64]:
        """Return (n) cases and (methods, n) Dice of the compared methods: cases that all have."""
        values = self.evaluation.table.compared(
            self.compared, region, ENDPOINT, self.evaluation.judged_regions
        )
        kept = np.flatnonzero(~np.isnan(values).any(axis=0))
        return tuple(self.evaluation.table.cases[index] for index in kept), values[:, kept]

    def shown_cases(self, num_each: int) -> list[ShownCase]:
        """Return the cases with the lowest, median and highest difference in Dice, or Dice without a baseline; each once."""
        regions = self.regions_of(ENDPOINT)
        if not regions:
            return []
        cases, values = self.pairs(regions[0])
        order = np.argsort(
            values[-1] if self.baseline is None else values[-1] - values[0], kind="stable"
        ).tolist()
        each = min(num_each, -(-len(order) // 3))
        middle = order[each:-each]
        first = max(0, (len(middle) - each) // 2)
        groups = {
            "lowest": order[:each],
            "median": middle[first : first + each],
            "highest": order[each:][: -each - 1 : -1],
        }
        return [
            ShownCase(cases[index], place, values[:, index])
            for place, indices in groups.items()
            for index in indices
        ]

    def summary_lines(
        self, method: str
    ) -> Iterator[tuple[SummaryRow, Metric, bool, float, float, int]]:
        """Yield row, metric, whether the region represents the metric, both means and the number of cases that both methods have."""
        rows = [
            row
            for row in self.evaluation.summary
            if row.method == method and (row.num_values or row.comparison is not None)
        ]
        metrics = list(dict.fromkeys(row.metric for row in rows))
        leads = {metric: self.regions_of(metric)[:1] for metric in metrics}
        for row in sorted(
            rows, key=lambda row: (metrics.index(row.metric), (row.region,) != leads[row.metric])
        ):
            before = math.nan
            after = row.mean
            count = row.num_values
            if self.baseline is not None:
                values = self.evaluation.table.compared(
                    [self.baseline, method], row.region, row.metric, self.evaluation.judged_regions
                )
                values = values[:, ~np.isnan(values).any(axis=0)]
                count = values.shape[1]
                before, after = values.mean(axis=1).tolist() if count else (math.nan, row.mean)
            yield (
                row,
                metric_named(row.metric),
                (row.region,) == leads[row.metric],
                before,
                after,
                count,
            )
