"""Measurements of methods, regions and metrics, and each method compared with a baseline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product
from typing import Any

import numpy as np

from crfrefine.base.array_types import Float64
from crfrefine.base.plain import to_plain
from crfrefine.base.text import listed
from crfrefine.errors import InputError
from crfrefine.io.json import without_nonfinite
from crfrefine.metrics.regions import ALL_LABELS, RESERVED
from crfrefine.metrics.registry import DICE, NLL, metric_named
from crfrefine.statistics.paired import PairedComparison, center, compare_pairs, holm

MEAN = RESERVED  # Region name of the mean over regions.


class Family(StrEnum):
    """The family of tests over which a p value is corrected, for each method by itself."""

    # Dice over the judged regions, which the verdict is about: a single test.
    ENDPOINT = "endpoint"
    # The negative log likelihood: a single test.
    PROBABILITIES = "probabilities"
    # Other metrics over the judged regions, however many labels there are.
    OTHER_METRICS = "other metrics"
    # Every metric, Dice included, in single regions.
    SINGLE_REGIONS = "single regions"


@dataclass(frozen=True)
class Measurement:
    """A value of a metric, such as "dice", as a row of a tidy table; NaN if undefined."""

    case: str
    region: str
    metric: str
    value: float
    method: str


def measurements_of(
    case: str, method: str, values: Mapping[str, Mapping[str, float]]
) -> list[Measurement]:
    """Return the result of `measure_case` for a case as rows of a tidy table."""
    measurements = []
    for region, metrics in values.items():
        for metric, value in metrics.items():
            measurements.append(Measurement(case, region, metric, value, method))
    return measurements


class ResultTable:
    """All measurements: at most one per case, region, metric and method.

    `cases`, `methods`, `regions` and `metrics` are the names, in order of first appearance.

    Raises:
        InputError: a measurement appears twice, or a region has the name of the mean.
    """

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        # By method, region, metric and case.
        self._values: dict[tuple[str, str, str, str], float] = {}
        for item in measurements:
            key = (item.method, item.region, item.metric, item.case)
            if key in self._values:
                raise InputError(
                    f"case {item.case!r}, region {item.region!r}: "
                    f"{item.metric} of {item.method!r} appears twice"
                )
            self._values[key] = item.value
        self.methods = self._names(0)
        self.regions = self._names(1)
        self.metrics = self._names(2)
        self.cases = self._names(3)
        if MEAN in self.regions:
            raise InputError(
                f'a region is called "{MEAN}", which is reserved for the mean over regions; '
                "choose another name"
            )

    def _names(self, part: int) -> tuple[str, ...]:
        """Return the different names in one part of the keys, in order of first appearance."""
        return tuple(dict.fromkeys(key[part] for key in self._values))

    def __iter__(self) -> Iterator[Measurement]:
        for (method, region, metric, case), value in self._values.items():
            yield Measurement(case, region, metric, value, method)

    def values(self, method: str, region: str, metric: str) -> Float64:
        """Return a value for each of `cases`, NaN if undefined or missing.

        For the region MEAN, it is the mean over the regions that have a value.
        """
        if region == MEAN:
            return np.asarray(self.means(metric, [method])[0])
        parts = (
            ("method", method, self.methods),
            ("region", region, self.regions),
            ("metric", metric, self.metrics),
        )
        for kind, name, names in parts:
            if name not in names:
                there_are = listed(names) or "none"
                raise InputError(f"no {kind} {name!r} in the table; there are {there_are}")
        keys = [(method, region, metric, case) for case in self.cases]
        return np.array([self._values.get(key, math.nan) for key in keys])

    def means(
        self,
        metric: str,
        methods: Sequence[str],
        regions: Sequence[str] | None = None,
        *,
        unsigned: bool = False,
    ) -> Float64:
        """Return (methods, cases) means over the regions where all of the methods have a value.

        The methods are thus compared on the same regions: by default, on all. A mean is NaN if no
        region has such values. `unsigned` takes means of magnitudes, so that a volume too large in
        one region does not compensate one too small in another.
        """
        averaged = self.regions if regions is None else regions
        stack = np.empty((len(methods), len(averaged), len(self.cases)))
        for row, method in enumerate(methods):
            for column, region in enumerate(averaged):
                stack[row, column] = self.values(method, region, metric)
        if unsigned:
            stack = np.abs(stack)

        return means_where_all_defined(stack)

    def compared(
        self, methods: Sequence[str], region: str, metric: str, regions: Sequence[str] | None = None
    ) -> Float64:
        """Return (methods, cases) values as they are compared: magnitudes, if these count.

        MEAN is over `regions`, by default all.
        """
        unsigned = metric_named(metric).better == "nearer_zero"
        if region == MEAN:
            return self.means(metric, methods, regions, unsigned=unsigned)
        values = np.array([self.values(method, region, metric) for method in methods])
        if unsigned:
            np.abs(values, out=values)
        return values

    def compare(
        self,
        method: str,
        baseline: str,
        region: str,
        metric: str,
        *,
        regions: Sequence[str] | None = None,
        seed: int = 0,
    ) -> PairedComparison:
        """Compare two methods in a metric that has better values; raises InputError for another.

        For the region MEAN, the mean is over `regions`, by default all.
        """
        found = metric_named(metric)
        if found.better is None:
            raise InputError(f"{metric} has no better values, so methods cannot be compared in it")
        values, others = self.compared((method, baseline), region, metric, regions)
        return compare_pairs(
            values,
            others,
            cases=self.cases,
            better=found.better,
            large_loss=found.large_loss,
            seed=seed,
        )

    def missing_cases(self, method: str) -> tuple[str, ...]:
        """Return the cases without any measurement of a method, such as failed ones."""
        measured = {key[3] for key in self._values if key[0] == method}
        return tuple(case for case in self.cases if case not in measured)


def means_where_all_defined(values: Float64) -> Float64:
    """Return (methods, cases) means of (methods, regions, cases) values.

    A mean is over the regions where all methods have a value, so that all are compared on the same
    regions; it is NaN for all methods if no region has such values.
    """
    usable = ~np.isnan(values).any(axis=0)
    sums = np.where(usable, values, 0.0).sum(axis=1)
    counts = usable.sum(axis=0)
    means = np.full(sums.shape, math.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means


@dataclass(frozen=True)
class SummaryRow:
    """The results of a method in a region and a metric."""

    method: str
    region: str  # its name, or MEAN
    metric: str
    num_values: int  # cases with a value
    num_undefined: int  # cases without a value
    mean: float  # over the cases with a value, like the median
    median: float
    # The comparison with the baseline, over the cases where both have a value. None means the
    # baseline itself, or a metric that only describes.
    comparison: PairedComparison | None = None
    # The p value to show, after Holm's correction over its family. NaN without a test.
    p_adjusted: float = math.nan
    # None means that it is not tested, such as a metric that follows from another one.
    family: Family | None = None
    family_size: int = 0  # number of tests in the family

    @property
    def p_value(self) -> float:
        """The p value of the comparison before correction; NaN if no case allows one."""
        if self.comparison is None:
            return math.nan
        return self.comparison.p_value


def summarize(
    table: ResultTable,
    baseline: str,
    *,
    metrics: Sequence[str] | None = None,
    regions: Sequence[str] | None = None,
    mean_regions: Sequence[str] | None = None,
    seed: int = 0,
) -> list[SummaryRow]:
    """Summarize each method and compare it with a baseline: by metric, then method, then region.

    Args:
        table: the measurements.
        baseline: the method that the others are compared with.
        metrics: by default all.
        regions: by default all.
        mean_regions: regions of the row MEAN, added if there are several; by default `regions`.
        seed: that of the bootstrap.

    Raises:
        InputError: a name is not in the table.
    """
    metrics = table.metrics if metrics is None else metrics
    regions = table.regions if regions is None else regions
    averaged = regions if mean_regions is None else mean_regions
    shown_regions = [*regions]
    if len(averaged) > 1:
        shown_regions.append(MEAN)

    rows = []
    for metric, method, region in product(metrics, table.methods, shown_regions):
        if region == MEAN:
            (values,) = table.means(metric, [method], averaged)
        else:
            values = table.values(method, region, metric)
        comparison = None
        if metric_named(metric).better is not None and method != baseline:
            comparison = table.compare(
                method, baseline, region, metric, regions=averaged, seed=seed
            )
        defined = values[~np.isnan(values)]
        mean, median = center(defined)
        num_undefined = values.size - defined.size
        rows.append(
            SummaryRow(
                method, region, metric, defined.size, num_undefined, mean, median, comparison
            )
        )
    return correct(rows, averaged)


def correct(rows: Sequence[SummaryRow], regions: Sequence[str]) -> list[SummaryRow]:
    """Return rows with their families and corrected p values; pass all that are shown together.

    The correction is Holm's, over each method's family; `regions` are the judged ones.
    """
    judged_region = regions[0] if len(regions) == 1 else MEAN
    tested = []
    for number, row in enumerate(rows):
        if not math.isnan(row.p_value) and not metric_named(row.metric).follows:
            tested.append(number)

    def scope(number: int) -> tuple[bool, bool]:
        region = rows[number].region
        return region != ALL_LABELS, region != judged_region

    members: dict[tuple[str, Family], list[int]] = {}
    for number in sorted(tested, key=scope):
        row = rows[number]
        family = Family.SINGLE_REGIONS
        if row.metric == DICE.name and row.region == judged_region:
            family = Family.ENDPOINT
        elif row.metric == NLL.name and (row.method, Family.PROBABILITIES) not in members:
            # The first one is that over all labels, else that of the judged region.
            family = Family.PROBABILITIES
        elif row.region == judged_region:
            family = Family.OTHER_METRICS
        members.setdefault((row.method, family), []).append(number)

    corrected = list(rows)  # Rows that are not tested have no family.
    for (_, family), numbers in members.items():
        adjusted = holm([rows[number].p_value for number in numbers])
        for number, p_adjusted in zip(numbers, adjusted, strict=True):
            corrected[number] = replace(
                rows[number], p_adjusted=p_adjusted, family=family, family_size=len(numbers)
            )
    return corrected


def summary_dicts(rows: Sequence[SummaryRow]) -> list[dict[str, Any]]:
    """Return the summary for a JSON file: None for an undefined or infinite number."""
    return [without_nonfinite(to_plain(row)) for row in rows]
