"""Rare encodings of voxels: numbers as text, hexadecimal digits, bzip2. Each is read as a stream, in bounded memory."""

from __future__ import annotations

import bz2
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.streams import INPUT_BYTES, ByteReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEXT_DTYPE = np.dtype(np.float64)
"""The type that a TextReader returns, whatever the type of the voxels."""

_LONGEST_WORD = 64
_TO_SPACE = bytes.maketrans(b"\t\r\n\v\f", b"     ")
_NUMBERS = re.compile(rb"[-+0-9.eEnaifNAIF ]*")


class TextReader:
    """Numbers as text, separated by white space or by commas and white space, as the bytes of a float64 array.

    Args:
        reader: stands at the first number.
        path: the file, for errors.
        dtype: type of the voxels; a number outside its range is an error.
    """

    def __init__(self, reader: ByteReader, path: Path, dtype: np.dtype[Any]) -> None:
        self._reader, self._path, self._dtype = reader, path, dtype
        self._rest = b""
        self._values = np.empty(0, TEXT_DTYPE)
        self._ended = False

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end of the text."""
        count = size // TEXT_DTYPE.itemsize
        parts = []
        while count > 0:
            if not len(self._values):
                if self._ended:
                    break
                self._values = self._next()
            part, self._values = self._values[:count], self._values[count:]
            parts.append(part)
            count -= len(part)
        return b"".join(part.tobytes() for part in parts)

    def _next(self) -> NDArray[np.float64]:
        block = self._reader.read(INPUT_BYTES)
        self._ended = not block
        text = self._rest + block.translate(_TO_SPACE)
        # The number after the last space may continue in the next block.
        cut = len(text) if self._ended else text.rfind(b" ") + 1
        text, self._rest = text[:cut].replace(b", ", b" "), text[cut:]
        words = text.split()
        if max(map(len, words), default=0) > _LONGEST_WORD or len(self._rest) > _LONGEST_WORD or not _NUMBERS.fullmatch(text):
            raise self._damaged("something that is not a number")
        if not words:
            return np.empty(0, TEXT_DTYPE)
        try:
            values = np.array(words).astype(TEXT_DTYPE)
        except ValueError:
            raise self._damaged("something that is not a number") from None
        if self._dtype.kind in "iu":
            limits = np.iinfo(self._dtype)
            if not ((values >= limits.min) & (values <= limits.max) & (values == np.rint(values))).all():
                raise self._damaged(f"numbers that do not fit {self._dtype.name}")
        return values

    def _damaged(self, what: str) -> UnsupportedFormatError:
        return UnsupportedFormatError(f"{self._path}: damaged: its voxels are numbers as text, and there is {what} among them")


class HexReader:
    """Bytes as hexadecimal digits; white space is ignored."""

    def __init__(self, reader: ByteReader, path: Path, dtype: np.dtype[Any]) -> None:
        del dtype
        self._reader, self._path = reader, path
        self._digits = b""

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end of the text."""
        parts = [self._digits]
        missing = 2 * size - len(self._digits)
        while missing > 0:
            block = self._reader.read(max(missing, INPUT_BYTES))
            if not block:
                break
            parts.append(block.translate(None, b" \t\r\n\v\f"))
            missing -= len(parts[-1])
        digits = b"".join(parts)
        taken, self._digits = digits[: 2 * size], digits[2 * size :]
        try:
            return bytes.fromhex(taken[: len(taken) // 2 * 2].decode("ascii"))
        except ValueError:
            raise UnsupportedFormatError(f"{self._path}: damaged: its voxels are hexadecimal digits, and others are among them") from None


class Bzip2Reader:
    """One or several bzip2 streams, one after the other."""

    def __init__(self, reader: ByteReader, path: Path, dtype: np.dtype[Any]) -> None:
        del dtype
        stored: Any = reader
        self._file = bz2.BZ2File(stored)
        self._path = path

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end; raise UnsupportedFormatError if the data are damaged or cut off."""
        try:
            data: bytes = self._file.read(size)
            return data
        except EOFError:
            raise UnsupportedFormatError(
                f"{self._path}: the compressed data end too early; the file is cut off, copy or export it again"
            ) from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise UnsupportedFormatError(f"{self._path}: damaged compressed data ({error}); copy or export the file again") from None


_Reader = Callable[[ByteReader, Path, np.dtype[Any]], ByteReader]
READERS: dict[str, _Reader] = {"text": TextReader, "hex": HexReader, "bzip2": Bzip2Reader}
