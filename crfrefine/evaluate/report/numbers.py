"""The numbers of an evaluation as the page shows them: regions, rows and shown cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from crfrefine.base.array_types import Float64
from crfrefine.evaluate.evaluation import Evaluation
from crfrefine.metrics.lesion_scores import Lesion
from crfrefine.statistics.comparison import MEAN, SummaryRow
from crfrefine.statistics.verdict import ENDPOINT

NUM_SHOWN = 3  # Most cases each with the lowest, median and highest difference in Dice.


class ShownCase(NamedTuple):
    """A case with a picture on the page."""

    case: str
    # "lowest", "median" or "highest", by the difference in Dice, or by Dice without a baseline; or
    # the outcome of a lesion.
    place: str
    # Its Dice with the baseline, if there is one, and with the judged method; empty for a lesion.
    values: Float64
    png: bytes = b""  # The picture, once it is drawn.
    problem: str = ""  # The reason why the picture is missing.
    lesion: Lesion | None = None  # The lesion around which the case is shown.


def region_title(evaluation: Evaluation, region: str) -> str:
    """Return the displayed name of a region."""
    if region == MEAN:
        return "mean over regions"
    return evaluation.titles.get(region, region)


def regions_of(evaluation: Evaluation, metric: str) -> tuple[str, ...]:
    """Return the regions in which a compared method has a value of a metric.

    The first, the leading one, is the mean over regions, or the only judged region.
    """
    measured = set()
    for row in evaluation.summary:
        if row.metric == metric and row.method in evaluation.compared and row.num_values:
            measured.add(row.region)
    regions = dict.fromkeys((evaluation.leading_region, *evaluation.table.regions))
    return tuple(region for region in regions if region in measured)


def dice_by_region(evaluation: Evaluation) -> dict[str, tuple[tuple[str, ...], Float64]]:
    """Return the (n) cases that all compared methods have, and their (methods, n) Dice, by region.

    The regions are those of `regions_of`.
    """
    table = evaluation.table
    dice = {}
    for region in regions_of(evaluation, ENDPOINT):
        values = table.compared(evaluation.compared, region, ENDPOINT, evaluation.judged_regions)
        kept = np.flatnonzero(~np.isnan(values).any(axis=0))
        dice[region] = (tuple(table.cases[index] for index in kept), values[:, kept])
    return dice


def shown_cases(
    evaluation: Evaluation, dice: Mapping[str, tuple[Sequence[str], Float64]]
) -> list[ShownCase]:
    """Return at most NUM_SHOWN cases from the low end, the middle and the high end.

    They are ordered by the difference in their Dice in the leading region, or by Dice without a
    verdict; `dice` is that of `dice_by_region`. No case is shown twice.
    """
    if not dice:
        return []
    cases, values = next(iter(dice.values()))
    order_by = values[-1]
    if evaluation.verdict is not None:
        order_by = values[-1] - values[0]
    order = np.argsort(order_by, kind="stable").tolist()

    num_each = min(NUM_SHOWN, math.ceil(len(order) / 3))
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


def shown_lesions(evaluation: Evaluation) -> list[ShownCase]:
    """Return the lesions that the judged method lost, by case, the largest first.

    Cases that no number includes are left out.
    """
    shown = []
    for result in evaluation.results:
        if result.case_id not in evaluation.table.cases:
            continue
        changes = result.changes.get(evaluation.options.name, {})
        for lesion in sorted(changes, key=lambda lesion: -lesion.volume_ml):
            if changes[lesion] == "lost":
                region = region_title(evaluation, lesion.region)
                place = f"lesion {lesion.number} of {region}, {lesion.volume_ml:.3g} ml"
                shown.append(ShownCase(result.case_id, place, np.empty(0), lesion=lesion))
    return shown


def rows_of(
    evaluation: Evaluation, method: str, lead_of: Mapping[str, str | None]
) -> list[SummaryRow]:
    """Return the rows of a method that have a value, by metric, the leading region first.

    `lead_of` is the leading region of each metric.
    """
    rows = []
    for row in evaluation.summary:
        if row.method == method and (row.num_values or row.comparison is not None):
            rows.append(row)
    metrics = list(dict.fromkeys(row.metric for row in rows))
    rows.sort(key=lambda row: (metrics.index(row.metric), row.region != lead_of[row.metric]))
    return rows


def means_of(evaluation: Evaluation, row: SummaryRow) -> tuple[float, float, int]:
    """Return the means of the baseline and of a row's method, and the number of their cases.

    They are over the cases that both have. Without a verdict, the first is NaN.
    """
    if evaluation.verdict is None:
        return math.nan, row.mean, row.num_values
    methods = [evaluation.verdict.baseline, row.method]
    values = evaluation.table.compared(methods, row.region, row.metric, evaluation.judged_regions)
    values = values[:, ~np.isnan(values).any(axis=0)]
    if values.size == 0:
        return math.nan, row.mean, 0
    before, after = values.mean(axis=1).tolist()
    return before, after, values.shape[1]
