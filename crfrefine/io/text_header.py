"""The common part of MetaImage and NRRD: a text header, its fields, and the volume they describe.

It is read line by line, in bounded time and memory: it may be hostile.
"""

from __future__ import annotations

import math
import os
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias, TypeVar

import numpy as np

from crfrefine.base.array_types import Float64, Shape, Spacing
from crfrefine.base.geometry import usable_spacing
from crfrefine.base.notes import NoteKind
from crfrefine.base.text import listed, shorten
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.volume import FileHeader, RareHeaderError, VolumeHeader, require_right_angles
from crfrefine.io.writing import VoxelsToWrite

MAX_HEADER = 1 << 24  # bytes; segment tables of 3D Slicer take a hundredth of it
MAX_LINES = 1 << 18
MAX_FIELD = 1 << 16  # characters of a field that is interpreted
OUTSIDE_FILES = "CRFREFINE_OUTSIDE_FILES"

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_WHOLE_NUMBER = re.compile("[+-]?[0-9]{1,18}")  # No file is larger.
_NO_TEXT = {b"\0": "zero byte", b"\r": "carriage return before its end"}
_Choice = TypeVar("_Choice")
ByteOrder: TypeAlias = Literal["<", ">"]  # little, big


def by_each_name(table: Mapping[str, _Choice]) -> dict[str, _Choice]:
    """Return a table that has several names for a value, such as "true, yes", by each name."""
    found: dict[str, _Choice] = {}
    for names, value in table.items():
        found.update(dict.fromkeys(names.split(", "), value))
    return found


_FLAGS = by_each_name({"true, t, 1, yes": True, "false, f, 0, no": False})


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


