"""Parse text headers of MetaImage and NRRD, line by line and number by number.

The input may be damaged or hostile: time and memory are bounded, and every error is an UnsupportedFormatError that names the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.streams import cannot_read

MAX_HEADER = 1 << 24  # bytes; segment tables of 3D Slicer take a hundredth of it
MAX_LINES = 1 << 18
MAX_FIELD = 1 << 16  # characters of a field that is interpreted
MAX_NUMBER = 400  # digits; a float64 printed in full has 309 before the point

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_MAX_WHOLE = 1 << 62


class HeaderLines:
    """The lines of a header, and the offset of the next one in the file.

    Attributes:
        offset: bytes read.
        number: number of the line read last, counted from 1.
        is_last: the line read last ends the file without a line break.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self.offset = 0
        self.number = 0
        self.is_last = False

    def __iter__(self) -> Iterator[bytes]:
        """Yield the lines without their line breaks, to the end of the file."""
        while (line := self._read()) is not None:
            yield line

    def _read(self) -> bytes | None:
        line = self._file.readline(MAX_HEADER - self.offset + 1)
        self.offset += len(line)
        self.number += 1
        if self.offset > MAX_HEADER or self.number > MAX_LINES:
            raise UnsupportedFormatError(
                f"{self._path}: its header does not end within {MAX_HEADER >> 20} MiB and {MAX_LINES} lines; "
                "damaged, or not a file of this format"
            )
        if not line:
            return None
        if b"\0" in line:
            raise UnsupportedFormatError(f"{self._path}: damaged header: line {self.number} holds a zero byte; expected text")
        self.is_last = not line.endswith(b"\n")
        line = line.rstrip(b"\r\n")
        if b"\r" in line:
            # Some readers treat it as a line break, others as white space.
            raise UnsupportedFormatError(f"{self._path}: damaged header: line {self.number} holds a carriage return before its end")
        return line


@contextmanager
def open_header(path: Path) -> Iterator[HeaderLines]:
    """Open a file to read its header; raise InputError if that is not possible, UnsupportedFormatError for an empty file."""
    if not path.is_file():
        # Reading a pipe could block forever.
        raise InputError(f"{path}: expected a regular file")
    try:
        with path.open("rb") as file:
            if not file.peek(1):
                raise UnsupportedFormatError(f"{path}: the file is empty")
            yield HeaderLines(file, path)
    except OSError as error:
        raise cannot_read(path, error) from error


class Fields:
    """The fields of a header by name, read as text, flags and numbers; errors quote the line, whose name a separator ends."""

    def __init__(self, path: Path, format_name: str, separator: str) -> None:
        self.path = path
        self._format, self._separator = format_name, separator
        self._texts: dict[str, str] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._texts

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def set(self, name: str, value: bytes) -> None:
        """Store the header's value of a field."""
        # File names may be in any encoding: surrogates restore the bytes when a file is opened.
        self._texts[name] = value.strip().decode("utf-8", "surrogateescape")

    def text(self, name: str, default: str | None = None) -> str:
        """Return the text of a field; raise if it is missing and there is no default."""
        value = self._texts.get(name, default)
        if value is None:
            raise UnsupportedFormatError(f"{self.path}: damaged {self._format} header: no line `{name}{self._separator}...`")
        if len(value) > MAX_FIELD:
            raise self.damaged(name, f"at most {MAX_FIELD} characters")
        return value

    def flag(self, name: str, default: str = "False") -> bool:
        """Return a boolean field."""
        word = self.text(name, default).lower()
        if word not in ("true", "t", "1", "yes", "false", "f", "0", "no"):
            raise self.damaged(name, "True or False")
        return word in ("true", "t", "1", "yes")

    def whole(self, name: str, default: str | None = None) -> int:
        """Return a field that holds one whole number."""
        value = whole_number(self.text(name, default))
        if value is None:
            raise self.damaged(name, "a whole number")
        return value

    def sizes(self, name: str, count: int) -> tuple[int, ...]:
        """Return a field that holds the number of voxels along each of `count` axes."""
        values = [whole_number(word) for word in self.text(name).split()]
        sizes = tuple(value for value in values if value is not None)
        if len(sizes) != count or len(values) != count:
            raise self.damaged(name, f"{count} whole numbers, as many as there are dimensions")
        if min(sizes) < 1:
            raise self.damaged(name, "sizes of at least 1")
        return sizes

    def numbers(self, name: str, count: int, *, exact: bool = True) -> tuple[float, ...]:
        """Return the first `count` finite numbers of a field; it may have more unless `exact`."""
        values = [finite_number(word) for word in self.text(name).split()]
        wanted = tuple(value for value in values[:count] if value is not None)
        if len(wanted) < count or (exact and len(values) > count):
            raise self.damaged(name, f"{count} finite numbers")
        return wanted

    def damaged(self, name: str, expected: str) -> UnsupportedFormatError:
        """Return the error for a field that cannot be used."""
        line = f"{name}{self._separator}{shown(self._texts.get(name, ''))}"
        return UnsupportedFormatError(f"{self.path}: damaged {self._format} header: {line}; expected {expected}")


def finite_number(word: str) -> float | None:
    """Return a word as a number; None if it is not a finite number."""
    if len(word) > MAX_NUMBER or not _NUMBER.fullmatch(word):
        return None
    value = float(word)
    return value if math.isfinite(value) else None


def whole_number(word: str) -> int | None:
    """Return a word as a whole number, even if written as 4.0 or 1e2; None if it is not one, or larger than any file."""
    value = finite_number(word)
    if value is None or not value.is_integer() or abs(value) > _MAX_WHOLE:
        return None
    return int(word) if word.lstrip("+-").isdigit() else int(value)


def shown(text: str | bytes, most: int = 60) -> str:
    """Return text of a file for a message: of bounded length, without terminal control characters."""
    if isinstance(text, bytes):
        text = text[: 4 * most + 4].decode("utf-8", "backslashreplace")
    cut = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in cut)
