"""The values in charts and the case table: judged method and baseline, case by case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.metrics.registry import metric_named
from crfrefine.pages.report.model import ReportInput
from crfrefine.statistics.comparison import MEAN, ResultTable
from crfrefine.statistics.verdict import ENDPOINT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.base.array_types import Bool, Float64

# As in the comparisons: smaller differences are rounding errors.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Pairs:
    """Two methods in one metric and region; only cases with both values, or without a baseline, with the single value."""

    cases: tuple[str, ...]  # (n) their names.
    before: Float64 | None  # (n) values of the baseline; None without one.
    after: Float64  # (n) values of the judged method.
    gains: NDArray[np.int64]  # (n) 1 if the method is better, -1 if worse, 0 if equal; all 0 without a baseline or a better direction.

    @property
    def differences(self) -> Float64:
        """After minus before; after itself without a baseline."""
        return self.after if self.before is None else self.after - self.before


def mean_regions(report: ReportInput) -> tuple[str, ...]:
    """Return the regions that the mean over regions covers."""
    if report.mean_regions is not None:
        return tuple(report.mean_regions)
    if report.verdict is not None:
        return report.verdict.regions
    return tuple(region for region in report.table.regions if region in report.region_labels)


def region_choices(report: ReportInput, metric: str) -> tuple[str, ...]:
    """Return the regions with a value of a metric: first the mean over regions, or the only judged region."""
    regions = mean_regions(report)
    measured = [region for region in report.table.regions if _is_measured(report, region, metric)]
    if len(regions) == 1:
        return tuple(sorted(measured, key=lambda region: region not in regions))
    has_mean = len(regions) > 1 and any(region in measured for region in regions)
    return ((MEAN,) if has_mean else ()) + tuple(measured)


def shown_values(report: ReportInput, methods: Sequence[str], region: str, metric: str) -> Float64:
    """Return (methods, cases) values as compared: signed differences by magnitude, means over regions over the common ones.

    For a single method, without a comparison, differences keep their sign, as in the summary.
    """
    table = report.table
    if is_shown_unsigned(report, metric):
        table = ResultTable(replace(line, value=abs(line.value)) for line in table if line.metric == metric)
    if region == MEAN:
        return table.means(metric, methods, [name for name in mean_regions(report) if name in table.regions])
    return np.array([table.values(method, region, metric) for method in methods])


def is_shown_unsigned(report: ReportInput, metric: str) -> bool:
    """Return whether values of a metric are shown without their sign."""
    return report.baseline is not None and metric_named(metric).better == "nearer_zero"


def pairs_of(report: ReportInput, region: str, metric: str) -> Pairs:
    """Return the values of one chart."""
    values = shown_values(report, report.compared, region, metric)
    kept: Bool = np.asarray(~np.isnan(values).any(axis=0))
    cases = tuple(case for case, there in zip(report.table.cases, kept, strict=True) if there)
    after = values[-1, kept]
    if report.baseline is None:
        return Pairs(cases, None, after, np.zeros(len(cases), np.int64))
    before = values[0, kept]
    differences = after - before
    scale = max(float(np.abs(values[:, kept]).max(initial=0.0)), np.finfo(float).tiny)
    signs = np.where(np.abs(differences) <= _ROUNDING * scale, 0, np.sign(differences)).astype(np.int64)
    better = metric_named(metric).better
    return Pairs(cases, before, after, signs * (0 if better is None else 1 if better == "higher" else -1))


@dataclass(frozen=True)
class ShownCase:
    """A case with pictures on the page."""

    case: str
    reason: str  # "best", "median" or "worst".
    before: float | None  # Its mean Dice with the baseline; None without one.
    after: float  # Its mean Dice with the judged method.


def choose_cases(report: ReportInput, num_shown: int) -> list[ShownCase]:
    """Return the best, median and worst cases: by the difference in mean Dice, or by mean Dice without a baseline.

    Each case appears once; if there are few, worst and best take precedence over median.
    """
    if ENDPOINT not in report.table.metrics:
        return []
    choices = region_choices(report, ENDPOINT)
    if not choices:
        return []
    pairs = pairs_of(report, choices[0], ENDPOINT)
    order = np.argsort(pairs.differences, kind="stable")
    count = len(order)
    each = min(num_shown, max(1, -(-count // 3)))
    middle = sorted(range(count), key=lambda place: abs(2 * place - (count - 1)))[:each]
    wanted = [("worst", range(min(each, count))), ("best", range(count - 1, max(-1, count - 1 - each), -1)), ("median", sorted(middle))]
    taken: dict[int, str] = {}
    for reason, places in wanted:
        for place in places:
            taken.setdefault(int(order[place]), reason)
    before = pairs.before

    def shown(index: int) -> ShownCase:
        return ShownCase(pairs.cases[index], taken[index], None if before is None else float(before[index]), float(pairs.after[index]))

    return [shown(index) for reason in ("worst", "median", "best") for index in taken if taken[index] == reason]


def undefined_counts(report: ReportInput, metric: str) -> Iterator[tuple[str, str, int, int]]:
    """Yield region, method, its number of cases without a value (if any) and its number of cases."""
    for region in region_choices(report, metric):
        if region == MEAN:
            continue
        for method in report.table.methods:
            there = ~np.isin(report.table.cases, report.table.missing_cases(method))
            values = report.table.values(method, region, metric)
            missing = int((np.isnan(values) & there).sum())
            if missing:
                yield region, method, missing, int(there.sum())


def _is_measured(report: ReportInput, region: str, metric: str) -> bool:
    return any(not np.isnan(report.table.values(method, region, metric)).all() for method in report.compared)
