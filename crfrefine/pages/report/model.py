"""The contents of a report: numbers computed elsewhere, the volumes of the few cases that it shows, and the selection from both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.metrics.registry import metric_named
from crfrefine.statistics.comparison import MEAN, ResultTable, SummaryRow
from crfrefine.statistics.verdict import ENDPOINT, Verdict

if TYPE_CHECKING:
    from crfrefine.base.array_types import Array, Float32, Float64


@dataclass(frozen=True)
class CaseImages:
    """The volumes of one case, all on one grid, as stored."""

    image: Float32 | None  # (M, x, y, z) any intensity; None if there are no images.
    reference: Array  # (x, y, z) labels of the reference, 0 is background.
    before: Array | None  # (x, y, z) labels of the baseline; None without a baseline.
    after: Array  # (x, y, z) labels of the judged method.
    affine: Float64  # (4, 4) voxel to world RAS+ mm.
    modality_names: tuple[str, ...] = ()  # One per modality; default: they are numbered.


@dataclass(frozen=True)
class ShownCase:
    """A case with a picture on the page."""

    case: str
    place: str  # "lowest", "median" or "highest", by the difference in Dice, or by Dice without a baseline.
    values: Float64  # Its Dice with the baseline, if there is one, and with the judged method.


@dataclass(frozen=True)
class ReportInput:
    """The contents of a report."""

    title: str  # Heading of the report.
    table: ResultTable  # The measurements: cases, regions, metrics and methods.
    method: str  # The judged method.
    baseline: str | None  # The method it is compared with; None: the report shows only the judged method.
    summary: Sequence[SummaryRow]  # One row per method, region and metric.
    verdict: Verdict | None  # Shown first; None without a baseline.
    region_labels: Mapping[str, tuple[int, ...]]  # The labels of each region.
    region_titles: Mapping[str, str]  # Displayed name of each region; default: its name.
    failures: Sequence[tuple[str, str]]  # Cases that could not be evaluated, with the reason.
    settings: Mapping[str, str]  # Shown at the end, such as folders, tolerance, version, date and command line.
    load_case: Callable[[str], CaseImages]  # Reads the volumes of one case; called only for the cases that are shown.
    left_out: str = ""  # One line about the incomplete cases that are left out; empty without any.
    # The regions that the mean over regions covers; default: those of the verdict, else all whose labels are known.
    mean_regions: Sequence[str] | None = None

    @property
    def compared(self) -> list[str]:
        """The baseline, if there is one, and the judged method."""
        return [self.method] if self.baseline is None else [self.baseline, self.method]

    @property
    def label_titles(self) -> dict[int, str]:
        """The names of the labels: those of the regions with only this label."""
        return {labels[0]: self.region_title(region) for region, labels in self.region_labels.items() if len(labels) == 1}

    def region_title(self, region: str) -> str:
        """Return the displayed name of a region."""
        return "mean over regions" if region == MEAN else self.region_titles.get(region, region)

    def regions_of(self, metric: str) -> tuple[str, ...]:
        """Return the regions with a value of a metric: first the mean over regions, or the only judged region."""
        if metric not in self.table.metrics:
            return ()
        table, means = self.table, self._mean_regions
        measured = [r for r in table.regions if any(not np.isnan(table.values(method, r, metric)).all() for method in self.compared)]
        if len(means) == 1:
            return tuple(sorted(measured, key=lambda region: region not in means))
        has_mean = any(region in measured for region in means)
        return ((MEAN,) if has_mean else ()) + tuple(measured)

    def is_unsigned(self, metric: str) -> bool:
        """Return whether values of a metric are compared without their sign."""
        return self.baseline is not None and metric_named(metric).better == "nearer_zero"

    def values(self, methods: Sequence[str], region: str, metric: str) -> Float64:
        """Return (methods, cases) values as compared; means over regions are over those that all methods have."""
        table = self.table
        if self.is_unsigned(metric):
            table = ResultTable(replace(line, value=abs(line.value)) for line in table if line.metric == metric)
        if region == MEAN:
            return table.means(metric, methods, [name for name in self._mean_regions if name in table.regions])
        return np.array([table.values(method, region, metric) for method in methods])

    def pairs(self, region: str) -> tuple[tuple[str, ...], Float64]:
        """Return (n) cases and (methods, n) Dice of the baseline, if there is one, and the judged method: cases that all have."""
        values = self.values(self.compared, region, ENDPOINT)
        kept = np.flatnonzero(~np.isnan(values).any(axis=0))
        return tuple(self.table.cases[index] for index in kept), values[:, kept]

    def shown_cases(self, num_each: int) -> list[ShownCase]:
        """Return the cases with the lowest, median and highest difference in Dice, or Dice without a baseline; each once."""
        regions = self.regions_of(ENDPOINT)
        if not regions:
            return []
        cases, values = self.pairs(regions[0])
        order = np.argsort(values[-1] if self.baseline is None else values[-1] - values[0], kind="stable").tolist()
        each = min(num_each, -(-len(order) // 3))
        middle = order[each:-each]
        first = max(0, (len(middle) - each) // 2)
        groups = {"lowest": order[:each], "median": middle[first : first + each], "highest": order[each:][: -each - 1 : -1]}
        return [ShownCase(cases[index], place, values[:, index]) for place, indices in groups.items() for index in indices]

    def undefined_counts(self) -> Iterator[tuple[str, str, int, int]]:
        """Yield region, method, its number of cases without a Dice (if any) and its number of cases."""
        for region in self.regions_of(ENDPOINT):
            for method in self.table.methods if region != MEAN else ():
                there = ~np.isin(self.table.cases, self.table.missing_cases(method))
                missing = int((np.isnan(self.table.values(method, region, ENDPOINT)) & there).sum())
                if missing:
                    yield self.region_title(region), method, missing, int(there.sum())

    @property
    def _mean_regions(self) -> tuple[str, ...]:
        if self.mean_regions is not None:
            return tuple(self.mean_regions)
        if self.verdict is not None:
            return self.verdict.regions
        return tuple(region for region in self.table.regions if region in self.region_labels)
