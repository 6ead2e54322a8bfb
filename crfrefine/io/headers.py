"""What headers tell before voxels are read: of a file, and of the files of a network's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crfrefine.base.failures import naming_file
from crfrefine.base.geometry import reorientation
from crfrefine.base.limits import require_few_labels
from crfrefine.base.notes import NoteKind
from crfrefine.errors import GridMismatchError, InputError, UnsupportedFormatError
from crfrefine.io import formats, paths, streams
from crfrefine.io.formats import LOGITS_SUFFIXES, Format
from crfrefine.io.volume import RareHeaderError, VolumeHeader


def read_header(path: str | Path, suffixes: tuple[str, ...] = LOGITS_SUFFIXES) -> VolumeHeader:
    """Read the header of a file in one of the formats with these suffixes.

    Raise UnsupportedFormatError (unknown, damaged, cut off, ambiguous layout), InputError (missing,
    or cannot be opened) or UnexpectedError.
    """
    path, expected = paths.file_to_read(Path(path), suffixes)
    # A damaged header may hold numbers out of range; the checks find them, without warnings.
    with naming_file(path), np.errstate(all="ignore"):
        states = {path: path.stat()}
        if states[path].st_size == 0:
            raise UnsupportedFormatError(f"{path}: the file is empty; copy or download it again")
        actual = expected
        try:
            header: VolumeHeader = import_module(expected.module).read_header(path)
        except RareHeaderError as rare:
            by_itk = import_module(formats.FORMAT_OF_NAME[formats.ITK].module)
            header = by_itk.read_header(path, expected.name)
            note = NoteKind.READ_BY_ITK(reason=str(rare))
            header = replace(
                header,
                family=formats.ITK,
                notes=(note,),
                time=rare.time,
                voxel_files=rare.voxel_files,
            )
        except UnsupportedFormatError as error:
            header, actual = _read_by_content(path, expected, suffixes, error)
        for voxels in header.voxel_files:
            states[voxels] = voxels.stat()

    notes = header.notes
    source = header.source
    if formats.FORMAT_OF_SUFFIX.get(paths.suffix_of(path)) is not actual:
        notes = (NoteKind.OTHER_FORMAT(format=actual.name), *notes)
    elif source is not None and source.start == 0 and not header.voxel_files:
        # The file is compressed as a whole, or not at all.
        is_gzip = source.encoding == "gzip"
        if is_gzip != streams.is_named_gzip(path):
            kind = NoteKind.COMPRESSED if is_gzip else NoteKind.NOT_COMPRESSED
            notes = (kind(), *notes)
    return replace(header, family=header.family or actual.name, notes=notes, states=states)


def _read_by_content(
    path: Path, expected: Format, suffixes: tuple[str, ...], error: UnsupportedFormatError
) -> tuple[VolumeHeader, Format]:
    """Read a header in the format of its content, which is not the expected one.

    Raise the error of the expected format if it is, or UnsupportedFormatError if SimpleITK has to
    read the header, or if its voxels are in another file: the name of a header decides which other
    files hold voxels, and which files must not be replaced.
    """
    actual = paths.recognize(path)
    if actual is None or actual is expected:
        # The voxels of a header may be a pointer to them.
        for voxels in paths.voxels_beside(path):
            kind = paths.recognize(voxels)
            if isinstance(kind, formats.ForeignKind) and kind.is_text:
                hint = kind.hint(voxels.name)
                raise UnsupportedFormatError(f"{error}\n  {hint}") from None
        raise error
    explained = UnsupportedFormatError(f"{error}\n  {actual.hint('It')}")
    if not isinstance(actual, Format) or not set(actual.suffixes) <= set(suffixes):
        raise explained from None
    try:
        header: VolumeHeader = import_module(actual.module).read_header(path)
    except RareHeaderError:
        raise explained from None
    if header.voxel_files:
        raise explained from None
    return header, actual


def placed_on(header: VolumeHeader, grid: VolumeHeader | None) -> VolumeHeader:
    """Return a header, its axes turned to those of a grid if the file's voxels are on that grid."""
    if grid is None or header.affine is None or grid.affine is None or header.on_same_grid(grid):
        return header
    turn = reorientation(grid.grid_shape, grid.affine, header.grid_shape, header.affine)
    if turn is None:
        return header
    return replace(
        header,
        grid_shape=grid.grid_shape,
        affine=grid.affine,
        spacing=grid.spacing,
        qform=None,
        turned=(header, turn),
        turning=NoteKind.TURNED(
            header.path.name,
            before=header.orientation,
            after=grid.orientation,
        ),
    )


