"""Methods × regions × metrics, one value per case; and each method against a baseline, as data for tables and files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.text import counted, listed
from crfrefine.errors import InputError
from crfrefine.io.json import without_nonfinite
from crfrefine.metrics.regions import ALL_LABELS, RESERVED
from crfrefine.metrics.registry import DICE, NLL, metric_named
from crfrefine.statistics.paired import PairedComparison, center, compare_pairs, holm

if TYPE_CHECKING:
    from numpy.typing import NDArray

MEAN = RESERVED  # Region name of the mean over regions.
HARM_COLUMN = "over 1 point worse (worst)"  # Title of the column with `harm_text`.


class Family(StrEnum):
    """The family of tests over which a p value is corrected, for each method by itself."""

    ENDPOINT = (
        "endpoint"  # Dice over the judged regions, which the verdict is about: a single test.
    )
    PROBABILITIES = "probabilities"  # The negative log likelihood: a single test.
    OTHER_METRICS = (
        "other metrics"  # Other metrics over the judged regions, however many labels there are.
    )
    SINGLE_REGIONS = "single regions"  # Every metric, Dice included, in single regions.


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
    return [
        Measurement(case, region, metric, value, method)
        for region, row in values.items()
        for metric, value in row.items()
    ]


class ResultTable:
    """All measurements: at most one per case, region, metric and method.

    `cases`, `methods`, `regions` and `metrics` are the names, in order of first appearance.

    Raises:
        InputError: a measurement appears twice, or a region has the name of the mean.
    """

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        self._values: dict[tuple[str, str, str, str], float] = {}
        for item in measurements:
            key = (item.method, item.region, item.metric, item.case)
            if key in self._values:
                raise InputError(
                    f"case {item.case!r}, region {item.region!r}: {item.metric} of {item.method!r} appears twice"
                )
            self._values[key] = item.value
        names = [tuple(dict.fromkeys(key[part] for key in self._values)) for part in range(4)]
        self.methods, self.regions, self.metrics, self.cases = names
        if MEAN in self.regions:
            raise InputError(
                f'a region is called "{MEAN}", which is reserved for the mean over regions; choose another name'
            )

    def __iter__(self) -> Iterator[Measurement]:
        for (method, region, metric, case), value in self._values.items():
            yield Measurement(case, region, metric, value, method)

    def values(self, method: str, region: str, metric: str) -> NDArray[np.float64]:
        """Return a value for each of `cases`, NaN if undefined or missing; for the region MEAN, the mean over the defined ones."""
        if region == MEAN:
            return np.asarray(self.means(metric, [method])[0])
        for kind, name, known in (
            ("method", method, self.methods),
            ("region", region, self.regions),
            ("metric", metric, self.metrics),
        ):
            if name not in known:
                raise InputError(
                    f"no {kind} {name!r} in the table; there are {listed(known) or 'none'}"
                )
        return np.array(
            [self._values.get((method, region, metric, case), math.nan) for case in self.cases]
        )

    def means(
        self,
        metric: str,
        methods: Sequence[str],
        regions: Sequence[str] | None = None,
        *,
        unsigned: bool = False,
    ) -> NDArray[np.float64]:
        """Return (methods, cases) means over the regions where all of the methods have a value; NaN if no region has.

        The methods are thus compared on the same regions: by default, on all. `unsigned` takes means of magnitudes, so that a volume too
        large in one region does not compensate one too small in another.
        """
        chosen = self.regions if regions is None else regions
        if not chosen:
            return np.full((len(methods), len(self.cases)), math.nan)
        stack = np.array(
            [[self.values(method, region, metric) for region in chosen] for method in methods]
        )
        stack = np.abs(stack) if unsigned else stack
        usable = ~np.isnan(stack).any(axis=0)
        sums, counts = np.where(usable, stack, 0.0).sum(axis=1), usable.sum(axis=0)
        means: NDArray[np.float64] = np.full(sums.shape, math.nan)
        np.divide(sums, counts, out=means, where=counts > 0)
        return means

    def compared(
        self, methods: Sequence[str], region: str, metric: str, regions: Sequence[str] | None = None
    ) -> NDArray[np.float64]:
        """Return (methods, cases) values as they are compared, with magnitudes where these count; MEAN is over `regions`, default all."""
        unsigned = metric_named(metric).better == "nearer_zero"
        if region == MEAN:
            return self.means(metric, methods, regions, unsigned=unsigned)
        values = np.array([self.values(method, region, metric) for method in methods])
        return np.abs(values) if unsigned else values

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
        """Compare two methods in a metric that has better values; for the region MEAN, in the mean over `regions`, default all."""
        better = metric_named(metric).better
        if better is None:
            raise InputError(f"{metric} has no better values, so methods cannot be compared in it")
        values, others = self.compared((method, baseline), region, metric, regions)
        return compare_pairs(values, others, cases=self.cases, better=better, seed=seed)

    def missing_cases(self, method: str) -> tuple[str, ...]:
        """Return the cases without any measurement of a method, such as failed ones."""
        measured = {key[3] for key in self._values if key[0] == method}
        return tuple(case for case in self.cases if case not in measured)


@dataclass(frozen=True)
class SummaryRow:
    """The results of a method in a region and a metric."""

    method: str
    region: str  # Its name, or MEAN.
    metric: str
    num_values: int  # Cases with a value.
    num_undefined: int  # Cases without a value.
    mean: float  # Over the cases with a value, as the median.
    median: float
    # With the baseline, over the cases where both have a value; None for the baseline itself and for metrics that only describe.
    comparison: PairedComparison | None = None
    p_adjusted: float = (
        math.nan
    )  # The p value to show, after Holm's correction over its family. NaN without a test.
    family: Family | None = (
        None  # None without a test, as for a metric that is a function of another one.
    )
    family_size: int = 0  # Number of tests in the family.

    @property
    def p_value(self) -> float:
        """The p value of the comparison before correction; NaN if no case allows one."""
        return math.nan if self.comparison is None else self.comparison.p_value


def summarize(
    table: ResultTable,
    baseline: str,
    *,
    metrics: Sequence[str] | None = None,
    regions: Sequence[str] | None = None,
    mean_regions: Sequence[str] | None = None,
    seed: int = 0,
) -> list[SummaryRow]:
    """Summarize each method and compare it with a baseline: rows by metric, then method, then region.

    `metrics` and `regions` are by default all. `mean_regions`, by default `regions`, are those of a row MEAN, which exists if there are
    several; `seed` is that of the bootstrap. Raises InputError for a name that is not in the table.
    """
    chosen = table.regions if regions is None else tuple(regions)
    averaged = chosen if mean_regions is None else tuple(mean_regions)
    names = (*chosen, MEAN) if len(averaged) > 1 else chosen
    rows = []
    for metric in table.metrics if metrics is None else metrics:
        for method in table.methods:
            is_tested = metric_named(metric).better is not None and method != baseline
            for name in names:
                values = (
                    table.means(metric, [method], averaged)[0]
                    if name == MEAN
                    else table.values(method, name, metric)
                )
                comparison = (
                    table.compare(method, baseline, name, metric, regions=averaged, seed=seed)
                    if is_tested
                    else None
                )
                defined = values[~np.isnan(values)]
                row = SummaryRow(
                    method,
                    name,
                    metric,
                    defined.size,
                    values.size - defined.size,
                    *center(defined),
                    comparison,
                )
                rows.append(row)
    return correct(rows, averaged)


def correct(rows: Sequence[SummaryRow], regions: Sequence[str]) -> list[SummaryRow]:
    """Return all rows that are shown together with their families, and their p values after Holm's correction over these."""
    lead = regions[0] if len(regions) == 1 else MEAN  # The region of the verdict.
    tested = [
        number
        for number, row in enumerate(rows)
        if not math.isnan(row.p_value) and not metric_named(row.metric).follows
    ]
    # The number of each method's row whose negative log likelihood is tested by itself.
    order = sorted(tested, key=lambda n: (rows[n].region != ALL_LABELS, rows[n].region != lead))
    alone = {rows[n].method: n for n in reversed(order) if rows[n].metric == NLL.name}
    members: dict[tuple[str, Family], list[int]] = {}
    for number in tested:
        row = rows[number]
        if (row.metric, row.region) == (DICE.name, lead):
            family = Family.ENDPOINT
        elif number in alone.values():
            family = Family.PROBABILITIES
        else:
            family = Family.OTHER_METRICS if row.region == lead else Family.SINGLE_REGIONS
        members.setdefault((row.method, family), []).append(number)
    corrected = [replace(row, p_adjusted=math.nan, family=None, family_size=0) for row in rows]
    for (_, family), numbers in members.items():
        for number, p_adjusted in zip(
            numbers, holm([rows[number].p_value for number in numbers]), strict=True
        ):
            corrected[number] = replace(
                rows[number], p_adjusted=p_adjusted, family=family, family_size=len(numbers)
            )
    return corrected


