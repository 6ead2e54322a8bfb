"""Volumes beyond the memory of an engine, in slabs of planes, each with as many planes around it as messages can cross."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.engines.base import MeanFieldReport, MeanFieldResult
from crfrefine.engines.grid_image import default_origin
from crfrefine.errors import CapacityError

if TYPE_CHECKING:
    from crfrefine.base.array_types import Bool, Float32
    from crfrefine.engines.base import Progress
    from crfrefine.engines.grid_image import GridImage
    from crfrefine.parameters.specs import ModelSpec

HEIGHT = 8
"""Planes; the heights of slabs and of their surroundings are multiples of it, as those of tiles."""

_MAX_SHORTAGE = 2.0
"""A shortage is known for one stage at a time, after the earlier stages have their memory: slabs shrink by at most this factor at once."""


@dataclass(frozen=True)
class Slab:
    """Planes of a volume."""

    start: int  # the first plane
    stop: int  # the end of the planes
    first: int  # the first plane that takes part in the computation
    last: int  # the end of those

    @property
    def extent(self) -> int:
        """Planes that take part."""
        return self.last - self.first


Run = Callable[["Float32", "GridImage", "Sequence[ModelSpec]"], MeanFieldResult]
"""Runs the mean field at once on (L, *grid) logits of labels, or log-odds of regions, each with a model of the same kernels."""


def halo_planes(num_iterations: int, reach: int) -> int:
    """Return the number of planes on each side that the result of a plane can depend on, a multiple of HEIGHT.

    In each step messages come from within the reach, and their normalization from within the reach of those who send.
    """
    return math.ceil((num_iterations + 1) * reach / HEIGHT) * HEIGHT


def cuts(num_planes: int, halo: int, fewest: int = 1) -> Iterator[list[Slab]]:
    """Yield the ways to cut a volume into slabs of equal height, whose last one may be lower; the fewest slabs come first."""
    rows = math.ceil(num_planes / HEIGHT)
    for count in range(fewest, rows + 1):
        height = math.ceil(rows / count) * HEIGHT
        starts = range(0, num_planes, height)
        yield [Slab(s, min(s + height, num_planes), max(0, s - halo), min(s + height + halo, num_planes)) for s in starts]


def run_in_slabs(
    run: Run, values: Float32, image: GridImage, models: Sequence[ModelSpec], error: tuple[str, float], progress: Progress | None = None
) -> tuple[MeanFieldResult, str]:
    """Run the mean field on a volume that does not fit into an engine's memory at once, in as few slabs as do.

    Each slab takes all steps, because convergence would have to be judged for all slabs together; there is no energy either. `error` has
    message and shortage of the whole volume's failure, as `run` raises for a slab that does not fit.

    Returns:
        (L, *grid), and a sentence for the user.

    Raises:
        CapacityError: not even a slab of HEIGHT planes fits, or the volume cannot be cut.
    """
    message, shortage = error
    if any(model.mean_field.volume_weight > 0.0 for model in models):
        raise CapacityError(f"volume.weight above 0 needs the whole volume at once, and {message}")
    num_planes = values.shape[1]
    num_iterations = max(model.mean_field.num_iterations for model in models)
    reach = models[0].kernels.reach(image.spacing, values.shape[1:])[0]
    halo = halo_planes(num_iterations, reach)
    models = [replace(model, mean_field=replace(model.mean_field, tolerance=0.0)) for model in models]
    image = replace(image, origin=image.origin or default_origin(image))
    extent = num_planes
    while True:
        slabs = _smaller(num_planes, halo, extent, shortage)
        if num_planes <= HEIGHT:
            raise CapacityError(f"the case has {num_planes} planes along the slowest axis of its array, too few to be cut: {message}")
        if slabs is None:
            raise CapacityError(
                f"not even slabs of {HEIGHT} of the {num_planes} planes fit, each with up to {halo} more on either side: {num_iterations} "
                f"steps with kernels that reach {reach} planes depend on these; {message}"
            )
        try:
            result = _run(run, values, image, models, slabs, progress)
        except CapacityError as found:
            if found.shortage <= 0.0:
                raise
            # The error itself would keep the memory of the stopped run.
            message, shortage = str(found), found.shortage
        else:
            return result, _describe(slabs, num_iterations, result)
        extent = max(slab.extent for slab in slabs)


def _smaller(num_planes: int, halo: int, extent: int, shortage: float) -> list[Slab] | None:
    """Return as few slabs as may fit where those of some extent do not; None if no smaller slabs exist."""
    target = extent / min(max(shortage, 1.0), _MAX_SHORTAGE)
    slabs: list[Slab] = []
    for slabs in cuts(num_planes, halo, 2):
        if max(slab.extent for slab in slabs) < min(target, extent):
            return slabs
    return slabs if slabs and max(slab.extent for slab in slabs) < extent else None


def _run(
    run: Run, values: Float32, image: GridImage, given: Sequence[ModelSpec], slabs: Sequence[Slab], progress: Progress | None
) -> MeanFieldResult:
    """Run slab by slab, that with the most voxels first: if it fits, so do most others, and it chooses the filter of "auto" for all."""
    out = np.empty(values.shape, np.float32)
    report: MeanFieldReport | None = None
    timings: dict[str, float] = {}
    names: set[tuple[str, ...]] = set()
    models = given
    for number, slab in enumerate(sorted(slabs, key=lambda slab: -_num_voxels(image.mask, slab))):
        if progress is not None:
            progress("slab", number, len(slabs))
        own = slice(slab.start, slab.stop)
        if image.mask is not None and not image.mask[own].any():
            np.multiply(values[:, own], np.float32(1.0) / np.float32(models[0].mean_field.temperature), out=out[:, own])
            continue
        part = np.ascontiguousarray(values[:, slab.first : slab.last]), image.planes(slab.first, slab.last)
        is_fixed = models[0].kernels.filter != given[0].kernels.filter
        found = (_run_fixed(run, *part, models) if is_fixed else None) or run(*part, given)
        out[:, own] = found.logits[:, slab.start - slab.first : slab.stop - slab.first]
        report = report or found.report
        names.add(tuple(line.split()[1] for line in found.report.filters if line.startswith("bilateral")))
        for stage, seconds in found.timings.items():
            timings[stage] = timings.get(stage, 0.0) + seconds
        models = [_with_filter(model, names) for model in models]
    assert report is not None  # The mask is not empty.
    told = tuple(f"{line}, in {len(slabs)} slabs" + ("" if len(names) == 1 else ", not all with this filter") for line in report.filters)
    return MeanFieldResult(out, MeanFieldReport(report.num_iterations, False, (), told), timings)


def _run_fixed(run: Run, values: Float32, image: GridImage, models: Sequence[ModelSpec]) -> MeanFieldResult | None:
    """Run with the filter that another slab has chosen; None if that filter cannot be used on this slab."""
    try:
        return run(values, image, models)
    except CapacityError as error:
        if error.shortage > 0.0:
            raise
    return None


def _num_voxels(mask: Bool | None, slab: Slab) -> int:
    return slab.extent if mask is None else int(np.count_nonzero(mask[slab.first : slab.last]))


def _with_filter(model: ModelSpec, names: set[tuple[str, ...]]) -> ModelSpec:
    """Return the model with the filter that all appearance kernels of the slabs before have; as it is if these differ."""
    found = {name for of_slab in names for name in of_slab}
    if model.kernels.filter != "auto" or len(found) != 1:
        return model
    return replace(model, kernels=replace(model.kernels, filter=found.pop()))


def _describe(slabs: Sequence[Slab], num_iterations: int, result: MeanFieldResult) -> str:
    filters = ""
    if any(line.endswith("not all with this filter") for line in result.filters):
        filters = "; the filters of mean_field.filter = 'auto' differ between them: name one, or there may be seams"
    return (
        f"the case does not fit into the device's memory at once: refined in {len(slabs)} slabs of {slabs[0].stop} planes, "
        f"with all {num_iterations} steps, and without an energy{filters}"
    )
