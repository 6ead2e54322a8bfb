"""The modalities of a case as one array, on the grid of the first one.

Modalities on another grid are interpolated linearly, and are NaN outside of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from crfrefine.arrays.resampling import resample_image
from crfrefine.base.array_types import Array, Bool, Float32
from crfrefine.base.limits import Job
from crfrefine.cases.content import evidence_of_labels
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.io.reading import NanFiles, read_array, reading_jobs
from crfrefine.io.streams import allocate_array
from crfrefine.io.volume import VolumeHeader


def are_on_one_grid(images: Sequence[VolumeHeader]) -> bool:
    """Return whether all modalities are on the grid of the first one."""
    return all(images[0].on_same_grid(image) for image in images[1:])


def modality_jobs(
    images: Sequence[VolumeHeader], nan_files: NanFiles, evidence: dict[int, str]
) -> tuple[Float32, list[Job]]:
    """Return an array for the modalities, (M, [z,] y, x), and a job per file that fills its part.

    The jobs may run together. Those that interpolate a modality add to the `evidence`, by its
    number, why its voxels are rather a label map, or "": that is gone afterwards.
    """
    if are_on_one_grid(images):
        return reading_jobs(images, nan_files)
    first = images[0]
    grid = WorkGrid(first)
    values = allocate_array((len(images), *first.stored_grid), first.path)
    jobs: list[Job] = []

    def read_onto(number: int, image: VolumeHeader) -> None:
        source = allocate_array(image.stored_shape, image.path)
        read_array(image, nan_files, source)
        evidence[number] = evidence_of_labels(source[0])
        resample_image(grid.map_to(image), source, values[number : number + 1])

    for number, image in enumerate(images):
        if first.on_same_grid(image):
            jobs.append(partial(read_array, image, nan_files, values[number : number + 1]))
        else:
            jobs.append(partial(read_onto, number, image))
    return values, jobs


def read_modalities(images: Sequence[VolumeHeader], nan_files: NanFiles = None) -> Array:
    """Return the modalities on one grid, (M, [z,] y, x), in the type of their pieces.

    It is float32 where types differ or values are scaled.
    """
    modalities = [read_array(header, nan_files) for header in images]
    if len(modalities) == 1:
        return modalities[0]
    types = {modality.dtype for modality in modalities}
    dtype = types.pop() if len(types) == 1 else np.dtype(np.float32)
    return np.concatenate(modalities, dtype=dtype, casting="unsafe")


def find_uncovered(images: Sequence[VolumeHeader]) -> Bool | None:
    """Return ([z,] y, x), True outside the grid of some modality; None if all cover the first."""
    first = images[0]
    uncovered: Bool | None = None
    for image in images[1:]:
        if first.on_same_grid(image):
            continue
        grid_map = WorkGrid(first).map_to(image)
        if grid_map.num_inside == grid_map.num_voxels:
            continue
        outside = ~grid_map.all_inside()
        uncovered = outside if uncovered is None else uncovered | outside
    if uncovered is None:
        return None
    return uncovered.reshape(first.stored_grid)
