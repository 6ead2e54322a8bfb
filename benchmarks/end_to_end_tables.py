"""The tables of `docs/reference/end-to-end.md`: what changed, what networks and CRFs learned, the reference paper's figures beside ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from end_to_end_arms import (
    ADDED,
    ADDED_FEWER,
    ADDED_OWN,
    CERTAINTY,
    END_TO_END,
    FEWER,
    LONGER,
    NETWORK,
    OWN,
)
from end_to_end_findings import Results
from markdown_table import markdown_table
from report import provenance
from study_findings import points
from study_paper import PAPER, spread

from crfrefine import CrfParameters
from crfrefine.metrics.regions import ALL_LABELS
from crfrefine.statistics.comparison import MEAN, format_p
from crfrefine.statistics.paired import PairedComparison, holm

TESTED = ((END_TO_END, LONGER), (ADDED, LONGER), (END_TO_END, ADDED))
"""The comparisons that are tested: one family of Holm's correction for each number of training cases."""
LEVEL = 0.05


def make_sections(results: Sequence[Results]) -> dict[str, str]:
    """Return the text of each pair of markers."""
    if not results:
        return {}
    return {
        "summary": _sentences(results) + "\n\n" + _comparisons(results) + "\n" + _provenance(results),
        "dice": _dice(results),
        "networks": _networks(results),
        "learned": _learned(results),
        "paper": _paper(results),
        "cost": _cost(results),
    }


def _compare(results: Results, method: str, baseline: str) -> PairedComparison:
    return results.table.compare(method, baseline, MEAN, "dice", regions=results.structures)


def _tests(results: Results) -> list[tuple[str, str, PairedComparison, float]]:
    """Return the tested pairs with p after Holm's correction."""
    compared = [_compare(results, *pair) for pair in TESTED]
    adjusted = holm([comparison.p_value for comparison in compared])
    return [(*pair, comparison, p) for pair, comparison, p in zip(TESTED, compared, adjusted, strict=True)]


def _name(results: Results) -> str:
    return f"{results.data}, {results.num_cases} training cases"


def _provenance(results: Sequence[Results]) -> str:
    """Return a line for each machine and source that the last folds ran on, with the trainings if there are several."""
    lines: dict[str, list[str]] = {}
    for one in results:
        lines.setdefault(provenance({"environment": one.environment}), []).append(_name(one))
    if len(lines) == 1:
        return next(iter(lines))
    return "\n".join(f"{'; '.join(names)}: {line}" for line, names in lines.items())


def _sentences(results: Sequence[Results]) -> str:
    """Say for each number of training cases what the tests say."""
    lines = []
    for one in results:
        parts = []
        for method, baseline, comparison, p in _tests(one):
            change = points(comparison.mean_difference)
            low, high = comparison.interval
            if p < LEVEL and (low > 0 or high < 0):
                word = "better" if low > 0 else "worse"
                parts.append(f"{method} is {word} than {baseline} ({change} points of Dice, p {format_p(p)})")
            elif p < LEVEL:  # the test uses ranks: many small gains and a few large losses
                more = "more" if comparison.wins > comparison.losses else "fewer"
                sentence = f"{method} is better than {baseline} in {more} cases than worse, but their mean may not differ"
                parts.append(f"{sentence} ({change}, p {format_p(p)})")
            else:
                parts.append(f"{method} and {baseline} do not differ significantly ({change}, p {format_p(p)})")
        folds = "" if len(one.folds) == 5 else f", fold{'s' if len(one.folds) > 1 else ''} {', '.join(map(str, one.folds))} alone"
        lines.append(f"- **{_name(one)}** ({len(one.table.cases)} held-out cases{folds}): {'; '.join(parts)}.")
    return "\n".join(lines)


def _comparisons(results: Sequence[Results]) -> str:
    rows = []
    for one in results:
        for method, baseline, comparison, p in _tests(one):
            low, high = comparison.interval
            interval = f"{points(low)} to {points(high)}"
            count = f"{comparison.wins} / {comparison.ties} / {comparison.losses}"
            name = f"{method} against {baseline}"
            rows.append(
                [
                    _name(one),
                    name,
                    points(comparison.mean_difference),
                    interval,
                    format_p(p),
                    count,
                    points(comparison.detectable_difference).lstrip("+"),
                ]
            )
    header = ["", "", "Dice, points", "95 % interval", "p (Holm)", "better / equal / worse", "detectable with 80 % power"]
    return markdown_table(header, rows)


