"""The common part of MetaImage and NRRD: a text header, and the fields in it.

It is read line by line, in bounded time and memory: it may be hostile.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.geometry import usable_spacing
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import listed, shorten
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.volume import RareHeaderError, VolumeHeader, require_right_angles
from crfrefine.io.writing import VoxelsToWrite

MAX_HEADER = 1 << 24  # bytes; segment tables of 3D Slicer take a hundredth of it
MAX_LINES = 1 << 18
MAX_FIELD = 1 << 16  # characters of a field that is interpreted

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_WHOLE_NUMBER = re.compile("[+-]?[0-9]{1,18}")  # No file is larger.
_NO_TEXT = {b"\0": "zero byte", b"\r": "carriage return before its end"}
_NUMBERED_FILES = re.compile(
    r"(.*?)(%0?[0-9]{0,2}d)(.*) ([+-]?[0-9]{1,9}) ([+-]?[0-9]{1,9}) ([+-]?[1-9][0-9]{0,8})"
    r"( [0-9]+)?"
)
_FLAGS = {
    **dict.fromkeys(("true", "t", "1", "yes"), True),
    **dict.fromkeys(("false", "f", "0", "no"), False),
}


def header_lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Yield each line of a file: its number, its text, and the bytes up to its end."""
    number = 0
    offset = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_HEADER - offset + 1):
            number += 1
            offset += len(line)
            if offset > MAX_HEADER or number > MAX_LINES:
                raise UnsupportedFormatError(
                    f"{path}: its header does not end within {MAX_HEADER >> 20} MiB and "
                    f"{MAX_LINES} lines; damaged, or another format"
                )
            line = line.rstrip(b"\r\n")
            # Readers interpret a carriage return as a line break, or as white space.
            for character, name in _NO_TEXT.items():
                if character in line:
                    raise UnsupportedFormatError(
                        f"{path}: damaged header: line {number} holds a {name}; expected text"
                    )
            yield number, line, offset


class Fields(dict[str, str]):
    """The fields of a header by name, read as text, flags and numbers; errors quote the line."""

    def __init__(self, path: Path, format_name: str, separator: str, voxels_in: str) -> None:
        super().__init__()
        self.path = path
        self.units: list[str] = []  # all units of length in the header
        self.time = ""  # as of `VolumeHeader`
        self.listed: tuple[str, ...] = ()  # names of files, in the lines after a field `LIST`
        self._format = format_name
        self._separator = separator
        self._voxels_in = voxels_in  # the field that names the files of voxels

    def add(self, name: str, value: bytes) -> None:
        """Store the header's value of a field; raise for a second, different one."""
        text = _text_of(value)
        if self.setdefault(name, text).lower() != text.lower():
            raise self.damaged(name, f"one value, found a second one: {shorten(text, 60)}")

    def add_list(self, lines: Iterable[tuple[int, bytes, int]]) -> None:
        """Store the names in the lines that follow."""
        self.listed = tuple(_text_of(line) for _, line, _ in lines if line.strip())

    def text(self, name: str, default: str | None = None) -> str:
        """Return the text of a field; raise if it is missing and there is no default."""
        value = self.get(name, default)
        if value is None:
            raise UnsupportedFormatError(
                f"{self.path}: damaged {self._format} header: no line `{name}{self._separator}...`"
            )
        if len(value) > MAX_FIELD:
            raise self.damaged(name, f"at most {MAX_FIELD} characters")
        return value

    def flag(self, name: str, default: str = "False") -> bool:
        """Return a boolean field."""
        value = _FLAGS.get(self.text(name, default).lower())
        if value is None:
            raise self.damaged(name, "True or False")
        return value

    def whole(self, name: str, default: str | None = None, *, limits: tuple[int, int]) -> int:
        """Return a field that holds one whole number within limits."""
        text = self.text(name, default)
        if not _WHOLE_NUMBER.fullmatch(text) or not limits[0] <= int(text) <= limits[1]:
            raise self.damaged(name, f"a whole number from {limits[0]} to {limits[1]}")
        return int(text)

    def sizes(self, name: str, count: int) -> tuple[int, ...]:
        """Return a field that holds the number of voxels along each of `count` axes."""
        words = self.text(name).split()
        sizes = tuple(int(word) for word in words if _WHOLE_NUMBER.fullmatch(word))
        if not len(words) == len(sizes) == count or min(sizes) < 1:
            raise self.damaged(
                name, f"{count} whole numbers of at least 1, as many as there are dimensions"
            )
        return sizes

    def numbers(self, name: str, count: int, *, exact: bool = True) -> tuple[float, ...]:
        """Return the first `count` finite numbers of a field; it may have more unless `exact`."""
        words = self.text(name).split()
        values = finite_numbers(words[:count])
        if values is None or len(values) < count or (exact and len(words) > count):
            raise self.damaged(name, f"{count} finite numbers")
        return values

    def damaged(self, name: str, expected: str) -> UnsupportedFormatError:
        """Return the error for a field that cannot be used."""
        line = f"{name}{self._separator}{shorten(self.get(name, ''), 60)}"
        return UnsupportedFormatError(
            f"{self.path}: {self._format} header: {line}; expected {expected}"
        )

    def rare(self, reason: str) -> Exception:
        """Return the error for what only SimpleITK reads, with the files of voxels that exist.

        SimpleITK takes all lengths for mm.
        """
        for name in self.units:
            if MM_PER_UNIT.get(name.lower(), 1.0) != 1.0:
                return UnsupportedFormatError(
                    f"{self.path}: its header has {reason}, and lengths in {shorten(name, 60)}; "
                    "such headers are read in mm alone: save the volume as NIfTI"
                )

        # The voxels are in one file, a list, or a pattern with the first and the last number and
        # the step.
        name = self.text(self._voxels_in, "LOCAL")
        names: Iterable[str] = [name]
        pattern = _NUMBERED_FILES.fullmatch(name)
        if name.upper() == "LOCAL":
            names = []
        elif name.upper().split()[:1] == ["LIST"]:
            names = self.listed
        elif pattern is not None:
            before, number_format, after = pattern.group(1, 2, 3)
            first, last, step = map(int, pattern.group(4, 5, 6))
            numbers = range(first, last + (1 if step > 0 else -1), step)[:MAX_LINES]
            names = (f"{before}{number_format % number}{after}" for number in numbers)
        paths = [self.path.parent / each for each in names]
        # No exception for odd names.
        files = tuple(path for path in paths if os.path.isfile(path))  # noqa: PTH113
        return RareHeaderError(reason, self.time, files)


