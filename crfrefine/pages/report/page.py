"""Fill the page template; the template escapes everything that comes from users."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from crfrefine.metrics.registry import metric_named
from crfrefine.pages.pictures.display import label_color
from crfrefine.pages.report import charts
from crfrefine.pages.report.case_table import table_cases, table_data
from crfrefine.pages.report.cutting import CHANGE_COLORS
from crfrefine.pages.report.model import ReportInput
from crfrefine.pages.report.montage import CHANGE_KINDS, Cut
from crfrefine.pages.report.pairs import ShownCase, is_shown_unsigned, pairs_of, region_choices, undefined_counts
from crfrefine.pages.report.summary_table import summary_lines
from crfrefine.pages.report.verdict_part import declines, figures, judged_rivals, tone
from crfrefine.pages.report.viewer import ViewerCase
from crfrefine.pages.report.wording import wording_of
from crfrefine.statistics.comparison import MEAN, describe_families
from crfrefine.statistics.verdict import ENDPOINT

_ASSETS = files("crfrefine.pages.report") / "assets"


@dataclass(frozen=True)
class CaseView:
    """Pictures of one case.

    Attributes:
        shown: the case, and why it is shown.
        cuts: through its largest change.
        viewer: None if there is no viewer.
        problem: why the case cannot be shown; empty if it can.
        labels: the labels in the case.
    """

    shown: ShownCase
    cuts: Sequence[Cut]
    viewer: ViewerCase | None
    problem: str = ""
    labels: tuple[int, ...] = ()


def render(report: ReportInput, views: Sequence[CaseView], viewer_source: str, viewer_problem: str) -> str:
    """Return the page.

    Args:
        report: contents of the page.
        views: the pictures.
        viewer_source: the viewer's script; empty without one.
        viewer_problem: why there is no viewer; empty if there is one.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=jinja2.FunctionLoader(_asset)
    )
    environment.globals |= {"asset": _asset, "words": wording_of}
    metrics = [metric for metric in report.table.metrics if region_choices(report, metric)]
    tested = sorted((metric for metric in metrics if metric_named(metric).better is not None), key=lambda metric: metric != ENDPOINT)
    sets = list(_charts(report, tested))
    rivals = [method for method in report.table.methods if method not in (report.method, report.baseline)]
    cases = table_cases(report, metrics)
    has_viewer = any(view.viewer is not None for view in views)
    content = environment.get_template("page.html").render(
        report=report,
        before=report.baseline,
        after=report.method,
        tone=tone(report),
        verdict_regions=[report.region_title(region) for region in report.verdict.regions] if report.verdict is not None else [],
        figures=figures(report),
        declines=list(declines(report)),
        families=describe_families(report.summary),
        undefined=[
            (report.region_title(region), method, number, total) for region, method, number, total in undefined_counts(report, ENDPOINT)
        ]
        if ENDPOINT in report.table.metrics
        else [],
        unsigned=[metric_named(metric).title for metric in metrics if is_shown_unsigned(report, metric)],
        lines=list(summary_lines(report, report.method)),
        rivals=[(rival, list(summary_lines(report, rival))) for rival in rivals],
        judged_rivals=judged_rivals(report),
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
        viewer_specs=_json({str(number): view.viewer.spec() for number, view in enumerate(views) if view.viewer is not None}),
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
    """Return color and name of each label in the pictures; the name is that of the region with only this label."""
    names = {labels[0]: report.region_title(region) for region, labels in report.region_labels.items() if len(labels) == 1}
    labels = sorted({label for view in views for label in view.labels})
    return [(label_color(label), names.get(label, f"label {label}")) for label in labels]


def _json(content: Mapping[str, Any]) -> str:
    """Return JSON for a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