def with_channel_axis(header: VolumeHeader, grid: VolumeHeader) -> VolumeHeader:
    """Return the header of a network's output with the channels that the image's grid shows.

    A volume (x, y, label) over a plane has the labels on its last axis. An array (z, y, x) without
    geometry over a volume (x, y, z) has one channel. Any other header is returned as it is.
    """
    is_plane = (*grid.grid_shape, 1)[2] == 1
    whole = (*header.grid_shape, header.num_channels)
    if header.affine is None and not is_plane and whole == grid.grid_shape:
        array = replace(header, grid_shape=whole, num_channels=1, turned=None)
        if header.turned is None:
            return array
        from crfrefine.io.npz import in_fortran_order

        return in_fortran_order(array)

    is_stack = header.num_axes == 3 and header.grid_shape[2] > 1
    if not is_plane or not is_stack or header.num_channels > 1:
        return header
    if header.spacing is None or header.source is None:
        return header
    plane = replace(
        header,
        grid_shape=header.grid_shape[:2],
        num_channels=header.grid_shape[2],
        spacing=header.spacing[:2],
        source=header.source._replace(inner=None),
        segments=(),
    )
    if placed_on(plane, grid).on_same_grid(grid):
        return plane
    return header


def require_scalar(header: VolumeHeader, what: str) -> None:
    """Raise InputError if a file has several values per voxel."""
    if header.num_channels > 1:
        raise InputError(
            f"{header.path}: expected {what} with one value per voxel, "
            f"this file has {header.num_channels}\n"
            f"  `crfrefine convert {header.path.name} FOLDER --split` writes each to a file."
        )


class NetworkHeader(NamedTuple):
    """The headers of a network's output: logits, probabilities, a label map or structures."""

    files: tuple[VolumeHeader, ...]  # one with all labels, or one per label or structure
    num_labels: int  # L, background included
    kind: str | None  # "logits" or "probabilities" if the file declares it
    # Whether the files hold only the labels from 1 on, so that the background has to be computed.
    lacks_background: bool = False
    # Whether channels are on the image's grid; if not, they are to be interpolated.
    is_on_grid: bool = True
    # Whether they are a label map, or binary masks of structures that become one.
    is_label_map: bool = False

    @property
    def first(self) -> VolumeHeader:
        """The header of the file, or of the first one of several."""
        return self.files[0]

    @property
    def path(self) -> Path:
        """The file, or the first one of several."""
        return self.first.path

    @property
    def num_channels(self) -> int:
        """Channels in the files."""
        return self.num_labels - int(self.lacks_background)


def logits_header(
    headers: Sequence[VolumeHeader], *, fewest: int = 2, grid: VolumeHeader | None = None
) -> NetworkHeader:
    """Put the headers of a case's logits together: one file with all labels, or one per label.

    Files are in the order of labels, and have `fewest` channels or more. Axes are turned to those
    of the image `grid`. Raise InputError (one label, or files that do not belong together),
    CapacityError or GridMismatchError.
    """
    first = headers[0]
    are_several = len(headers) > 1
    num_labels = len(headers) if are_several else first.num_channels
    if num_labels < fewest:
        raise InputError(
            f"{first.path}: logits of one label only; "
            "expected one value per label at each voxel, background included\n"
            "  A label map: export the network's output before the argmax, or give "
            "--input-type labels.\n"
            "  Label 1 alone: its probabilities lie between 0 and 1; its logits need "
            "--input-type logits.\n"
            "  One file per label: -p BACKGROUND -p FOREGROUND.\n"
            "  The sigmoid channel of a single region: say which labels it has, --regions NAME=1."
        )
    require_few_labels(num_labels, str(first.path))
    files = [first, *(placed_on(header, first) for header in headers[1:])]
    if are_several:
        for file in files:
            if file.num_channels > 1 or file.affine is None:
                raise InputError(
                    f"{file.path}: expected one label, as in each of the {num_labels} files, "
                    f"this one has {file.num_channels}"
                )
            if file.grid_shape != first.grid_shape or not file.on_same_grid(first):
                raise GridMismatchError(
                    f"{file.path}: the logits of two labels are on different grids\n"
                    f"{first.difference_from(file)}"
                )
    placed = tuple(placed_on(file, grid) for file in files)
    is_on_grid = grid is None or placed[0].on_same_grid(grid)
    return NetworkHeader(placed, num_labels, first.kind, is_on_grid=is_on_grid)