def _text_of(value: bytes) -> str:
    # File names may be in any encoding: surrogates restore the bytes when a file is opened.
    return value.strip().decode("utf-8", "surrogateescape")


def text_of_name(name: str) -> str:
    """Return the text of a header, which is UTF-8, that has the bytes of a file's name.

    Where names of files have another encoding, the text is another one.
    """
    return _text_of(os.fsencode(name))


def finite_numbers(words: list[str]) -> tuple[float, ...] | None:
    """Return words as numbers; None if one of them is not a finite number."""
    values = []
    for word in words:
        value = float(word) if _NUMBER.fullmatch(word) else math.nan
        if not math.isfinite(value):
            return None
        values.append(value)
    return tuple(values)


OUTSIDE_FILES = "CRFREFINE_OUTSIDE_FILES"

# Signs that turn left, posterior, superior into RAS+, the convention of all affines here.
LPS = (-1.0, -1.0, 1.0)


def voxel_path(fields: Fields, key: str, *, is_compressed: bool) -> Path:
    """Return the file that a header names, relative to its folder.

    Raise InputError if the user forbids voxels outside the folder of their header, and
    RareHeaderError for a list or a pattern of files, which must not be compressed: SimpleITK would
    not compare the checksums of several files.
    """
    name = fields.text(key)
    if not name:
        raise fields.damaged(key, "the name of a file")
    are_several = "%" in name or name.upper().split()[0] == "LIST"
    if are_several and is_compressed:
        raise fields.damaged(key, "one file, as the voxels are compressed")
    path = fields.path.parent / os.fsdecode(name.encode("utf-8", "surrogateescape"))
    rule = os.environ.get(OUTSIDE_FILES, "allow")
    if rule not in ("allow", "refuse"):
        raise InputError(
            f"environment variable {OUTSIDE_FILES}: expected allow or refuse, "
            f"found {shorten(rule)!r}"
        )
    if rule == "refuse":
        folders = {fields.path.parent.resolve(), fields.path.resolve().parent}
        place = ""
        if are_several:
            place = "several files"
        elif folders.isdisjoint(path.resolve().parents):
            place = f"{shorten(path, 200)}, outside its folder"
        if place:
            raise InputError(
                f"{fields.path}: its voxels are in {place}, and {OUTSIDE_FILES} is set to refuse"
            )
    if are_several:
        raise fields.rare("voxels in several files")
    return path


