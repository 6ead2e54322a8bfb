"""Fill the page template; the template escapes everything that comes from users."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from crfrefine.metrics.registry import Metric, metric_named
from crfrefine.pages.pictures.display import label_color
from crfrefine.pages.report import charts
from crfrefine.pages.report.cutting import CHANGE_COLORS
from crfrefine.pages.report.model import ReportInput
from crfrefine.pages.report.montage import CHANGE_KINDS, Cut
from crfrefine.pages.report.pairs import ShownCase, is_shown_unsigned, pairs_of, region_choices, shown_values, undefined_counts
from crfrefine.pages.report.viewer import ViewerCase
from crfrefine.pages.report.wording import UNDEFINED, effect_text, interval_text, p_text, wording_of
from crfrefine.statistics.comparison import MEAN, SummaryRow, describe_disagreement, describe_families
from crfrefine.statistics.verdict import ENDPOINT, Outcome

_ASSETS = files("crfrefine.pages.report") / "assets"


@dataclass(frozen=True)
class CaseView:
    """Pictures of one case."""

    shown: ShownCase  # The case, and why it is shown.
    cuts: Sequence[Cut]  # Through its largest change.
    viewer: ViewerCase | None  # None if there is no viewer.
    problem: str = ""  # Why the case cannot be shown; empty if it can.
    labels: tuple[int, ...] = ()  # The labels in the case.


def render(report: ReportInput, views: Sequence[CaseView], viewer_source: str, viewer_problem: str) -> str:
    """Return the page; the script of the viewer, or the reason why there is none, is empty."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=jinja2.FunctionLoader(_asset)
    )
    environment.globals |= {"asset": _asset, "words": wording_of, "interval_text": interval_text, "p_text": p_text}
    metrics = [metric for metric in report.table.metrics if region_choices(report, metric)]
    tested = sorted((metric for metric in metrics if metric_named(metric).better is not None), key=lambda metric: metric != ENDPOINT)
    sets = list(_charts(report, tested))
    rivals = [method for method in report.table.methods if method not in report.compared]
    cases = table_cases(report, metrics)
    has_viewer = any(view.viewer is not None for view in views)
    content = environment.get_template("page.html").render(
        report=report,
        before=report.baseline,
        after=report.method,
        tone=tone(report),
        verdict_regions=[report.region_title(region) for region in report.verdict.regions] if report.verdict is not None else [],
        figures=figures(report),
        families=describe_families(report.summary),
        disagreement=describe_disagreement(row for row in report.summary if row.method == report.method),
        undefined=[
            (report.region_title(region), method, number, total) for region, method, number, total in undefined_counts(report, ENDPOINT)
        ]
        if ENDPOINT in report.table.metrics
        else [],
        unsigned=[metric_named(metric).title for metric in metrics if is_shown_unsigned(report, metric)],
        lines=list(summary_lines(report, report.method)),
        rivals=[(rival, list(summary_lines(report, rival))) for rival in rivals],
        metrics=[metric_named(metric) for metric in dict.fromkeys(drawn["metric"] for drawn in sets)],
        charts=sets,
        is_aggregated=len(report.table.cases) > charts.MOST_MARKS,
        num_drawn=charts.MOST_DRAWN,
        table_metrics=[metric_named(metric) for metric in metrics],
        num_cases=len(report.table.cases),
        num_in_table=len(cases),
        data=_json(table_data(report, metrics, cases, {view.shown.case: f"case-{number}" for number, view in enumerate(views)})),
        views=views,
        groups=list(_groups(views)),
        labels=_label_legend(report, views),
        dice=wording_of(ENDPOINT),
        lead_region=report.region_title((*region_choices(report, ENDPOINT), MEAN)[0]) if ENDPOINT in metrics else "",
        change_colors={CHANGE_KINDS[kind]: color for kind, color in CHANGE_COLORS.items()},
        viewer_source=viewer_source if has_viewer else "",
        viewer_problem=viewer_problem,
        viewer_specs=_json({str(number): view.viewer.spec for number, view in enumerate(views) if view.viewer is not None}),
        minus="\u2212",
    )
    return content


