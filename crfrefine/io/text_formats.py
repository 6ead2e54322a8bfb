"""The common part of MetaImage and NRRD: a text header, then voxels. Code of this folder reads every byte of them.

ITK's libraries crash on damaged headers, and return damaged voxels without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.errors import CrfRefineError, UnsupportedFormatError
from crfrefine.io.geometry import require_usable
from crfrefine.io.source import VoxelSource
from crfrefine.io.volume import VolumeHeader, is_sheared, spacing_of
from crfrefine.io.voxel_stream import VoxelStream

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.io.volume import Volume
    from crfrefine.io.world import TextHeader

GeometryLines = Callable[["NDArray[np.float64]", "NDArray[np.float64]", tuple[float, ...]], tuple[str, ...]]
"""From direction, origin and spacing in LPS to the lines that place a grid."""


@dataclass(frozen=True)
class TextTemplate:
    """The contents of a text header beyond the grid.

    Attributes:
        geometry: the lines that place its grid in the world, as they stand in the file.
        source: the place of its voxels.
    """

    geometry: tuple[str, ...]
    source: VoxelSource


def volume_header(path: Path, header: TextHeader, format_name: str) -> VolumeHeader:
    """Return the contents of a text header, after a check of its geometry and of the files with voxels.

    Raises:
        UnsupportedFormatError: a file is cut off.
        InputError: the file with the voxels is missing, or the geometry is not usable.
    """
    header.source.check()
    num_axes = len(header.grid_shape)
    require_usable(header.affine, num_axes, path)
    return VolumeHeader(
        path=path,
        format=format_name,
        grid_shape=header.grid_shape,
        num_channels=header.num_channels,
        dtype=header.source.dtype.name,
        spacing=spacing_of(header.affine, num_axes),
        affine=header.affine,
        template=TextTemplate(header.geometry, header.source),
    )


def detached_voxels(parse: Callable[[Path], TextHeader], path: Path) -> tuple[Path, ...]:
    """Return the separate files with the voxels of a header; none if there are none, or the header cannot be read."""
    try:
        return parse(path).source.detached
    except CrfRefineError:
        return ()  # Reading the file reports the error.


def open_voxels(header: VolumeHeader) -> AbstractContextManager[VoxelStream]:
    """Open the file with the voxels at the first one; where channels stand is in the header."""
    source: VoxelSource = header.template.source
    return source.stream()


def lines_to_write(path: Path, like: Volume, format_name: str, geometry_lines: GeometryLines) -> tuple[str, ...]:
    """Return the lines that place a grid: those of the volume's own header if it has the same format, else new ones.

    Raises:
        UnsupportedFormatError: sheared axes, which these formats cannot hold or ITK rejects, or a number of axes other than two or three.
    """
    num_axes = len(like.spacing)
    if num_axes not in (2, 3):
        raise UnsupportedFormatError(f"{path}: {num_axes}-D grids can only be written to NIfTI")
    own: tuple[str, ...] = like.header.template.geometry if like.header is not None and like.header.format == format_name else ()
    return own or geometry_lines(*_world_lps(path, like))


def _world_lps(path: Path, like: Volume) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[float, ...]]:
    """Return (direction, origin, spacing) in LPS, one column of the direction per grid axis."""
    if is_sheared(like.affine):
        raise UnsupportedFormatError(
            f"{path}: this format cannot hold the sheared axes of {like.path or 'the volume'}; write NIfTI (.nii.gz) instead"
        )
    num_axes = len(like.spacing)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ like.affine + 0.0  # Adding zero turns -0 into 0.
    spacing = spacing_of(like.affine, num_axes)
    return lps[:num_axes, :num_axes] / np.array(spacing), lps[:num_axes, 3], spacing
