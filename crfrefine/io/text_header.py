"""The common part of MetaImage and NRRD: a header, read line by line, in bounded time and memory: it may be hostile."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.geometry import is_sheared, spacing_of
from crfrefine.base.text import shorten
from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.streams import cannot_read
from crfrefine.io.volume import RareHeaderError, Volume

MAX_HEADER = 1 << 24  # bytes; segment tables of 3D Slicer take a hundredth of it
MAX_LINES = 1 << 18
MAX_FIELD = 1 << 16  # characters of a field that is interpreted

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_WHOLE_NUMBER = re.compile("[+-]?[0-9]{1,18}")  # No file is larger.
_FLAGS = {**dict.fromkeys(("true", "t", "1", "yes"), True), **dict.fromkeys(("false", "f", "0", "no"), False)}


class HeaderLines:
    """The lines of a header; `offset` counts bytes read, `number` lines read; `is_last`: ended by the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self.offset = 0
        self.number = 0
        self.is_last = False

    def __iter__(self) -> Iterator[bytes]:
        """Yield the lines without their line breaks, to the end of the file."""
        while line := self._file.readline(MAX_HEADER - self.offset + 1):
            self.offset += len(line)
            self.number += 1
            if self.offset > MAX_HEADER or self.number > MAX_LINES:
                limits = f"{MAX_HEADER >> 20} MiB and {MAX_LINES} lines"
                raise UnsupportedFormatError(f"{self._path}: its header does not end within {limits}; damaged, or another format")
            self.is_last = not line.endswith(b"\n")
            line = line.rstrip(b"\r\n")
            # Some readers treat a carriage return as a line break, others as white space.
            wrong = "zero byte" if b"\0" in line else "carriage return before its end" if b"\r" in line else ""
            if wrong:
                raise UnsupportedFormatError(f"{self._path}: damaged header: line {self.number} holds a {wrong}; expected text")
            yield line


@contextmanager
def open_header(path: Path) -> Iterator[HeaderLines]:
    """Open a file to read its header; raise InputError if that is not possible."""
    try:
        with path.open("rb") as file:
            yield HeaderLines(file, path)
    except OSError as error:
        raise cannot_read(path, error) from error


class Fields(dict[str, str]):
    """The fields of a header by name, read as text, flags and numbers; errors quote the line, whose name a separator ends."""

    def __init__(self, path: Path, format_name: str, separator: str) -> None:
        super().__init__()
        self.path = path
        self._format, self._separator = format_name, separator

    def add(self, name: str, value: bytes) -> None:
        """Store the header's value of a field."""
        # File names may be in any encoding: surrogates restore the bytes when a file is opened.
        self[name] = value.strip().decode("utf-8", "surrogateescape")

    def text(self, name: str, default: str | None = None) -> str:
        """Return the text of a field; raise if it is missing and there is no default."""
        value = self.get(name, default)
        if value is None:
            raise UnsupportedFormatError(f"{self.path}: damaged {self._format} header: no line `{name}{self._separator}...`")
        if len(value) > MAX_FIELD:
            raise self.damaged(name, f"at most {MAX_FIELD} characters")
        return value

    def flag(self, name: str, default: str = "False") -> bool:
        """Return a boolean field."""
        value = _FLAGS.get(self.text(name, default).lower())
        if value is None:
            raise self.damaged(name, "True or False")
        return value

    def whole(self, name: str, default: str | None = None) -> int:
        """Return a field that holds one whole number."""
        text = self.text(name, default)
        if not _WHOLE_NUMBER.fullmatch(text):
            raise self.damaged(name, "a whole number")
        return int(text)

    def sizes(self, name: str, count: int) -> tuple[int, ...]:
        """Return a field that holds the number of voxels along each of `count` axes."""
        words = self.text(name).split()
        if len(words) != count or not all(map(_WHOLE_NUMBER.fullmatch, words)):
            raise self.damaged(name, f"{count} whole numbers, as many as there are dimensions")
        sizes = tuple(map(int, words))
        if min(sizes) < 1:
            raise self.damaged(name, "sizes of at least 1")
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
        return UnsupportedFormatError(f"{self.path}: damaged {self._format} header: {line}; expected {expected}")


def finite_numbers(words: list[str]) -> tuple[float, ...] | None:
    """Return words as numbers; None if one of them is not a finite number."""
    values = tuple(float(word) if _NUMBER.fullmatch(word) else math.nan for word in words)
    return values if all(map(math.isfinite, values)) else None


OUTSIDE_FILES = "CRFREFINE_OUTSIDE_FILES"

# Signs that turn left, posterior, superior into RAS+, the convention of all affines here.
LPS = (-1.0, -1.0, 1.0)
# From direction, origin and spacing in LPS to the lines that place a grid.
GeometryLines = Callable[["NDArray[np.float64]", "NDArray[np.float64]", tuple[float, ...]], tuple[str, ...]]


def voxel_path(header_path: Path, name: str, *, is_compressed: bool) -> Path:
    """Return the file that a header names, relative to its folder; raise RareHeaderError for a list or a pattern of files."""
    # CRFREFINE_OUTSIDE_FILES may forbid files outside the folder. SimpleITK would not compare the
    # checksums of several files.
    several = "%" in name or name.upper().split()[:1] == ["LIST"]
    rule = os.environ.get(OUTSIDE_FILES, "allow")
    if rule not in ("allow", "refuse"):
        raise InputError(f"environment variable {OUTSIDE_FILES}: expected allow or refuse, found {shorten(rule)!r}")
    path = header_path.parent / name
    if rule == "refuse":
        folders = {header_path.parent.resolve(), header_path.resolve().parent}
        if several or not any(folder in path.resolve().parents for folder in folders):
            where = "several files" if several else f"{shorten(path, 200)}, outside its folder"
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
    own: tuple[str, ...] = like.header.template if like.header is not None and like.header.format == format_name else ()
    if own:
        return own
    if is_sheared(like.affine):
        raise UnsupportedFormatError(
            f"{path}: this format cannot hold the sheared axes of {like.path or 'the volume'}; write NIfTI (.nii.gz) instead"
        )
    num_axes = len(like.spacing)
    lps = np.diag([*LPS, 1.0]) @ like.affine + 0.0  # Adding zero turns -0 into 0.
    spacing = spacing_of(like.affine, num_axes)
    return geometry_lines(lps[:num_axes, :num_axes] / np.array(spacing), lps[:num_axes, 3], spacing)
