"""The mean field of overlapping regions: one binary run per region on kernels that are built once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.engines.base import Backend, MeanFieldReport, MeanFieldResult, RunContext, of_part

if TYPE_CHECKING:
    from crfrefine.base.array_types import Float32
    from crfrefine.engines.grid_image import GridImage
    from crfrefine.parameters.specs import ModelSpec


def region_mean_field(
    backend: Backend, log_odds: Float32, image: GridImage, models: Sequence[ModelSpec], context: RunContext
) -> MeanFieldResult:
    """Run the binary mean field of each region, with the logits 0 outside and the region's log-odds, (R, *grid), inside.

    All models have the same kernels. The result has refined log-odds; outside the mask the input divided by the temperature.
    """
    kernels = backend.kernels(replace(image, values=image.values.astype(np.float32, copy=False)), models[0].kernels, context)
    del image
    refined = np.empty(log_odds.shape, dtype=np.float32)
    binary = np.zeros((2, *log_odds.shape[1:]), dtype=np.float32)
    reports: list[MeanFieldReport] = []
    timings: dict[str, float] = {}
    for region, model in enumerate(models):
        binary[1] = log_odds[region]
        progress = of_part(context.progress, region, len(models))
        outcome = kernels.run(binary, model.mean_field, progress=progress, is_last=region == len(models) - 1)
        np.subtract(outcome.logits[1], outcome.logits[0], out=refined[region])
        reports.append(outcome.report)
        for stage, seconds in outcome.timings.items():  # The kernels were built once, and each run reports that.
            timings[stage] = seconds if stage == "build" else timings.get(stage, 0.0) + seconds
    return MeanFieldResult(refined, joined_report(reports), timings)


def joined_report(reports: Sequence[MeanFieldReport]) -> MeanFieldReport:
    """Return the most steps of any region, whether all converged, and the sum of energies; a region that stopped keeps its last one."""
    num_iterations = max(report.num_iterations for report in reports)
    energies = [[*report.energy, *report.energy[-1:] * (num_iterations - len(report.energy))] for report in reports]
    energy = tuple(map(sum, zip(*energies, strict=False)))
    return MeanFieldReport(num_iterations, all(report.converged for report in reports), energy, reports[0].filters)