def _dice(results: Sequence[Results]) -> str:
    rows = []
    for one in results:
        for method in (NETWORK, LONGER, END_TO_END, FEWER, ADDED, ADDED_FEWER):
            cells = [f"{np.nanmean(one.table.values(method, region, 'dice')):.4f}" for region in one.structures]
            surface = one.table.means("surface_dice", [method], one.structures)[0]
            mean = one.table.means("dice", [method], one.structures)[0]
            rows.append([_name(one), method, ", ".join(cells), f"{np.nanmean(mean):.4f}", f"{np.nanmean(surface):.4f}"])
    structures = "; ".join(dict.fromkeys(", ".join(one.structures) for one in results))
    return markdown_table(["", "", f"Dice of each structure ({structures})", "mean Dice", "surface Dice"], rows)


def _networks(results: Sequence[Results]) -> str:
    """What a network learns if a CRF follows: its own logits, before the CRF."""
    rows = []
    for one in results:
        for method in (LONGER, ADDED_OWN, OWN, END_TO_END):
            dice, surface = (np.nanmean(one.table.means(metric, [method], one.structures)[0]) for metric in ("dice", "surface_dice"))
            likelihood, certainty = (np.nanmean(one.table.values(method, ALL_LABELS, metric)) for metric in ("nll", CERTAINTY))
            rows.append([_name(one), method, f"{dice:.4f}", f"{surface:.4f}", f"{certainty:.3f}", f"{likelihood:.4f}"])
    return markdown_table(["", "", "mean Dice", "surface Dice", "certainty inside structures", "NLL"], rows)


def _learned(results: Sequence[Results]) -> str:
    def of_kernel(name: str) -> Callable[[CrfParameters], object]:
        return lambda one: getattr(one.bilateral[0], name)

    shown: tuple[tuple[str, Callable[[CrfParameters], object]], ...] = (
        ("bilateral weight", of_kernel("weight")),
        ("theta_alpha, mm", of_kernel("theta_alpha")),
        ("theta_beta", of_kernel("theta_beta")),
        ("spatial weight", lambda one: one.spatial.weight),
        ("theta_gamma, mm", lambda one: one.spatial.theta_gamma),
        ("temperature", lambda one: one.mean_field.temperature),
        ("bias", lambda one: one.mean_field.bias),
        ("penalties", lambda one: [value for row in one.compatibility.matrix or ((1.0,),) for value in row if value]),
    )
    rows = []
    for one in results:
        for stage, name in (("end_to_end", END_TO_END), ("added", ADDED)):
            rows.append([_name(one), name, *(_span([value(fold) for fold in one.learned[stage]]) for _, value in shown)])
    return markdown_table(["", "", *(title for title, _ in shown)], rows)


def _span(values: Sequence[object]) -> str:
    found = np.concatenate([np.ravel(np.asarray(value, np.float64)) for value in values])
    low, high = (f"{value:.2g}".replace("-", "−") for value in (found.min(), found.max()))
    return low if low == high else f"{low} to {high}"


def _paper(results: Sequence[Results]) -> str:
    from scipy import stats

    rows = [
        [
            f"paper: {setup}",
            region,
            str(count),
            "V-Net",
            spread(*before),
            spread(*after),
            points(after[0] - before[0]),
            "not significant",
            "–",
        ]
        for setup, region, count, before, after in PAPER
    ]
    for one in results:
        for region in (*one.structures, MEAN) if len(one.structures) > 1 else one.structures:
            before, after = one.table.means("dice", [LONGER, END_TO_END], one.structures if region == MEAN else [region])
            kept = ~np.isnan(before) & ~np.isnan(after)
            before, after = before[kept], after[kept]
            t_test = float(stats.ttest_rel(after, before).pvalue) if np.ptp(after - before) > 0 else math.nan
            wilcoxon = one.table.compare(END_TO_END, LONGER, region, "dice", regions=one.structures).p_value
            cells = [spread(float(values.mean()), float(values.std(ddof=1))) for values in (before, after)]
            change = points(float((after - before).mean()))
            rows.append([_name(one), region, str(len(before)), "3-D U-Net", *cells, change, format_p(t_test) or "–", format_p(wilcoxon)])
    header = ["", "region", "cases tested on", "network", "Dice without CRF", "Dice with CRF-RNN", "change, points", "paired t-test, p"]
    return markdown_table([*header, "Wilcoxon, p"], rows)


def _cost(results: Sequence[Results]) -> str:
    rows = [[_name(one), *(f"{one.seconds[stage] / 60:.1f}" for stage in ("network", "longer", "end_to_end", "added"))] for one in results]
    return markdown_table(["minutes of processor time per fold", NETWORK, LONGER, END_TO_END, ADDED], rows)
