"""The place of the file to write: that of its input, or as the user says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from crfrefine.base.axes import Axes
from crfrefine.base.geometry import describe_grid, orientation_codes, same_grid, spacing_of
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import shorten, text_of_sizes
from crfrefine.cases.frame import OF_FRAME, in_frame
from crfrefine.cases.grid_differences import explain_difference
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.convert.options import ConversionOptions
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.io.formats import FORMAT_OF_SUFFIX
from crfrefine.io.paths import holds_scores_alone, suffix_of
from crfrefine.io.volume import VolumeHeader


def with_place(
    header: VolumeHeader, like: VolumeHeader | None, options: ConversionOptions, notes: list[Note]
) -> tuple[VolumeHeader, VolumeHeader | None, VolumeHeader | None]:
    """Return the header of a file in the place that options or, for an array, plans give it.

    With it come the image whose grid the file gets, if any, and the label map with which an array
    over that image is to be compared, if there is one. `notes` gets sentences on the place. Raises
    GridMismatchError for --same-voxels with another number of voxels.
    """
    if like is None:
        if options.same_voxels or options.axes is not None:
            option = "--same-voxels" if options.same_voxels else "--axes"
            raise InputError(
                f"{header.path}: {option} refers to an image: name it with --like IMAGE"
            )
        return header, None, None
    if options.same_voxels:
        if not same_grid(header.grid_shape, None, like.grid_shape, None):
            raise GridMismatchError(
                f"{header.path}: --same-voxels: expected as many voxels as {like.path} has\n"
                f"{like.difference_from(header)}"
            )
        notes.append(NoteKind.SAME_VOXELS(header.path.name, image=like.path.name))
        affine, spacing = like.geometry()
        header = replace(
            header,
            grid_shape=like.grid_shape,
            affine=affine,
            spacing=spacing,
            qform=None,
            template=None,
        )
    if options.axes is not None:  # The array has its own grid.
        return with_axes(header, like, options.axes, options.align, notes), None, None
    compared = None
    if header.affine is None:
        header, compared = in_frame(header, like)
        notes += [note for note in header.notes if note.kind in OF_FRAME]
    return header, like, compared


def with_axes(
    header: VolumeHeader,
    like: VolumeHeader,
    axes: str,
    align: str | None,
    notes: list[Note],
) -> VolumeHeader:
    """Return the header of an array that is placed as an image, with axes that run as `axes` says.

    If its sizes are others, `align` names the common part with the image: the places of the
    first and last voxels ("centers"), or the field of view ("edges"); `notes` gets a sentence.
    """
    if header.affine is not None:
        raise InputError(
            f"{header.path}: --axes is for arrays without geometry, .npz and .npy; leave it out, "
            "this file says where its voxels lie"
        )
    shape = header.grid_shape
    affine = like.required_affine
    placed = affine.copy()
    sizes = []
    codes = orientation_codes(affine, like.num_axes)
    found = Axes.toward(axes, codes)
    if not len(found.sources) == len({*found.sources}) == len(axes) == len(shape):
        raise InputError(
            f"{like.path}: --axes {shorten(axes)}: expected a letter for each of the "
            f"{len(shape)} axes of the array, one each of L or R, P or A, and I or S; those of the "
            f"image run as {codes}"
        )
    for axis, source in enumerate(found.sources):
        step = affine[:3, source]
        size = like.grid_shape[source]
        if axis in found.mirrored:
            placed[:3, 3] += step * (size - 1)
            step = -step
        factor = size / shape[axis]
        if align != "edges" and shape[axis] > 1:
            factor = (size - 1) / (shape[axis] - 1)
        placed[:3, axis] = step * factor
        # Half of the distance between the ends of both is before the first voxel.
        placed[:3, 3] += step * (size - 1 - factor * (shape[axis] - 1)) / 2
        sizes.append(size)
    if tuple(sizes) != shape:
        if sorted(sizes) == sorted(shape):
            raise InputError(
                f"{header.path}: --axes {axes}: its axes are in another order: along these axes "
                f"{like.path.name} has {text_of_sizes(sizes)} voxels, the array has "
                f"{text_of_sizes(shape)}\n"
                "  The letters are those of x, y and z, and an .npz or .npy holds (label, z, y, x)."
            )
        common = "first and last voxels at those of"
        if align == "edges":
            common = "the field of view of"
        notes.append(
            NoteKind.PLACED_ARRAY(
                header.path.name,
                grid=describe_grid(shape, placed),
                common=common,
                image=like.path.name,
            )
        )
    return replace(header, affine=placed, spacing=spacing_of(placed, len(shape)))


def grid_to_write(
    header: VolumeHeader, like: VolumeHeader | None, target: Path, *, is_filled: bool
) -> VolumeHeader:
    """Return the header of the grid that a file to write gets: that of an image, or its input's.

    A plane becomes a volume of one slice if it has a place that only such a volume has in another
    format. Raises GridMismatchError as `require_grid` does, InputError if there is no geometry.
    """
    grid = header
    if like is not None:
        require_grid(header, like, is_filled=is_filled)
        grid = like
    if grid.affine is None or grid.spacing is None:
        if not holds_scores_alone(target):
            raise InputError(
                f"{header.path}: has no geometry, and {target.name} needs one; name the image it "
                "belongs to with --like IMAGE"
            )
        return grid
    if grid.num_axes != 3 and FORMAT_OF_SUFFIX[suffix_of(target)].name != grid.family:
        in_plane = np.array(grid.affine)
        in_plane[:2, :2] = np.eye(2)
        in_plane[:2, 3] = 0.0
        in_space = spacing_of(grid.affine)
        if in_space[2] > 0 and not np.array_equal(in_plane, np.eye(4)):
            return replace(grid, grid_shape=(*grid.grid_shape, 1), spacing=in_space)
    return grid


def require_grid(
    header: VolumeHeader, like: VolumeHeader, *, is_filled: bool, advice: str | None = None
) -> None:
    """Raise GridMismatchError if a file has another grid than that of --like.

    A label map (`is_filled`) may be stored for a part of it. Without advice the error explains how
    the grids differ, if that can be told.
    """
    if header.on_same_grid(like):
        return
    if is_filled and WorkGrid(like).part(header, "label map") is not None:
        return
    advice = advice or explain_difference(like, "image", header, "file")
    if advice is None:
        advice = (
            "convert does not interpolate, as the other commands do with --resample. "
            "Leave --like out to keep the file's own grid."
        )
    raise GridMismatchError(
        f"{header.path}: not on the grid of --like\n{header.difference_from(like)}\n  {advice}"
    )
