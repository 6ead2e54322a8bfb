"""Voxels whose intensity is NaN, as some tools write them outside of the body: they take no part.

They are left out of the mask, so the network's label stays there. The value in their place does not
matter: intensities are normalized inside the mask.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from crfrefine.arrays.label_maps import count_inside
from crfrefine.base.array_types import Array, Bool
from crfrefine.base.notes import NoteKind, Notes
from crfrefine.errors import InputError

MAX_SHARE = 0.99  # largest share of NaN in the mask


def leave_out_nan(
    image: Array, mask: Bool | None, name: str | Path, uncovered: Bool | None = None
) -> tuple[Bool, Bool, Notes]:
    """Return where no modality of an image is NaN, a mask without other voxels, and notes.

    The image, (M, *grid) floats, gets its lowest finite values in their place: they look like
    background in pictures. The mask is (*grid), or None for everywhere. `uncovered`, (*grid), is
    True outside the grid of a modality: these voxels are NaN, too, but no note is on them. Raises
    InputError, named after the image, if hardly any voxel of the mask is left.
    """
    is_nan: Bool = np.isnan(image[0])
    for modality in image[1:]:
        is_nan |= np.isnan(modality)
    not_nan: Bool = ~is_nan
    inside = not_nan
    num_voxels = count_inside(mask, is_nan.shape)
    where = ""
    if mask is not None:
        inside = not_nan & mask
        where = " of the mask"
    also = "" if uncovered is None else ", or outside the grid of a modality"

    num_left_out = num_voxels - np.count_nonzero(inside)
    if num_left_out > MAX_SHARE * num_voxels:
        raise InputError(
            f"{name}: {num_left_out} of {num_voxels} voxels{where} are NaN{also}; expected "
            "numbers inside the body\n"
            "  Voxels that are NaN take no part, and hardly any would be left. Export the image "
            "with numbers."
        )

    for modality in image:
        lowest = np.fmin.reduce(modality, axis=None)
        np.copyto(modality, lowest, where=is_nan)
    if uncovered is not None:
        is_nan &= ~uncovered
    num_nan = int(np.count_nonzero(is_nan))
    notes: Notes = ()
    if num_nan:
        share = num_nan / is_nan.size
        notes = (NoteKind.NAN_VOXELS(nan=num_nan, voxels=is_nan.size, share=share),)
    return not_nan, inside, notes