def describe_families(rows: Iterable[SummaryRow]) -> str:
    """Say in one sentence over how many tests p values are corrected; empty without any."""
    sizes = {row.family: row.family_size for row in sorted(rows, key=lambda row: row.family_size)}
    texts = [f"{family} ({counted(sizes[family], 'test')})" for family in Family if family in sizes]
    return (
        f"Wilcoxon's signed-rank test, after Holm's correction within each method and family: {', '.join(texts)}"
        if texts
        else ""
    )


def summary_dicts(rows: Sequence[SummaryRow]) -> list[dict[str, Any]]:
    """Return the summary for a JSON file: plain types, None for an undefined or infinite number."""
    return [without_nonfinite(asdict(row)) for row in rows]


def comparison_texts(row: SummaryRow) -> tuple[str, ...]:
    """Return the difference, its interval, p after Holm, better/equal/worse and `harm_text` as displayed; empty without a comparison."""
    comparison, metric = row.comparison, metric_named(row.metric)
    if comparison is None:
        return ("",) * 5
    counts = f"{comparison.wins}/{comparison.ties}/{comparison.losses}"
    interval = metric.interval_text(*comparison.interval)
    harm = harm_text(comparison, row.metric)
    return (
        metric.difference_text(comparison.mean_difference),
        interval,
        format_p(row.p_adjusted),
        counts,
        harm,
    )


def harm_text(
    comparison: PairedComparison,
    metric: str = DICE.name,
    *,
    with_name: bool = False,
    minus: str = "-",
) -> str:
    """Return the share of cases that lose more than a point, and the worst case, such as "2.5% (-1.52)"; of distances only that case."""
    if not comparison.worst:
        return "none" if comparison.num_pairs else ""
    case, difference = comparison.worst[0]
    worst = (f"{case} " if with_name else "") + metric_named(metric).difference_text(
        difference
    ).replace("-", minus)
    share = f"{100 * comparison.large_losses / comparison.num_pairs:.1f}".removesuffix(".0")
    return f"{share}% ({worst})" if metric_named(metric).is_ratio else worst


def format_p(p_value: float) -> str:
    """Return a p value as people write it: two digits from 0.001 on, one below, such as "3e-12"; empty if undefined."""
    if math.isnan(p_value):
        return ""
    if p_value >= 0.001:
        return f"{p_value:.2g}"
    mantissa, exponent = f"{p_value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"
