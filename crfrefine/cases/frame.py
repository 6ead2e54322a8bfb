"""The frame of an array without geometry: on which voxel axes its values are, and why.

An .npz or .npy does not say it. nnU-Net's plans beside it name the reader, and so the axes; else
the array is taken on the axes of the image, and the label map beside it tells whether it agrees.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from crfrefine.arrays.axes_check import AxesCheck, contradicts, is_doubtful
from crfrefine.arrays.network import ReadPieces
from crfrefine.base.array_types import Float32
from crfrefine.base.axes import Axes
from crfrefine.base.geometry import has_clear_orientation, orientation_codes
from crfrefine.base.notes import Note, NoteKind
from crfrefine.cases.content import is_label_map
from crfrefine.cases.conventions import SCORE_WORDS, without_word
from crfrefine.cases.plans import reader_of
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.formats import VOLUME_SUFFIXES
from crfrefine.io.headers import placed_on, read_header, with_channel_axis
from crfrefine.io.paths import stem_of
from crfrefine.io.reading import Piece, read_array
from crfrefine.io.volume import VolumeHeader, header_of_grid

# nnU-Net's readers by the axes of their arrays; those of other readers are not known.
_ON_AXES_OF_IMAGE = ("SimpleITKIO", "NibabelIO")
_TOWARD_RAS = ("NibabelIOWithReorient", "SimpleITKIOWithReorient")
RAS = "RAS"
OF_FRAME = (NoteKind.FRAME_OF_PLANS, NoteKind.UNKNOWN_FRAME, NoteKind.DOUBTFUL_FRAME)


def read_network_file(
    path: Path,
    image: VolumeHeader,
    others: Collection[Path] = (),
    label_map: Path | None = None,
) -> tuple[VolumeHeader, VolumeHeader | None]:
    """Read the header of a network's output, of an array with the geometry of its frame.

    It has the channels that the grid of the image shows. The second header, and the last two
    arguments, are as of `in_frame`.
    """
    header = read_header(path)
    if header.affine is not None:
        return with_channel_axis(header, image), None
    return in_frame(header, image, others, label_map, may_lack_channels=True)


def in_frame(
    header: VolumeHeader,
    image: VolumeHeader,
    others: Collection[Path] = (),
    label_map: Path | None = None,
    *,
    may_lack_channels: bool = False,
) -> tuple[VolumeHeader, VolumeHeader | None]:
    """Return the header of an array of scores with the geometry of its frame, and a note on that.

    It has no geometry on the axes of the image, as arrays always have it, and if its sizes do not
    fit. The second header is that of a label map with which the values are to be compared; None
    means that there is none. Raise InputError if the plans beside the array cannot be read.

    Args:
        header: the header of the array.
        image: the header of the image.
        others: files of the case that are no label maps of the network.
        label_map: the network's label map, if there is none beside the array.
        may_lack_channels: whether an array of three axes may be one channel, (z, y, x).

    """
    path = header.path
    reader, source = reader_of(path.parent)
    is_turned = reader in _TOWARD_RAS and image.num_axes == 3
    compared = None
    if not is_turned or not has_clear_orientation(image.required_affine):
        compared = _label_map_beside(path, image, others, label_map)
    grid = image
    if is_turned:
        grid = toward_ras(image)
    elif compared is not None and not image.on_same_grid(compared):
        grid = compared  # The network's own image had these axes.
    if may_lack_channels:
        header = with_channel_axis(header, grid)
    notes = [*header.notes]
    if header.on_same_grid(grid) and not image.on_same_grid(grid):
        header = _with_geometry(header, grid)
        if is_turned:
            plans = str(source)
            notes.append(NoteKind.FRAME_OF_PLANS(path.name, axes=RAS, reader=reader, plans=plans))
    if reader in _ON_AXES_OF_IMAGE:
        compared = None
    elif not is_turned and compared is None and not _runs_toward_ras(image):
        notes.append(NoteKind.UNKNOWN_FRAME(path.name, axes=image.orientation))
    return replace(header, notes=tuple(notes)), compared


def _with_geometry(header: VolumeHeader, grid: VolumeHeader) -> VolumeHeader:
    return replace(header, grid_shape=grid.grid_shape, affine=grid.affine, spacing=grid.spacing)


def toward_ras(grid: VolumeHeader) -> VolumeHeader:
    """Return the header of the same voxels with axes that run nearest to RAS."""
    affine = grid.required_affine
    axes = Axes.toward(RAS, orientation_codes(affine))
    affine = axes.affine(affine, grid.grid_shape)
    return header_of_grid(axes.along(grid.grid_shape), affine, grid.path)


def grid_of_archive(grid: VolumeHeader, *folders: Path) -> VolumeHeader:
    """Return the grid on which an array is written, for the plans in the first folder with some.

    It is that of the image, `grid`, unless the reader that the plans name turns axes to RAS.
    """
    reader = next((name for name, _ in map(reader_of, folders) if name), "")
    if reader not in _TOWARD_RAS or grid.num_axes != 3 or _runs_toward_ras(grid):
        return grid
    return toward_ras(grid)


def for_archive(
    header: VolumeHeader, grid: VolumeHeader, target: Path
) -> tuple[VolumeHeader, VolumeHeader]:
    """Return the header of scores to read, and the grid to write them on, for the plans there."""
    archive_grid = grid_of_archive(grid, target.parent)
    if archive_grid is grid:
        return header, grid
    if header.affine is None:
        header = _with_geometry(header, grid)
    return placed_on(header, archive_grid), archive_grid


def _runs_toward_ras(image: VolumeHeader) -> bool:
    return image.orientation == RAS[: image.num_axes]


def _label_map_beside(
    path: Path, image: VolumeHeader, others: Collection[Path], label_map: Path | None
) -> VolumeHeader | None:
    """Return the header of the file that is an array's label map by its name and grid.

    It is beside the array, or else known by the caller.
    """
    stem = stem_of(path)
    candidates = []
    for name in dict.fromkeys([stem, without_word(stem, SCORE_WORDS)]):
        candidates += [path.with_name(name + suffix) for suffix in VOLUME_SUFFIXES]
    if label_map is not None:
        candidates.append(label_map)
    for candidate in candidates:
        # For names that the system refuses, `candidate.is_file()` raises an exception.
        if candidate in others or not os.path.isfile(candidate):  # noqa: PTH113
            continue
        with suppress(CrfRefineError, OSError):
            header = read_header(candidate, VOLUME_SUFFIXES)
            is_on_grid = placed_on(header, image).on_same_grid(image)
            if header.num_channels == 1 and header.kind is None and is_on_grid:
                return header
    return None


def describe_frame(path: Path) -> str:
    """Return facts about an array's axes without its image, for display."""
    reader, source = reader_of(path.parent)
    if source is None:
        return "not in this format; those of the image, unless a label map beside it contradicts"
    axes = "not known"
    if reader in _TOWARD_RAS:
        axes = "toward RAS"
    elif reader in _ON_AXES_OF_IMAGE:
        axes = "those of the image"
    return f"{axes}, by the reader {reader} that {source} names"