def _charts(report: ReportInput, metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    rows = {(row.metric, row.region): row for row in report.summary if row.method == report.method}
    number = 0
    for metric in metrics:
        wording = wording_of(metric)
        for region in region_choices(report, metric):
            pairs = pairs_of(report, region, metric)
            if not pairs.cases:  # such as calibration that only one of the two methods has
                continue
            number += 1
            name = f"chart-{number}"
            row = rows.get((metric, region))
            comparison = row.comparison if row is not None else None
            drawn = []
            if report.baseline is not None:
                drawn.append(("Before and after", charts.paired_plot(f"{name}-paired", pairs, wording, report.baseline, report.method)))
                drawn.append(("Agreement (Bland-Altman)", charts.bland_altman_plot(f"{name}-agreement", pairs, wording)))
            mean, interval = (None, None) if comparison is None else (comparison.mean_difference, comparison.interval)
            heading = "Values" if report.baseline is None else "Differences"
            drawn.append((heading, charts.difference_plot(f"{name}-differences", pairs, wording, mean, interval)))
            yield {
                "metric": metric,
                "region": region,
                "title": f"{wording.metric.title}, {report.region_title(region)}",
                "advice": wording.metric.advice,
                "is_magnitude": is_shown_unsigned(report, metric),
                "num_pairs": len(pairs.cases),
                "num_left_out": len(report.table.cases) - len(pairs.cases),
                "drawings": drawn,
            }


def _groups(views: Sequence[CaseView]) -> Iterator[tuple[str, list[CaseView]]]:
    """Yield groups of pictures under an accurate heading: no case that gained is under "Worst", none that lost under "Best"."""
    for reason, sign, others in (("worst", 1, "gains"), ("median", 0, ""), ("best", -1, "losses")):
        group = [view for view in views if view.shown.reason == reason]
        odd = [view for view in group if sign and view.shown.before is not None and sign * (view.shown.after - view.shown.before) >= 0]
        usual = [view for view in group if view not in odd]
        if usual:
            yield reason.capitalize(), usual
        if odd:
            none = "" if usual else f": no case is {'worse' if sign > 0 else 'better'}"
            yield f"Smallest {others}{none}", odd


def _label_legend(report: ReportInput, views: Sequence[CaseView]) -> list[tuple[str, str]]:
    """Return color and name of each label in the pictures."""
    labels = sorted({label for view in views for label in view.labels})
    return [(label_color(label), report.label_titles.get(label, f"label {label}")) for label in labels]


def _json(content: Mapping[str, Any]) -> str:
    """Return JSON for a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


# The page's table of cases, which its script fills: values of each case by metric, region and method.

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
    values = shown_values(report, report.compared, choices[0], ENDPOINT)
    size = np.abs(values[-1] - (values[0] if report.baseline is not None else np.nanmean(values[-1])))
    # Cases that cannot be compared come first, so that they are looked at too.
    return sorted(int(index) for index in np.argsort(-np.where(np.isnan(size), np.inf, size), kind="stable")[:most])


def table_data(report: ReportInput, metrics: Sequence[str], cases: Sequence[int], views: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of the case table: one list per metric, region and method, null if undefined; `views` are anchors of cases."""
    table = report.table
    first, rivals = report.compared, [method for method in table.methods if method not in report.compared]
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


# What the page says of the verdict: its tone, the figures beside it, what got worse, and the rivals.


def tone(report: ReportInput) -> str:
    """Return the tone of the verdict: good, bad or neither, as for help with something that got significantly worse."""
    if report.verdict is None:
        return "open"
    if report.verdict.outcome == Outcome.HURTS:
        return "bad"
    has_harm = report.verdict.harm is not None and bool(report.verdict.harm.significant)
    return "good" if report.verdict.outcome == Outcome.HELPS and not has_harm else "open"


def figures(report: ReportInput) -> list[tuple[str, str, str]]:
    """Return the few numbers beside the verdict: name, number, remark."""
    dice = wording_of(ENDPOINT)
    title = dice.metric.title
    if report.verdict is None:
        rows = [row for row in report.summary if row.method == report.method and row.metric == ENDPOINT]
        leads = lead_regions(report, rows)
        row = next((row for row in rows if row.region == leads[ENDPOINT]), None)
        if row is None:
            return []
        return [(f"Mean {title}", dice.number(row.mean), f"n = {row.num_values}"), (f"Median {title}", dice.number(row.median), "")]
    comparison = report.verdict.comparison
    means = f"{dice.number(comparison.mean_baseline)} → {dice.number(comparison.mean)}"
    return [
        (f"Mean {title}", means, f"{report.baseline} → {report.method}"),
        (
            "Difference",
            dice.change(comparison.mean_difference),
            f"{dice.metric.difference_unit}, 95 % CI {interval_text(comparison, dice)}",
        ),
        ("p (Wilcoxon)", p_text(comparison.p_value), "two-sided, paired; this question alone"),
        ("Better / equal / worse", f"{comparison.wins} / {comparison.ties} / {comparison.losses}", f"of {comparison.num_pairs} cases"),
    ]


# The page's table of means and differences: a row per metric and region.


def summary_lines(report: ReportInput, method: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a method as text, the region that represents its metric first."""
    previous = ""
    rows = [row for row in report.summary if row.method == method and (row.num_values or row.comparison is not None)]
    metrics = list(dict.fromkeys(row.metric for row in rows))
    leads = lead_regions(report, rows)
    rows.sort(key=lambda row: (metrics.index(row.metric), row.region != leads[row.metric]))
    baselines = {(row.metric, row.region): row for row in report.summary if row.method == report.baseline}
    for row in rows:
        wording, comparison = wording_of(row.metric), row.comparison
        baseline = baselines.get((row.metric, row.region))
        before, after, difference = baseline.mean if baseline else math.nan, row.mean, math.nan
        num_pairs, num_left_out = row.num_values, row.num_undefined
        if comparison is not None:
            num_pairs, num_left_out = comparison.num_pairs, len(report.table.cases) - comparison.num_pairs
            if num_pairs:  # else, as for calibration that the baseline does not have, each has its own mean
                before, after, difference = comparison.mean_baseline, comparison.mean, comparison.mean_difference
        elif report.baseline is not None and method != report.baseline:  # a metric that only describes
            both = shown_values(report, [report.baseline, method], row.region, row.metric)
            both = both[:, ~np.isnan(both).any(axis=0)]
            num_pairs, num_left_out = both.shape[1], len(report.table.cases) - both.shape[1]
            if num_pairs:
                before, after = (float(values.mean()) for values in both)
                difference = after - before
        yield {
            "metric": row.metric,
            "region": report.region_title(row.region),
            "is_first": row.metric != previous,
            "is_lead": row.region == leads[row.metric],
            "method": method,
            "before": wording.number(before),
            "after": wording.number(after),
            "difference": wording.change(difference),
            "interval": interval_text(comparison, wording) if comparison else UNDEFINED,
            "p_value": p_text(row.p_adjusted) if comparison else UNDEFINED,
            "effect": effect_text(comparison) if comparison else UNDEFINED,
            "counts": (comparison.wins, comparison.ties, comparison.losses) if comparison and num_pairs else None,
            "num_pairs": num_pairs,
            "num_left_out": num_left_out,
        }
        previous = row.metric


def lead_regions(report: ReportInput, rows: Iterable[SummaryRow]) -> dict[str, str]:
    """Return the region that represents each metric of the rows while the regions are hidden."""
    return {metric: (region_choices(report, metric) or ("",))[0] for metric in dict.fromkeys(row.metric for row in rows)}
