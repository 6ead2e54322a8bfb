"""Volumes, their headers, their segments, and voxels to be written."""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.array_types import Array, Float64, NamesOfLabels, Shape, Spacing
from crfrefine.base.axes import Axes
from crfrefine.base.colors import LABEL_COLORS, shares_of
from crfrefine.base.geometry import (
    describe_difference,
    describe_grid,
    is_sheared,
    orientation_codes,
    same_grid,
    spacing_of,
    usable_spacing,
)
from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import shorten
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.streams import VoxelSource


class RareHeaderError(Exception):
    """A valid header that only SimpleITK reads; the message names the reason."""

    def __init__(self, reason: str, time: str, voxel_files: tuple[Path, ...]) -> None:
        super().__init__(reason)
        # As of `VolumeHeader`: SimpleITK does not tell them.
        self.time = time
        self.voxel_files = voxel_files


@dataclass(frozen=True)
class VolumeHeader:
    """The header of a volume: everything but the voxels."""

    path: Path  # the file
    # for people, such as "NIfTI-1, gzip"; of MetaImage and NRRD, `text_header` compares it, too
    format: str
    grid_shape: Shape  # voxels along x, y(, z)
    num_channels: int  # 1 for a scalar volume
    dtype: str  # the type as stored, such as "int16"
    spacing: Spacing | None  # mm, one per grid axis; None if the file has no geometry
    # (4, 4) voxel to world RAS+ mm; None if the file has no geometry
    affine: Float64 | None
    # The qform of a NIfTI file, (4, 4) as the affine, if it puts voxels elsewhere than its sform
    qform: Float64 | None = field(default=None, repr=False)
    # format-specific; lets the writer restore properties that an affine cannot express
    template: Any = field(default=None, repr=False)
    # facts that users should know, such as two geometries that disagree
    notes: tuple[Note, ...] = ()
    family: str = ""  # name of the format in the table of `crfrefine.io.formats`
    # the header's time between the channels, such as "0.05 s apart"; "" if nothing
    time: str = ""
    kind: str | None = None  # "logits" or "probabilities" if the file declares it
    details: tuple[tuple[str, str], ...] = ()  # further facts to show, as pairs of name and value
    segments: Segments = ()  # names and colors of the labels, if the file has them
    # The header of the file itself, and how its axes become those of this one, if they were turned.
    turned: tuple[VolumeHeader, Axes] | None = field(default=None, repr=False)
    # A note on that, unless it is only the order of an array, which has no directions.
    turning: Note | None = field(default=None, repr=False)
    # The place of the voxels, if they are stored as they are, perhaps compressed; None if they have
    # to be put together.
    source: VoxelSource | None = field(default=None, repr=False)
    # the files with its voxels, if these are others
    voxel_files: tuple[Path, ...] = field(default=(), repr=False)
    # the states of its files when the header was read
    states: Mapping[Path, os.stat_result] = field(default_factory=dict, repr=False, compare=False)

    @property
    def misnamed(self) -> Note | None:
        """The note on the format, if the name says something else."""
        for note in self.notes:
            if note.kind in (NoteKind.OTHER_FORMAT, NoteKind.COMPRESSED, NoteKind.NOT_COMPRESSED):
                return note
        return None

    @property
    def kept_type(self) -> np.dtype[Any]:
        """The type in which its voxels are read if they need not become float32."""
        source = self.source or VoxelSource(self.path, "raw", np.dtype(self.dtype))
        return source.kept_type

    @property
    def num_axes(self) -> int:
        """The number of axes of the grid."""
        return len(self.grid_shape)

    @property
    def num_voxels(self) -> int:
        """The number of voxels of the grid."""
        return math.prod(self.grid_shape)

    @property
    def stored_shape(self) -> Shape:
        """(channels, [z,] y, x)."""
        return (self.num_channels, *self.stored_grid)

    @property
    def stored_grid(self) -> Shape:
        """([z,] y, x)."""
        return self.grid_shape[::-1]

    @property
    def orientation(self) -> str | None:
        """World directions of the axes, such as "LPS"; None if the file has no geometry."""
        if self.affine is None:
            return None
        return orientation_codes(self.affine, self.num_axes)

    def geometry(self) -> tuple[Float64, Spacing]:
        """Return affine and spacing; raise InputError for a file without them."""
        if self.affine is None or self.spacing is None:
            raise InputError(
                f"{self.path}: {self.format} has no geometry; expected a volume with an affine"
            )
        return self.affine, self.spacing

    @property
    def required_affine(self) -> Float64:
        """The affine; raises as `geometry`."""
        return self.geometry()[0]

    def on_same_grid(self, other: VolumeHeader) -> bool:
        """Return whether both are on one grid; without geometry, the shapes are compared."""
        return same_grid(self.grid_shape, self.affine, other.grid_shape, other.affine)

    def describe_grid(self) -> str:
        """Describe the grid for messages, such as "240×240×155, 1.00×1.00×1.00 mm"."""
        return describe_grid(self.grid_shape, self.affine)

    def difference_from(self, other: VolumeHeader) -> str:
        """Describe how the grids of both differ, a line each."""
        return describe_difference(
            (self.path, self.grid_shape, self.affine), (other.path, other.grid_shape, other.affine)
        )