def grid_and_channels(
    path: Path, sizes: tuple[int, ...], num_channels: int
) -> tuple[tuple[int, ...], int]:
    """Split dimensions into grid and channels.

    A fourth dimension means channels if a voxel has one value. Raise UnsupportedFormatError if that
    is ambiguous.
    """
    if 2 <= len(sizes) <= 3:
        return sizes, num_channels
    if len(sizes) != 4 or num_channels > 1:
        raise UnsupportedFormatError(
            f"{path}: {len(sizes)} dimensions with {num_channels} values per voxel "
            "cannot be split into grid and channels"
        )
    return sizes[:3], sizes[3]


def affine_of(
    vectors: NDArray[np.float64], origin: NDArray[np.float64], signs: tuple[float, ...]
) -> NDArray[np.float64]:
    """Return the affine to RAS+ of axes in a space with these signs; vectors are the columns."""
    num_axes = len(origin)
    affine = np.eye(4)
    affine[:num_axes, :num_axes] = vectors
    affine[:num_axes, 3] = origin
    return np.diag([*signs, 1.0]) @ affine + 0.0  # Adding zero turns -0 into 0.


# Names of units of length in lower case, and what they are in mm. The sign of micro is one of its
# own, a Greek letter, or a byte of Latin-1.
MM_PER_UNIT = {
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1000.0),
    **dict.fromkeys(("in", "inch", "inches"), 25.4),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 10.0),
    **dict.fromkeys(("mm", "millimeter", "millimeters", "millimetre", "millimetres"), 1.0),
    **dict.fromkeys(("um", "\u00b5m", "\u03bcm", "\udcb5m", "micron", "microns"), 1e-3),
    **dict.fromkeys(("micrometer", "micrometers", "micrometre", "micrometres"), 1e-3),
    **dict.fromkeys(("nm", "nanometer", "nanometers", "nanometre", "nanometres"), 1e-6),
}
_NO_UNITS = ("", "?", "???", "none", "unknown")


def lengths_in_mm(header: VolumeHeader, key: str, names: Sequence[str]) -> VolumeHeader:
    """Return a header with lengths in mm: they are in these units, one per axis of the world.

    Units that are not known are taken for mm, with a note, and so are all where one axis has none,
    without a note if the others are mm. `key` is their field.
    """
    num_axes = len(header.grid_shape)
    mm_per_unit = {**MM_PER_UNIT, **dict.fromkeys(_NO_UNITS, 1.0)}
    known = [mm_per_unit[name.lower()] for name in names if name.lower() in mm_per_unit]
    if len(known) == len(names) and set(known) <= {1.0}:
        return header
    named = dict.fromkeys(name or "none" for name in names)
    if len(names) < num_axes or any(name.lower() not in MM_PER_UNIT for name in names):
        note = Note.of(NoteKind.UNKNOWN_UNITS, field=key, units=list(named))
        return replace(header, notes=(*header.notes, note))
    scales = np.ones(4)
    scales[:num_axes] = known[:num_axes]
    affine = np.diag(scales) @ header.geometry()[0]
    spacing = usable_spacing(affine, num_axes, header.path)
    detail = (key, f"{listed(named)}; lengths are converted to mm")
    return replace(
        header,
        affine=affine,
        spacing=spacing,
        details=(*header.details, detail),
    )


def kept_lines(voxels: VoxelsToWrite, format_name: str) -> tuple[str, ...]:
    """Return the lines that place the grid to write, if they are those of its format; else ().

    Raise UnsupportedFormatError if lines would have to hold a sheared grid.
    """
    like = voxels.like
    if like.format == format_name and like.template:
        lines: tuple[str, ...] = like.template
        return lines
    require_right_angles(voxels.path, like)
    return ()


def place_in_lps(
    header: VolumeHeader,
) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[float, ...]]:
    """Return directions as columns, origin and voxel sizes of a file's grid in LPS."""
    affine, spacing = header.geometry()
    num_axes = len(spacing)
    lps = np.diag([*LPS, 1.0]) @ affine + 0.0  # Adding zero turns -0 into 0.
    return lps[:num_axes, :num_axes] / np.array(spacing), lps[:num_axes, 3], spacing
