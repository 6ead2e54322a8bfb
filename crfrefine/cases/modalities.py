"""The modalities of a case as one array, on the grid of the first one.

Modalities on another grid are interpolated linearly, and are NaN outside of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from crfrefine.arrays.resampling import resample_image
from crfrefine.base.array_types import Array, Bool
from crfrefine.base.limits import Job
from crfrefine.cases.content import evidence_of_labels
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.io.reading import NanFiles, read_array, reading_jobs
from crfrefine.io.streams import allocate_array
from crfrefine.io.volume import VolumeHeader


def modality_jobs(
    images: Sequence[VolumeHeader],
    nan_files: NanFiles,
    evidence: dict[int, str],
    *,
    keeps_type: bool,
) -> tuple[Array, list[Job]]:
    """Return an array for the modalities, (M, [z,] y, x), and a job per file that fills its part.

    The jobs may run together. On one grid, `keeps_type` is as of `reading_jobs`. Jobs that
    interpolate a modality add to the `evidence`, by its number, why its voxels are rather a label
    map, or "": that is gone afterwards.
    """
    first = images[0]
    elsewhere = [number for number, image in enumerate(images) if not first.on_same_grid(image)]
    values, jobs = reading_jobs(images, nan_files, keeps_type=keeps_type and not elsewhere)

    def read_onto(number: int) -> None:
        image = images[number]
        source = read_array(image, nan_files, allocate_array(image.stored_shape, image.path))
        evidence[number] = evidence_of_labels(source[0])
        grid_map = WorkGrid(first).map_to(image)
        resample_image(grid_map, source, values[number : number + 1])

    for number in elsewhere:
        jobs[number] = partial(read_onto, number)
    return values, jobs


def find_uncovered(images: Sequence[VolumeHeader]) -> Bool | None:
    """Return ([z,] y, x), True outside the grid of some modality; None if all cover the first."""
    first = images[0]
    uncovered: Bool | None = None
    for image in images[1:]:
        if first.on_same_grid(image):
            continue
        grid_map = WorkGrid(first).map_to(image)
        if grid_map.num_inside < grid_map.num_voxels:
            outside = ~grid_map.all_inside().reshape(first.stored_grid)
            uncovered = outside if uncovered is None else uncovered | outside
    return uncovered
