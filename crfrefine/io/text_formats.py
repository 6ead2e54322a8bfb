"""The common part of MetaImage and NRRD: a text header, then voxels. Code of this folder reads every byte of them.

ITK's libraries crash on damaged headers, and return damaged voxels without an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.base.geometry import is_sheared, require_usable, spacing_of
from crfrefine.errors import CrfRefineError, InputError, UnsupportedFormatError
from crfrefine.io.text_header import shown
from crfrefine.io.volume import RareHeaderError, VolumeHeader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.source import VoxelSource
    from crfrefine.io.volume import Volume

OUTSIDE_FILES = "CRFREFINE_OUTSIDE_FILES"

LPS = (-1.0, -1.0, 1.0)
"""Signs that turn left, posterior, superior into RAS+, the convention of all affines here."""

GeometryLines = Callable[["NDArray[np.float64]", "NDArray[np.float64]", tuple[float, ...]], tuple[str, ...]]
"""From direction, origin and spacing in LPS to the lines that place a grid."""


def volume_header(
    format_name: str, grid: tuple[tuple[int, ...], int], affine: NDArray[np.float64], lines: tuple[str, ...], source: VoxelSource
) -> VolumeHeader:
    """Return the contents of a text header, not yet checked, of a grid (shape, channels).

    The lines place it in the world, as in the file; they become the template, and are empty if another file could not use them.
    """
    grid_shape, num_channels = grid
    return VolumeHeader(
        path=source.header_path,
        format=format_name,
        grid_shape=grid_shape,
        num_channels=num_channels,
        dtype=source.dtype.name,
        spacing=spacing_of(affine, len(grid_shape)),
        affine=affine,
        template=lines,
        source=source,
    )


def checked(header: VolumeHeader) -> VolumeHeader:
    """Return a header after a check of its geometry and of the file with voxels.

    Raises:
        UnsupportedFormatError: damaged, or the file is cut off.
        InputError: the file with the voxels is missing, or the geometry is not usable.
    """
    assert header.source is not None
    header.source.check()
    require_usable(header.geometry()[0], len(header.grid_shape), header.path)
    return header


def detached_voxels(parse: Callable[[Path], VolumeHeader], path: Path) -> tuple[Path, ...]:
    """Return the separate file with the voxels of a header; empty without one, or if the header cannot be read."""
    try:
        with np.errstate(all="ignore"):
            source = parse(path).source
    except (CrfRefineError, RareHeaderError):
        return ()  # Reading the file reports the error.
    return () if source is None or source.path == source.header_path else (source.path,)


def voxel_path(header_path: Path, name: str, *, is_compressed: bool) -> Path:
    """Return the file that a header names, relative to its folder.

    Raises:
        RareHeaderError: the name means several files: a list, or a pattern with a running number.
        InputError: the file is outside the folder, and CRFREFINE_OUTSIDE_FILES forbids that; so it does for several files.
        UnsupportedFormatError: several files that are compressed, whose checksums SimpleITK would not compare.
    """
    several = "%" in name or name.upper().split()[:1] == ["LIST"]
    rule = os.environ.get(OUTSIDE_FILES, "allow")
    if rule not in ("allow", "refuse"):
        raise InputError(f"environment variable {OUTSIDE_FILES}: expected allow or refuse, found {shown(rule)!r}")
    path = header_path.parent / name
    if rule == "refuse":
        folders = {header_path.parent.resolve(), header_path.resolve().parent}
        if several or not any(folder in path.resolve().parents for folder in folders):
            where = "several files" if several else f"{shown(str(path), 200)}, outside its folder"
            raise InputError(f"{header_path}: its voxels are in {where}, and {OUTSIDE_FILES} is set to refuse")
    if several and is_compressed:
        raise UnsupportedFormatError(f"{header_path}: compressed voxels in several files; expected raw ones, or one file")
    if several:
        raise RareHeaderError("voxels in several files")
    return path


def grid_and_channels(path: Path, sizes: tuple[int, ...], num_channels: int) -> tuple[tuple[int, ...], int]:
    """Split dimensions into grid and channels: a fourth dimension means channels if a voxel has one value; raise if ambiguous."""
    if 2 <= len(sizes) <= 3:
        return sizes, num_channels
    if len(sizes) != 4 or num_channels > 1:
        raise UnsupportedFormatError(
            f"{path}: {len(sizes)} dimensions with {num_channels} values per voxel cannot be split into grid and channels"
        )
    return sizes[:3], sizes[3]


def affine_of(vectors: NDArray[np.float64], origin: NDArray[np.float64], signs: tuple[float, ...]) -> NDArray[np.float64]:
    """Return the affine to RAS+ of 2 or 3 axes, whose vectors are the columns; `signs` turns their space into RAS+."""
    num_axes = len(origin)
    affine = np.eye(4)
    affine[:num_axes, :num_axes] = vectors
    affine[:num_axes, 3] = origin
    return np.diag([*signs, 1.0]) @ affine + 0.0  # Adding zero turns -0 into 0.


def lines_to_write(path: Path, like: Volume, format_name: str, geometry_lines: GeometryLines) -> tuple[str, ...]:
    """Return the lines that place a grid: those of its header if it has the same format, else new ones, if it can hold the grid."""
    num_axes = len(like.spacing)
    if num_axes not in (2, 3):
        raise UnsupportedFormatError(f"{path}: {num_axes}-D grids can only be written to NIfTI")
    own: tuple[str, ...] = like.header.template if like.header is not None and like.header.format == format_name else ()
    if own:
        return own
    if is_sheared(like.affine):
        raise UnsupportedFormatError(
            f"{path}: this format cannot hold the sheared axes of {like.path or 'the volume'}; write NIfTI (.nii.gz) instead"
        )
    lps = np.diag([*LPS, 1.0]) @ like.affine + 0.0  # Adding zero turns -0 into 0.
    spacing = spacing_of(like.affine, num_axes)
    return geometry_lines(lps[:num_axes, :num_axes] / np.array(spacing), lps[:num_axes, 3], spacing)