class TextHeader(FileHeader, dict[str, str]):
    """The fields of a header by name, and the volume that they describe; errors quote the line.

    MetaImage and NRRD tell how a line is read, and what their fields mean.
    """

    separator: ClassVar[str]  # of the name and the value of a field
    end: ClassVar[str]  # what does not end the header if the file is cut off, in words
    units_in: ClassVar[str]  # the field with the units of length, in words
    unit_fields: ClassVar[tuple[str, ...]]  # the fields with units
    voxels_in: ClassVar[str]  # the field that names the files of voxels, if they are others
    list_of_files: ClassVar[re.Pattern[str]]  # its value if the lines that follow are the names
    # Its value if the names have a number: the text before it, its format, the text behind it,
    # the first number, the last one, and the step.
    numbered_files: ClassVar[re.Pattern[str]]
    listed: tuple[str, ...] = ()  # names of files, in the lines that follow the header
    # The method `read_axes` sets these.
    sizes: Shape = ()  # voxels along the axes, without that of channels
    num_channels: int
    inner: int | None = None  # as of `VoxelSource`

    def __init__(self, path: Path) -> None:
        """Read a header to its end."""
        super().__init__()
        self.path = path
        lines = header_lines(path)
        for number, line, self.num_bytes in lines:
            if self.take_line(number, line):
                break
        else:
            if self.voxels_in not in self:
                raise UnsupportedFormatError(
                    f"{path}: damaged {self.format} header, or cut off: "
                    f"{self.end} ends its header; copy or export it again"
                )
        if self.list_of_files.fullmatch(self.get(self.voxels_in, "")):
            self.listed = tuple(_text_of(line) for _, line, _ in lines if line.strip())

    @abstractmethod
    def take_line(self, number: int, line: bytes) -> bool:
        """Store the field in a line; return whether the line ends the header."""

    @abstractmethod
    def read_axes(self) -> None:
        """Find the axes and the channels."""

    @property
    @abstractmethod
    def units(self) -> list[str]:
        """The units of length along the axes of `sizes` that have one."""

    @abstractmethod
    def place(self) -> tuple[Float64, Sequence[float], tuple[float, ...]]:
        """Return the steps along the axes, as columns, the place of the first voxel, and the signs.

        The signs turn both into RAS+.
        """

    @abstractmethod
    def lines_of_place(self, header: VolumeHeader) -> tuple[str, ...]:
        """Return the lines that a writer keeps, as they place the grid of a header; () for none."""

    def grid(self) -> tuple[Shape, int]:
        """Return grid and channels; a fourth axis is that of channels if a voxel has one value."""
        self.num_channels = 1
        self.read_axes()
        grid_shape = self.sizes
        if len(grid_shape) == 4 and self.num_channels == 1:
            self.num_channels = grid_shape[3]
            grid_shape = grid_shape[:3]
        if not 2 <= len(grid_shape) <= 3:
            raise UnsupportedFormatError(
                f"{self.path}: {len(grid_shape)} dimensions with {self.num_channels} values per "
                "voxel cannot be split into grid and channels"
            )
        return grid_shape, self.num_channels

    def affine(self, grid_shape: Shape) -> Float64:
        """Return the affine in the unit of the header."""
        num_axes = len(grid_shape)
        steps, origin, signs = self.place()
        return affine_of(steps[:num_axes, :num_axes], origin[:num_axes], signs)

    def volume_header(self) -> VolumeHeader:
        """Return the header with lengths in mm, and the lines that a writer keeps.

        Units that are not known are taken for mm, with a note, and so are all where one axis has
        none, without a note if the others are mm.
        """
        header = super().volume_header()
        num_axes = header.num_axes
        if num_axes == len(self.sizes):
            header = replace(header, template=self.lines_of_place(header))
        names = self.units  # one per axis of the world
        mm_per_unit = {**MM_PER_UNIT, **dict.fromkeys(_NO_UNITS, 1.0)}
        known = [mm_per_unit[name.lower()] for name in names if name.lower() in mm_per_unit]
        if len(known) == len(names) and set(known) <= {1.0}:
            return header
        named = list(dict.fromkeys(name or "none" for name in names))
        if len(names) < num_axes or any(name.lower() not in MM_PER_UNIT for name in names):
            note = NoteKind.UNKNOWN_UNITS(field=self.units_in, units=named)
            return replace(header, notes=(*header.notes, note))
        scales = np.ones(4)
        scales[:num_axes] = known[:num_axes]
        affine = np.diag(scales) @ header.required_affine
        spacing = usable_spacing(affine, num_axes, self.path)
        detail = (self.units_in, f"{listed(named)}; lengths are converted to mm")
        details = (*header.details, detail)
        return replace(header, affine=affine, spacing=spacing, details=details)

    def add(self, name: str, value: bytes) -> None:
        """Store the header's value of a field; raise for a second, different one."""
        text = _text_of(value)
        if self.setdefault(name, text).lower() != text.lower():
            raise self.damaged(name, f"one value, found a second one: {shorten(text, 60)}")

    def text(self, name: str, default: str | None = None) -> str:
        """Return the text of a field; raise if it is missing and there is no default."""
        value = self.get(name, default)
        if value is None:
            raise UnsupportedFormatError(
                f"{self.path}: damaged {self.format} header: no line `{name}{self.separator}...`"
            )
        if len(value) > MAX_FIELD:
            raise self.damaged(name, f"at most {MAX_FIELD} characters")
        return value

    def choice(
        self, name: str, values: Mapping[str, _Choice], expected: str, default: str | None = None
    ) -> _Choice:
        """Return the meaning of the text of a field, in lower case."""
        words = self.text(name, default).lower().split()
        value = values.get(" ".join(words))
        if value is None:
            raise self.damaged(name, expected)
        return value

    def flag(self, name: str, default: str = "False") -> bool:
        """Return a boolean field."""
        return self.choice(name, _FLAGS, "True or False", default)

    def integer(self, name: str, default: str | None = None, *, limits: tuple[int, int]) -> int:
        """Return a field that holds one whole number within limits."""
        text = self.text(name, default)
        if not _WHOLE_NUMBER.fullmatch(text) or not limits[0] <= int(text) <= limits[1]:
            raise self.damaged(name, f"a whole number from {limits[0]} to {limits[1]}")
        return int(text)

    def sizes_in(self, name: str, count: int) -> tuple[int, ...]:
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
        line = f"{name}{self.separator}{shorten(self.get(name, ''), 60)}"
        return UnsupportedFormatError(
            f"{self.path}: {self.format} header: {line}; expected {expected}"
        )

    def rare(self, reason: str) -> Exception:
        """Return RareHeaderError, for what only SimpleITK reads, with the files of voxels.

        It is UnsupportedFormatError for lengths in another unit: SimpleITK takes all for mm.
        """
        units = " ".join(self.get(field, "") for field in self.unit_fields)
        for quoted in re.findall(r'"[^"]*"|[^\s"]+', units):
            name = quoted.strip('" ')
            if MM_PER_UNIT.get(name.lower(), 1.0) != 1.0:
                return UnsupportedFormatError(
                    f"{self.path}: its header has {reason}, and lengths in {shorten(name, 60)}; "
                    "such headers are read in mm alone: save the volume as NIfTI"
                )
        paths = [self.path.parent / name for name in self.names_of_files()]
        # No exception for odd names.
        files = tuple(path for path in paths if os.path.isfile(path))  # noqa: PTH113
        return RareHeaderError(reason, self.time, files)

    def names_of_files(self) -> tuple[str, ...]:
        """Return the names of the files with voxels: one, those of a list, or those of a pattern.

        Without any, the header's own file holds the voxels.
        """
        name = self.text(self.voxels_in, "")
        if not self.is_of_several_files:
            return (name,) if name else ()
        match = self.numbered_files.fullmatch(name)
        if match is None:
            return self.listed
        before, number_format, after = match.group(1, 2, 3)
        first, last, step = map(int, match.group(4, 5, 6))
        numbers = range(first, last + (1 if step > 0 else -1), step)[:MAX_LINES]
        return tuple(f"{before}{number_format % number}{after}" for number in numbers)

    @property
    def is_of_several_files(self) -> bool:
        """Whether the header means a list or a pattern of files with voxels."""
        name = self.text(self.voxels_in, "")
        return "%" in name or name.upper().split()[:1] == ["LIST"]

    def voxel_file(self, *, is_compressed: bool) -> tuple[Path, int]:
        """Return the file with the voxels, relative to the header's folder, and the bytes before.

        Raise InputError if the user forbids voxels outside the folder of their header, and
        RareHeaderError for a list or a pattern of files, which must not be compressed: SimpleITK
        would not compare the checksums of several files.
        """
        key = self.voxels_in
        if key not in self:
            return self.path, self.num_bytes
        name = self.text(key)
        if not name:
            raise self.damaged(key, "the name of a file")
        if self.is_of_several_files and is_compressed:
            raise self.damaged(key, "one file, as the voxels are compressed")
        path = self.path.parent / os.fsdecode(name.encode("utf-8", "surrogateescape"))
        rule = os.environ.get(OUTSIDE_FILES, "allow")
        if rule not in ("allow", "refuse"):
            raise InputError(
                f"environment variable {OUTSIDE_FILES}: expected allow or refuse, "
                f"found {shorten(rule)!r}"
            )
        if rule == "refuse":
            folders = {self.path.parent.resolve(), self.path.resolve().parent}
            place = ""
            if self.is_of_several_files:
                place = "several files"
            elif folders.isdisjoint(path.resolve().parents):
                place = f"{shorten(path, 200)}, outside its folder"
            if place:
                raise InputError(
                    f"{self.path}: its voxels are in {place}, and {OUTSIDE_FILES} is set to refuse"
                )
        if self.is_of_several_files:
            raise self.rare("voxels in several files")
        return path, 0


