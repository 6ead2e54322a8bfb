"""The section of a data set and its logits: every method, the verdict, what was learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from report import markdown_table, provenance
from study_findings import Findings, compare_means, points

from crfrefine.statistics.comparison import MEAN, format_p
from crfrefine.train.methods import DEFAULT, GUIDED, METHODS, NETWORK, SCALING, TRAINED, TRAINED_LARGEST

TITLES = {
    NETWORK: "the network's argmax, Dice",
    SCALING: "vector scaling (temperature, a bias per label)",
    GUIDED: "guided filter of the probabilities",
    DEFAULT: "`default`, untrained",
    TRAINED: "**trained CRF**",
    TRAINED_LARGEST: "trained CRF, then largest component",
}
SURFACES = (("surface_dice", "surface Dice", 4), ("hd95_mm", "HD95, mm", 2), ("assd_mm", "ASSD, mm", 3))


def study_section(findings: Findings) -> str:
    """Return the section of a data set and its logits."""
    folds = len(findings.training["folds"])
    largest = findings.training["verdict"]["method"] == TRAINED_LARGEST
    verdicts = [findings.summary["verdict"], *([findings.summary_largest["verdict"]] if largest else [])]
    sentences = "\n>\n".join(
        "\n>\n".join(f"> {text}" for text in (one["sentence"], one["harm"]["sentence"], *one["notes"])) for one in verdicts
    )
    parts = [
        f"### {findings.name}, {findings.num_cases} cases, {folds} folds\n",
        _methods_table(findings),
        sentences + "\n",
        "\n".join(f"- {text}" for text in _notes(findings)) + "\n",
        provenance({"environment": findings.environment}),
    ]
    return "\n".join(parts)


def _methods_table(findings: Findings) -> str:
    table, regions = findings.table, findings.regions
    comparisons, adjusted = compare_means(findings)
    places = (*regions, MEAN) if len(regions) > 1 else regions
    rows = []
    for method in METHODS:
        cells = []
        for place in places:
            compared = table.compare(method, NETWORK, place, "dice", regions=regions)
            cells.append(f"{compared.mean_baseline:.4f}" if method == NETWORK else points(compared.mean_difference))
        if method == NETWORK:
            cells += [""] * 3
        else:
            comparison = comparisons[method]
            low, high = comparison.interval
            cells += [f"{points(low)} to {points(high)}", format_p(adjusted[method])]
            cells += [f"{comparison.wins} / {comparison.ties} / {comparison.losses}"]
        rows.append(
            [TITLES.get(method, method if method != NETWORK else "the network's argmax, Dice"), *cells, *_surfaces(findings, method)]
        )
    names = [*(findings.title(region) for region in regions), *(["mean"] if len(regions) > 1 else [])]
    header = ["", *names, "95 % interval", "p (Holm)", "better / equal / worse", *(title for _, title, _ in SURFACES)]
    return markdown_table(header, rows)


def _surfaces(findings: Findings, method: str) -> list[str]:
    """Means over cases and regions, over those where both the method and the network have a value: both are then of the same cases."""
    cells = []
    for metric, _, digits in SURFACES:
        values, _ = findings.table.means(metric, [method, NETWORK], findings.regions)
        cells.append(f"{np.nanmean(values):.{digits}f}" if not np.isnan(values).all() else "")
    return cells


def _notes(findings: Findings) -> list[str]:
    folds = [fold["fit"] for fold in findings.training["folds"]]
    kernels = [fit["parameters"]["bilateral"][0] for fit in folds if not fit["is_network"]]
    notes = []
    if kernels:
        alpha, beta, weight = (_span(kernels, key) for key in ("theta_alpha", "theta_beta", "weight"))
        notes.append(f"Values of the folds: `theta_alpha` {alpha} mm, `theta_beta` {beta}, `weight` {weight}.")
    if len(kernels) < len(folds):
        notes.append(f"{len(folds) - len(kernels)} of {len(folds)} folds chose no CRF at all.")
    return notes


def _span(kernels: Sequence[dict[str, Any]], key: str) -> str:
    values = np.concatenate([np.ravel(kernel[key]) for kernel in kernels])
    return f"{values.min():.2g} to {values.max():.2g}"
