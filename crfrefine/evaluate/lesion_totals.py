"""The lesions of all cases together: by method and region, and against the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from crfrefine.evaluate.evaluation import Evaluation
from crfrefine.metrics.lesion_scores import detection_ratios
from crfrefine.metrics.registry import LESION_CHANGES

_COUNTS = ("lesions", "lesions_found", "lesions_missed", "lesions_false")


def total_lesions(
    evaluation: Evaluation, method: str, regions: Sequence[str], beside: str | None = None
) -> dict[str, Any]:
    """Return the numbers of lesions of a method over all cases of some regions.

    These are `_COUNTS`, and sensitivity, precision and F1 of them; of a method that is compared
    with the baseline also `LESION_CHANGES` and the `worst_case`, the first that lost most, or made
    most if none is lost; empty without any. Cases that the method `beside` lacks do not count.
    """
    table = evaluation.table
    names = [*_COUNTS]
    if method != evaluation.options.baseline and "lesions_lost" in table.metrics:
        names += LESION_CHANGES
    of_cases = {}
    for metric in names:
        values = [table.values(method, region, metric) for region in regions]
        of_cases[metric] = np.nansum(values, axis=0)
        if beside is not None:
            of_cases[metric] *= ~np.isnan(table.values(beside, regions[0], "lesions"))
    totals: dict[str, Any] = {metric: int(row.sum()) for metric, row in of_cases.items()}
    _, found, missed, false = (totals[metric] for metric in _COUNTS)
    totals.update(detection_ratios(found, missed, false))
    if "lesions_lost" in totals:
        worst = np.lexsort((-of_cases["lesions_made"], -of_cases["lesions_lost"]))[0]
        totals["worst_case"] = ""
        if totals["lesions_lost"] or totals["lesions_made"]:
            totals["worst_case"] = table.cases[worst]
    return totals


def lesion_totals(evaluation: Evaluation) -> dict[str, dict[str, dict[str, Any]]]:
    """Return `total_lesions` by method and region."""
    totals: dict[str, dict[str, dict[str, Any]]] = {}
    for method in evaluation.table.methods:
        totals[method] = {}
        for region in evaluation.regions:
            totals[method][region] = total_lesions(evaluation, method, [region])
    return totals