def _text_of(value: bytes) -> str:
    # File names may be in any encoding: surrogates restore the bytes when a file is opened.
    return value.strip().decode("utf-8", "surrogateescape")


def text_of_name(name: str) -> str:
    """Return the text that a header, which is UTF-8, has to hold for the name of a file.

    Its bytes are those of the name. Where names of files have another encoding, it differs from the
    name as text.
    """
    return _text_of(os.fsencode(name))


def finite_numbers(words: list[str]) -> tuple[float, ...] | None:
    """Return words as numbers; None if one of them is not a finite number."""
    if not all(map(_NUMBER.fullmatch, words)):
        return None
    values = tuple(map(float, words))
    return values if all(map(math.isfinite, values)) else None


# Signs that turn left, posterior, superior into RAS+, the convention of all affines here.
LPS = (-1.0, -1.0, 1.0)


def affine_of(
    vectors: Float64, origin: Sequence[float] | Float64, signs: tuple[float, ...]
) -> Float64:
    """Return the affine to RAS+ of axes in a space with these signs; vectors are the columns."""
    num_axes = len(origin)
    affine = np.eye(4)
    affine[:num_axes, :num_axes] = vectors
    affine[:num_axes, 3] = origin
    return np.diag([*signs, 1.0]) @ affine + 0.0  # Adding zero turns -0 into 0.


# Names of units of length in lower case, and what they are in mm. The sign of micro is one of its
# own, a Greek letter, or a byte of Latin-1.
MM_PER_UNIT = by_each_name(
    {
        "m, meter, meters, metre, metres": 1000.0,
        "in, inch, inches": 25.4,
        "cm, centimeter, centimeters, centimetre, centimetres": 10.0,
        "mm, millimeter, millimeters, millimetre, millimetres": 1.0,
        "um, \u00b5m, \u03bcm, \udcb5m, micron, microns": 1e-3,
        "micrometer, micrometers, micrometre, micrometres": 1e-3,
        "nm, nanometer, nanometers, nanometre, nanometres": 1e-6,
    }
)
_NO_UNITS = ("", "?", "???", "none", "unknown")


def kept_lines(voxels: VoxelsToWrite, format_name: str) -> tuple[str, ...]:
    """Return the lines that place the grid to write, if they are those of its format; else ().

    Raise UnsupportedFormatError if lines would have to hold a sheared grid.
    """
    like = voxels.like
    if like.format == format_name and like.template:
        return like.template
    require_right_angles(voxels.path, like)
    return ()


def place_in_lps(header: VolumeHeader) -> tuple[Float64, Float64, Spacing]:
    """Return directions as columns, origin and voxel sizes of a file's grid in LPS."""
    affine, spacing = header.geometry()
    num_axes = len(spacing)
    lps = affine_of(affine[:3, :3], affine[:3, 3], LPS)
    return lps[:num_axes, :num_axes] / np.array(spacing), lps[:num_axes, 3], spacing