class Volume(NamedTuple):
    """Voxels on a grid."""

    data: Array  # (*grid), or (channels, *grid)
    # (4, 4) voxel to world RAS+ mm; for a 2-D grid, the third column and row are those of a slice 1
    # mm thick
    affine: Float64
    spacing: Spacing  # mm, one per grid axis
    header: VolumeHeader  # that of its file


def header_of_grid(
    grid_shape: Shape, affine: Float64, path: Path = Path("the volume")
) -> VolumeHeader:
    """Return the header of a grid in memory, on which a file is to be written.

    Errors call it by the `path`, as that of the file that it is made of.
    """
    spacing = spacing_of(affine, len(grid_shape))
    return VolumeHeader(path, "", grid_shape, 1, "", spacing, affine)


def require_right_angles(path: Path, like: VolumeHeader) -> None:
    """Raise UnsupportedFormatError if the axes of the grid to write to a file are sheared."""
    if is_sheared(like.required_affine):
        raise UnsupportedFormatError(
            f"{path}: this format cannot hold the sheared axes of {like.path}; "
            "write NIfTI (.nii.gz) instead"
        )


class FileHeader(ABC):
    """The header of a file as it is stored: a format tells each fact, and they are put together."""

    path: Path
    has_tail = False  # whether other data follow the voxels
    # As of `VolumeHeader`; the methods may set them.
    format: str
    template: Any = None
    qform: Float64 | None = None
    notes: tuple[Note, ...] = ()
    details: tuple[tuple[str, str], ...] = ()
    kind: str | None = None

    @abstractmethod
    def grid(self) -> tuple[Shape, int]:
        """Return the voxels along each axis, and the number of channels."""

    @abstractmethod
    def source(self) -> VoxelSource:
        """Return the place of the voxels, which follow the header, or are in another file."""

    @abstractmethod
    def affine(self, grid_shape: Shape) -> Float64 | None:
        """Return the affine, voxel to world RAS+ mm; None if the file has no geometry."""

    @property
    def time(self) -> str:
        """The header's time between the channels; "" if nothing."""
        return ""

    def segments(self) -> Segments:
        """Return names and colors of the labels."""
        return ()

    def volume_header(self) -> VolumeHeader:
        """Check every field that is used, and return the header of the volume.

        Raise InputError or UnsupportedFormatError if the affine is not usable, or the file with the
        voxels is missing, or shorter than the header promises.
        """
        grid_shape, num_channels = self.grid()
        source = self.source()
        affine = self.affine(grid_shape)
        spacing = None
        if affine is not None:
            spacing = usable_spacing(affine, len(grid_shape), self.path)
        num_bytes = math.prod(grid_shape) * num_channels * source.dtype.itemsize
        source, surplus = source.in_file(num_bytes, self.path)
        notes = self.notes
        if surplus > 0 and not self.has_tail:
            notes = (*notes, NoteKind.BEHIND_VOXELS(surplus=surplus))
        return VolumeHeader(
            self.path,
            self.format,
            grid_shape,
            num_channels,
            source.dtype.name,
            spacing,
            affine,
            qform=self.qform,
            template=self.template,
            notes=notes,
            time=self.time,
            kind=self.kind,
            details=self.details,
            segments=self.segments(),
            source=source,
            voxel_files=() if source.path == self.path else (source.path,),
        )


