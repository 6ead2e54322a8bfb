"""Volumes and their headers; the geometry of their grids is in `crfrefine.base.geometry`, reading and writing files in `crfrefine.io`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from crfrefine.base.geometry import describe_difference, orientation_codes, same_grid, same_shape
from crfrefine.errors import InputError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from crfrefine.base.axes import Reorientation
    from crfrefine.io.decode import VoxelStream
    from crfrefine.io.segments import Segment
    from crfrefine.io.source import VoxelSource

FileState: TypeAlias = tuple[Path, int, int, int]
"""A file, and what changes with its content: the number of its inode, its bytes, the nanosecond of its last change."""


class RareHeaderError(Exception):
    """A header with something that few files have: SimpleITK reads the file."""


@dataclass(frozen=True)
class VolumeHeader:
    """The header of a volume: everything but the voxels."""

    path: Path  # the file
    format: str  # for people, such as "NIfTI-1, gzip"
    grid_shape: tuple[int, ...]  # voxels along x, y(, z)
    num_channels: int  # 1 for a scalar volume
    dtype: str  # the type as stored, such as "int16"
    spacing: tuple[float, ...] | None  # mm, one per grid axis; None if the file has no geometry
    affine: NDArray[np.float64] | None  # (4, 4) voxel to world RAS+ mm; None if the file has no geometry
    template: Any = field(default=None, repr=False)  # format-specific; lets the writer restore properties that an affine cannot express
    notes: tuple[str, ...] = ()  # facts that users should know, such as two geometries that disagree
    family: str = ""  # name of the format in the table of `crfrefine.io.formats`
    kind: str | None = None  # "logits" or "probabilities" if the file declares it
    details: tuple[tuple[str, str], ...] = ()  # further facts to show, as pairs of name and value
    misnamed: str | None = None  # the format it was read as, if its name says something else
    segments: tuple[Segment, ...] = ()  # names and colors of the labels, if the file has them
    # The header of the file itself, and how its axes become those of this one, if they were turned.
    turned: tuple[VolumeHeader, Reorientation] | None = field(default=None, repr=False)
    # The place of the voxels, if they are stored as they are, perhaps compressed; None if they have to be put together.
    source: VoxelSource | None = field(default=None, repr=False)
    # Of the file and of those with its voxels when the header was read.
    states: tuple[FileState, ...] = field(default=(), repr=False, compare=False)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Facts that users should know: a misleading file name, if it is one, and the notes."""
        return self.notes if self.misnamed is None else (self.misnamed, *self.notes)

    @property
    def turning(self) -> str:
        """How the axes of the file are turned to another grid, for notes; empty if they are not."""
        if self.turned is None:
            return ""
        return f"voxel axes turned from {self.turned[0].orientation} to {self.orientation}, without interpolation"

    @property
    def orientation(self) -> str | None:
        """The world directions of the grid's axes, such as "LPS"; None if the file has no geometry."""
        return None if self.affine is None else orientation_codes(self.affine, len(self.grid_shape))

    def geometry(self) -> tuple[NDArray[np.float64], tuple[float, ...]]:
        """Return affine and spacing; raise InputError for a file without them."""
        if self.affine is None or self.spacing is None:
            raise InputError(f"{self.path}: {self.format} has no geometry; expected a volume with an affine")
        return self.affine, self.spacing

    def on_same_grid(self, other: VolumeHeader) -> bool:
        """Return whether both are on the same grid; a file without geometry is compared by its shape."""
        if self.affine is None or other.affine is None:
            return same_shape(self.grid_shape, other.grid_shape)
        return same_grid(self.grid_shape, self.affine, other.grid_shape, other.affine)

    def difference_from(self, other: VolumeHeader) -> str:
        """Describe how the grids of both differ, a line each."""
        return describe_difference(self.path, self.grid_shape, self.affine, other.path, other.grid_shape, other.affine)


@dataclass(frozen=True)
class Volume:
    """Voxels on a grid."""

    data: NDArray[Any]  # (*grid), or (channels, *grid)
    affine: NDArray[np.float64]  # (4, 4) voxel to world RAS+ mm; for a 2-D grid, the third column and row are those of a slice 1 mm thick
    spacing: tuple[float, ...]  # mm, one per grid axis
    path: Path | None = None  # the file it came from, if any
    header: VolumeHeader | None = field(default=None, repr=False)  # the header of its file; None for a volume made in memory

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Voxels along each grid axis."""
        return self.data.shape[self.data.ndim - len(self.spacing) :]

    @property
    def channels(self) -> NDArray[Any]:
        """The data as (channels, *grid), a view."""
        return self.data if self.data.ndim > len(self.spacing) else self.data[np.newaxis]


def open_voxels(header: VolumeHeader) -> AbstractContextManager[VoxelStream]:
    """Open the file with the voxels at the first one: of formats that store them as they are, perhaps compressed."""
    assert header.source is not None
    return header.source.stream()
