"""The mean field of overlapping regions: one binary run per region on kernels that are built once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.engines.base import Backend, MeanFieldReport, MeanFieldResult, Progress, of_part
from crfrefine.engines.boxes import crop

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.label_maps import Box
    from crfrefine.engines.base import FeatureOrigin
    from crfrefine.parameters.specs import ModelSpec


def region_mean_field(
    backend: Backend,
    log_odds: NDArray[np.float32],
    image: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
    spacing: Sequence[float],
    models: Sequence[ModelSpec],
    *,
    box: Box | None = None,
    axes: Sequence[int] | None = None,
    origin: FeatureOrigin | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> MeanFieldResult:
    """Run the binary mean field of each region, with the logits 0 outside and the region's log-odds inside.

    Args:
        backend: the engine.
        log_odds: (R, *grid), above 0 where the region is more likely than not.
        image: as in `Backend.mean_field`, like all arguments that are not described here.
        mask: (*grid), True where the model applies; None: everywhere.
        spacing: mm, one per grid axis.
        models: one per region, with the same kernels.
        box: the mask's bounding box, if only this part of the result is needed; None: the whole grid.
        axes: as in `Backend.kernels`.
        origin: as in `Backend.kernels`.
        threads: number of threads; None: the cores this process may use.
        progress: called between stages; the steps of all regions are counted together.

    Returns:
        (R, *grid), or (R, *box), refined log-odds; outside the mask the input divided by the temperature. The report is that of all
        regions: the most steps of any region, whether all converged, and the sum of their energies, where a region that has stopped keeps
        its last one.
    """
    if box is not None and mask is not None:
        log_odds, image, mask = crop(log_odds, image, mask, box)
    image = np.ascontiguousarray(image, dtype=np.float32)
    kernels = backend.kernels(image, mask, spacing, models[0].kernels, axes=axes, origin=origin, threads=threads, progress=progress)
    del image
    refined = np.empty(log_odds.shape, dtype=np.float32)
    binary = np.zeros((2, *log_odds.shape[1:]), dtype=np.float32)
    reports: list[MeanFieldReport] = []
    timings: dict[str, float] = {}
    for region, model in enumerate(models):
        binary[1] = log_odds[region]
        run = kernels.run_last if region == len(models) - 1 else kernels.run
        outcome = run(binary, model.mean_field, progress=of_part(progress, region, len(models)))
        np.subtract(outcome.logits[1], outcome.logits[0], out=refined[region])
        reports.append(outcome.report)
        for stage, seconds in outcome.timings.items():  # The kernels were built once, and each run reports that.
            timings[stage] = seconds if stage == "build" else timings.get(stage, 0.0) + seconds
    return MeanFieldResult(refined, joined_report(reports), timings)


def joined_report(reports: Sequence[MeanFieldReport]) -> MeanFieldReport:
    """Return the report of all regions together; see `region_mean_field`."""
    num_iterations = max(report.num_iterations for report in reports)
    energies = [[*report.energy, *[report.energy[-1]] * (num_iterations - len(report.energy))] for report in reports if report.energy]
    energy = tuple(sum(of_step) for of_step in zip(*energies, strict=True))
    return MeanFieldReport(num_iterations, all(report.converged for report in reports), energy, reports[0].filters)