class FrameCheck:
    """Compares the values of an array with the label map beside it, which tells its axes."""

    def __init__(
        self, compared: VolumeHeader | None, header: VolumeHeader, image: VolumeHeader
    ) -> None:
        """Read the label map of `in_frame` on the grid of the image; `header` is the array's."""
        self._header = header
        self._image = image
        self._compared = compared
        self._axes: AxesCheck | None = None
        if compared is None:
            return
        label_map = placed_on(compared, image)
        with suppress(InputError):
            values = read_array(label_map)
            if is_label_map(label_map, values[0]):
                axes = AxesCheck(np.rint(values[0]).astype(np.uint16))
                if axes.is_possible:
                    self._axes = axes

    def look(self, values: Float32, *, are_regions: bool = False) -> list[Note]:
        """Compare (channels, [z,] y, x) in memory; return a note if the label map tells no axes.

        Raise InputError if the values agree with the label map in other axes than assumed.
        """
        if self._axes is None:
            if self._compared is None or _runs_toward_ras(self._image):
                return []
            axes = self._image.orientation
            return [NoteKind.UNKNOWN_FRAME(self._header.path.name, axes=axes)]
        self._axes.add(values)
        return self._conclude(self._axes, are_regions=are_regions)

    def watch(self, read: ReadPieces) -> ReadPieces:
        """Return a function that reads pieces as `read` does, and compares them on its first pass.

        Its iterator raises InputError at its end as `look` does.
        """
        if self._axes is None:
            return read

        def pieces() -> Iterator[Piece]:
            axes = self._axes
            for piece in read():
                if axes is not None:
                    axes.add(piece.values, piece.channels.start, piece.planes.start)
                yield piece
            self._axes = None  # Later passes have the same values.
            if axes is not None:
                self._conclude(axes)

        return pieces

    def _conclude(self, axes: AxesCheck, *, are_regions: bool = False) -> list[Note]:
        """Return a note if the label map hardly fits; raise InputError if it does in other axes."""
        shares = axes.shares(are_regions=are_regions, kind=self._header.kind)
        # where the axes of the array run if the values, on the image's grid, are turned so
        letters = [turn.inverse.letters(self._image.orientation or "") for turn in axes.turns]
        if self._header.turned is not None and self._header.affine is not None:
            _, placing = self._header.turned
            letters = [placing.inverse.letters(codes) for codes in letters]
        # Of axes that agree alike, nnU-Net's are likelier.
        best = max(range(len(shares)), key=lambda turn: (shares[turn], letters[turn] == RAS))
        assert self._compared is not None
        label_map = self._compared.path
        path = self._header.path
        if contradicts(shares[0], shares[best]):
            placed = shlex.quote(f"{stem_of(path)}_placed.nii.gz")
            convert = (
                f"crfrefine convert {shlex.quote(str(path))} {placed} "
                f"--like {shlex.quote(str(self._image.path))} --axes {letters[best]}"
            )
            advice = "Give it a place, and give that file in its stead:"
            if letters[best] == RAS:
                advice = (
                    f"So do the readers {' and '.join(_TOWARD_RAS)} of nnU-Net: put the "
                    "plans.json of the network beside it, which names the reader, or give it a "
                    "place, and give that file in its stead:"
                )
            raise InputError(
                f"{path}: its voxel axes seem to run toward {letters[best]}; expected "
                f"{letters[0]}, as those of {self._image.path}: its labels agree with the label "
                f"map {label_map} at {shares[best]:.0%} of the voxels that way, and at "
                f"{shares[0]:.0%} as expected\n"
                f"  {advice}\n    {convert}"
            )
        if is_doubtful(shares[0]):
            axes_of_image = self._image.orientation
            name = label_map.name
            return [
                NoteKind.DOUBTFUL_FRAME(
                    path.name, axes=axes_of_image, label_map=name, share=shares[0]
                )
            ]
        return []
