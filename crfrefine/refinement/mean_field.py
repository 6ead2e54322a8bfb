"""The mean field of a prepared case: on tiles, for all labels, or for each region by itself."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from crfrefine.arrays.probabilities import take_logarithms
from crfrefine.base.array_types import Float32
from crfrefine.base.limits import RUN_BYTES, SMALL, format_size
from crfrefine.base.notes import Note, NoteKind
from crfrefine.engines import get_backend
from crfrefine.engines.base import (
    NO_CONTEXT,
    Backend,
    GridImage,
    MeanFieldReport,
    MeanFieldResult,
    RunContext,
    of_part,
)
from crfrefine.errors import CapacityError, DeviceMemoryError, InputError
from crfrefine.parameters.specs import ModelSpec
from crfrefine.refinement.given import Case, Prepared
from crfrefine.refinement.refined import RefinedChannels
from crfrefine.refinement.tiles.grid import LabelSets
from crfrefine.refinement.tiles.slabs import solve


def run(prepared: Prepared, case: Case) -> tuple[RefinedChannels, Backend, tuple[Note, ...]]:
    """Run the mean field; a case that a GPU cannot hold is computed on the CPU.

    Return the refined channels, the backend that was used, and notes for the user.

    Raises CapacityError, and InputError if refined logits or their energy are not finite.
    """
    backend = case.backend
    notes: tuple[Note, ...] = ()
    shortage: str | None = None
    try:
        sets, outcome = _run_on(backend, prepared, case)
    except DeviceMemoryError as error:
        shortage = str(error)  # The error itself would keep the memory of the stopped run.
    if shortage is not None:
        kind = NoteKind.ON_CPU_FOR_MEMORY
        notes = (Note.of(kind, device=backend.name, problem=shortage),)
        backend = get_backend("cpu")
        sets, outcome = _run_on(backend, prepared, case)

    refined = RefinedChannels(outcome, sets, prepared, case.model.mean_field)
    numbers = list(refined.report.energy)
    if all(math.isfinite(number) for number in numbers) and refined.computed.size:
        ranges = backend.channel_ranges(refined.computed, threads=case.context.threads)
        for lowest, highest in ranges:
            numbers += (lowest, highest)
    if not all(math.isfinite(number) for number in numbers):
        raise InputError(
            "the refined logits or their energy are not finite: the values are beyond float32's "
            "range; expected logits, weights and a compatibility of a few orders of magnitude "
            "around 1"
        )
    return refined, backend, notes


def _run_on(
    backend: Backend, prepared: Prepared, case: Case
) -> tuple[LabelSets | None, MeanFieldResult]:
    """Run the mean field on tiles, or in the mask's box for all labels, or regions.

    Return the labels that took part in tiles, too; None without tiles.
    """
    context = case.context
    if prepared.problem is not None:
        if len(prepared.logits):
            # Logits in memory were checked to fit before they were read; tiles take little beside
            # them, and slabs would change the result.
            context = replace(context, num_bytes=None, take=NO_CONTEXT.take)
        return solve(prepared.problem, backend, context)

    values = prepared.logits
    if prepared.box is not None:
        values = values[(slice(None), *prepared.box)]
    needed = values.size * RUN_BYTES
    num_bytes = context.num_bytes
    if backend.name == "cpu" and needed > SMALL:
        if num_bytes is not None and needed > num_bytes:
            raise CapacityError(
                f"the case needs about {format_size(needed)} beyond what is in memory already; "
                f"{format_size(max(0, num_bytes))} are left; allow more memory (--max-memory), or "
                "use a mask or a smaller region"
            )
        context.take(needed)
    if prepared.is_probability:
        values = np.array(values, order="C")
        take_logarithms(values)
    if case.regions is not None:
        return None, region_mean_field(backend, values, prepared.image, case.model, context)
    return None, backend.mean_field(values, prepared.image, case.model, context)


def region_mean_field(
    backend: Backend,
    log_odds: Float32,
    image: GridImage,
    model: ModelSpec,
    context: RunContext,
) -> MeanFieldResult:
    """Run the binary mean field of each region, with the logits 0 outside and log-odds inside.

    The log-odds are (R, *grid). Outside the mask the input is divided by the temperature.
    """
    values = image.values.astype(np.float32, copy=False)
    guide = replace(image, values=values)
    kernels = backend.kernels(guide, model.kernels, context)
    del guide, image, values
    refined = np.empty(log_odds.shape, dtype=np.float32)
    binary = np.zeros((2, *log_odds.shape[1:]), dtype=np.float32)
    reports: list[MeanFieldReport] = []
    timings: dict[str, float] = {}
    for region, run_of_region in enumerate(model.regions):
        binary[1] = log_odds[region]
        progress = of_part(context.progress, region, len(model.regions))
        is_last = region == len(model.regions) - 1
        outcome = kernels.run(binary, run_of_region, progress=progress, is_last=is_last)
        outside, inside = outcome.logits
        np.subtract(inside, outside, out=refined[region])
        reports.append(outcome.report)
        for stage, seconds in outcome.timings.items():
            # The kernels were built once, and each run reports that.
            earlier = 0.0 if stage == "build" else timings.get(stage, 0.0)
            timings[stage] = earlier + seconds
    # The most steps of a region, and the sum of energies, the last one where steps ended.
    num_iterations = max(report.num_iterations for report in reports)
    energies = []
    for report in reports:
        missing = num_iterations - len(report.energy)
        energies.append(report.energy + report.energy[-1:] * missing)
    energy = tuple(sum(of_step) for of_step in zip(*energies, strict=False))
    converged = all(report.converged for report in reports)
    report = MeanFieldReport(num_iterations, converged, energy, reports[0].filters)
    return MeanFieldResult(refined, report, timings)
