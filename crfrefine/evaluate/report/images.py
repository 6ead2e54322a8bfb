"""The images of a case that the pictures of the page show, on the grid of the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from crfrefine import io
from crfrefine.arrays.nan_voxels import leave_out_nan
from crfrefine.arrays.resampling import resample_image
from crfrefine.base.array_types import Float32
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.label_options import REFERENCE
from crfrefine.base.notes import Note, NoteKind
from crfrefine.cases.roles import (
    modalities_of,
    require_images,
    require_other_labels,
)
from crfrefine.errors import CrfRefineError
from crfrefine.evaluate.measured import CasePair
from crfrefine.evaluate.reference import Reference
from crfrefine.io.streams import allocate_array


def read_images(
    pair: CasePair,
    reference: Reference,
    tell: Callable[[Note], object],
) -> tuple[list[Float32], list[str]]:
    """Return the modalities of a case, each (x, y, z), on the reference's grid, and their names.

    Voxels that are NaN get the lowest intensity, like background. `tell` is called with a note on
    each file that cannot be read, and the others are returned.
    """
    channels = []
    names = []
    paths = pair.reference.images
    modalities = pair.reference.modalities
    for number, path in enumerate(paths):
        nan_files: list[Path] = []
        try:
            header = io.placed_on(io.read_header(path, io.VOLUME_SUFFIXES), reference.header)
            reference.check(header, "image")
            values = io.read_channels(header, nan_files=nan_files)
            found = modalities_of(pair.reference, number, values)
            path_of_reference = reference.volume.header.path
            require_other_labels(found, reference.volume.data.T, REFERENCE, path_of_reference)
            require_images(pair.reference, found, [])
            # Voxels outside the file's own grid are NaN.
            shape = (len(values), *reference.header.grid_shape[::-1])
            if reference.header.on_same_grid(header):
                placed = values.reshape(shape)
            else:
                work = reference.work
                placed = allocate_array(shape, header.path)
                outside = "are the lowest intensity"
                reference.notes.extend(work.describe(header, "image", outside))
                resample_image(work.map_to(header), values, placed)
            if np.isnan(placed).any():
                leave_out_nan(placed, None, path)
        except (CrfRefineError, OSError) as error:
            missing = "its image" if len(paths) == 1 else path.name
            problem = str(error)
            tell(NoteKind.SHOWN_WITHOUT(case=pair.case_id, missing=missing, problem=problem))
            continue
        # A single file may hold all modalities.
        for modality, channel in enumerate(reverse_grid(placed), start=number):
            channels.append(np.atleast_3d(channel))
            name = f"modality {modality + 1}"
            if modality < len(modalities):
                name = modalities[modality]
            names.append(name)
    return channels, names
