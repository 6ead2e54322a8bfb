"""The page's table of cases, which its script fills: values of each case by metric, region and method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crfrefine.metrics.registry import Metric, metric_named
from crfrefine.pages.report.model import ReportInput
from crfrefine.pages.report.pairs import region_choices, shown_values
from crfrefine.statistics.verdict import ENDPOINT

MOST_VALUES = 300_000
"""Largest number of values in the case table; with more, it has only the cases that changed most."""


def table_cases(report: ReportInput, metrics: Sequence[str]) -> list[int]:
    """Return the cases in the case table: all, or those whose mean Dice changed most."""
    num_cases = len(report.table.cases)
    each = sum(len(region_choices(report, metric)) for metric in metrics) * len(report.table.methods)
    most = max(100, MOST_VALUES // max(each, 1))
    if num_cases <= most:
        return list(range(num_cases))
    choices = region_choices(report, ENDPOINT) if ENDPOINT in metrics else ()
    if not choices:
        return list(range(most))
    methods = [report.method] if report.baseline is None else [report.baseline, report.method]
    values = shown_values(report, methods, choices[0], ENDPOINT)
    size = np.abs(values[-1] - (values[0] if report.baseline is not None else np.nanmean(values[-1])))
    # Cases that cannot be compared come first, so that they are looked at too.
    return sorted(int(index) for index in np.argsort(-np.where(np.isnan(size), np.inf, size), kind="stable")[:most])


def table_data(report: ReportInput, metrics: Sequence[str], cases: Sequence[int], views: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of the case table: one list per metric, region and method, null if undefined.

    Args:
        report: contents of the page.
        metrics: in their order.
        cases: result of `table_cases`.
        views: the page's anchor of each case that has pictures.
    """
    table = report.table
    first = [report.method] if report.baseline is None else [report.baseline, report.method]
    rivals = [method for method in table.methods if method not in first]
    values: dict[str, dict[str, list[list[float | None]]]] = {}
    for metric in metrics:
        values[metric] = {}
        for region in region_choices(report, metric):
            together = shown_values(report, first, region, metric)
            alone = [shown_values(report, [rival], region, metric)[0] for rival in rivals]
            values[metric][region] = [[_plain(float(row[case])) for case in cases] for row in (*together, *alone)]
    return {
        "cases": [table.cases[case] for case in cases],
        "methods": [*first, *rivals],
        "compared": report.baseline is not None,
        "metrics": {metric: _metric_data(metric_named(metric)) for metric in metrics},
        # Lists keep the order: JavaScript puts object keys that look like numbers first.
        "choices": {metric: [(region, report.region_title(region)) for region in region_choices(report, metric)] for metric in metrics},
        "values": values,
        "views": views,
    }


def _metric_data(metric: Metric) -> dict[str, Any]:
    return {
        "values": {"unit": metric.unit, "factor": 1, "digits": metric.digits},
        "differences": {"unit": metric.difference_unit, "factor": metric.difference_factor, "digits": metric.difference_digits},
        "better": metric.better,
    }


def _plain(value: float) -> float | None:
    """Return a value with seven digits, more than are shown; None if it is undefined."""
    return float(f"{value:.7g}") if np.isfinite(value) else None