_MAX_OF_A_STEM = 100  # characters
MAX_OF_A_NAME = 64  # Characters of a segment's name: DICOM holds no more.


@dataclass(frozen=True)
class Segment:
    """A label of a label map."""

    label: int  # its number in the label map, from 1
    name: str  # for people
    # (red, green, blue) from 0 to 1; None means one of a palette
    color: tuple[float, float, float] | None = None

    @property
    def shown_color(self) -> tuple[float, float, float]:
        """The color, or the palette's."""
        if self.color is not None:
            return self.color
        return shares_of(LABEL_COLORS[(self.label - 1) % len(LABEL_COLORS)])


Segments = tuple[Segment, ...]  # of a label map, sorted by label


def named_segments(names: NamesOfLabels) -> Segments:
    """Return segments of labels with names, without the background."""
    return tuple(Segment(label, name) for label, name in sorted(names.items()) if label > 0)


def described_segments(
    entries: Iterable[tuple[str, str, Sequence[float]]],
) -> Segments:
    """Return the segments in a file, described by the text of a label, a name and a color each.

    They are sorted by label. Wrong entries, mere names, are left out, and so are wrong colors; of
    several entries of a label, the first one counts.
    """
    segments: dict[int, Segment] = {}
    for label, text, color in entries:
        name = shorten(text, MAX_OF_A_NAME)
        if not name or not label.isdecimal() or len(label) > 9 or not 1 <= int(label) <= MAX_LABEL:
            continue
        shown = None
        if len(color) == 3 and min(color) >= 0 and max(color) <= 1:
            shown = (color[0], color[1], color[2])
        segments.setdefault(int(label), Segment(int(label), name, shown))
    return tuple(segments[label] for label in sorted(segments))


def map_segments(segments: Sequence[Segment], mapping: Mapping[int, int]) -> Segments:
    """Return segments with the new number of each label in a mapping, sorted by label.

    Of several that become one, the one that had its number counts, or else the first.
    """
    by_label: dict[int, Segment] = {}
    for segment in sorted(segments, key=lambda each: (each.label in mapping, each.label)):
        label = mapping.get(segment.label, segment.label)
        if label > 0:
            by_label.setdefault(label, replace(segment, label=label))
    return tuple(by_label[label] for label in sorted(by_label))


def segments_of(
    labels: NDArray[np.integer[Any]], known: Sequence[Segment], vanished: Iterable[int] = ()
) -> Segments:
    """Return the known segments, and one for each further label that occurs, sorted by label.

    Labels that have `vanished` count as well.
    """
    by_label = {segment.label: segment for segment in known if segment.label > 0}
    found = {*vanished}
    for plane in labels:
        found.update(np.unique(plane).tolist())
    for label in found:
        if label > 0 and label not in by_label:
            by_label[label] = Segment(label, f"Label {label}")
    return tuple(by_label[label] for label in sorted(by_label))


# bytes of a piece that is read or written at once, if a plane of it is not larger
PIECE_BYTES = 16 << 20


def iter_pieces(
    shape: Shape, itemsize: int, most_bytes: int, *, by_channel: bool
) -> Iterator[tuple[slice, slice]]:
    """Yield channels, one or all, and planes of the pieces of a (channels, [z,] y, x) array."""
    num_channels, num_planes = shape[:2]
    at_once = 1 if by_channel else num_channels
    plane_bytes = math.prod(shape[2:]) * itemsize * at_once
    most_planes = max(most_bytes // plane_bytes, 1)
    num_pieces = -(-num_planes // most_planes)
    edges = [num_planes * piece // num_pieces for piece in range(num_pieces + 1)]
    for first in range(0, num_channels, at_once):
        for start, stop in pairwise(edges):
            yield slice(first, first + at_once), slice(start, stop)


def segment_files(folder: Path, segments: Iterable[Segment], suffix: str) -> dict[Path, Segment]:
    """Return the segment of each file in a folder, such as `Niere__linke.nii` of `Niere, linke`."""
    files = {}
    stems: set[str] = set()  # no two that differ in capitals only
    for segment in segments:
        stem = re.sub(r"[^\w+-]", "_", segment.name)[:_MAX_OF_A_STEM] or f"Label_{segment.label}"
        while stem.casefold() in stems:
            stem = f"{stem}_{segment.label}"
        stems.add(stem.casefold())
        files[folder / f"{stem}{suffix}"] = segment
    return files
