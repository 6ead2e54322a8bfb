"""Rare encodings of voxels: numbers as text, hexadecimal digits, bzip2. Each is read in blocks, in bounded memory."""

from __future__ import annotations

import bz2
import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.streams import BLOCK_BYTES, INPUT_BYTES, ByteReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEXT_DTYPE = np.dtype(np.float64)
"""The type of numbers that were text, whatever the type of the voxels."""

_LONGEST_WORD = 64
_TO_SPACE = bytes.maketrans(b"\t\r\n\v\f", b"     ")
_NUMBERS = re.compile(rb"[-+0-9.eEnaifNAIF ]*")

_Blocks = Generator[bytes, None, None]


def _text_blocks(reader: ByteReader, path: Path, dtype: np.dtype[Any]) -> _Blocks:
    """Yield numbers as text, separated by white space or by commas and white space, as the bytes of TEXT_DTYPE."""
    rest, block = b"", b" "
    while block:
        block = reader.read(INPUT_BYTES)
        text = rest + block.translate(_TO_SPACE)
        # The number after the last space may continue in the next block.
        cut = text.rfind(b" ") + 1 if block else len(text)
        text, rest = text[:cut].replace(b", ", b" "), text[cut:]
        yield _numbers(text, rest, path, dtype).tobytes()


def _numbers(text: bytes, rest: bytes, path: Path, dtype: np.dtype[Any]) -> NDArray[np.float64]:
    words, wrong, values = text.split(), "something that is not a number", np.empty(0, TEXT_DTYPE)
    is_sane = max(map(len, words), default=0) <= _LONGEST_WORD and len(rest) <= _LONGEST_WORD and _NUMBERS.fullmatch(text) is not None
    if is_sane and words:
        try:
            values = np.array(words).astype(TEXT_DTYPE)
        except ValueError:
            is_sane = False
    if is_sane and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        wrong = f"numbers that do not fit {dtype.name}"
        is_sane = bool(((values >= limits.min) & (values <= limits.max) & (values == np.rint(values))).all())
    if not is_sane:
        raise UnsupportedFormatError(f"{path}: damaged: its voxels are numbers as text, and there is {wrong} among them")
    return values


def _hex_blocks(reader: ByteReader, path: Path, dtype: np.dtype[Any]) -> _Blocks:
    """Yield bytes that are hexadecimal digits; white space is ignored."""
    rest = b""
    while block := reader.read(INPUT_BYTES):
        digits = rest + block.translate(None, b" \t\r\n\v\f")
        cut = len(digits) // 2 * 2
        rest = digits[cut:]
        try:
            found = bytes.fromhex(digits[:cut].decode("ascii"))
        except ValueError:
            raise UnsupportedFormatError(f"{path}: damaged: its voxels are hexadecimal digits, and others are among them") from None
        yield found


def _bzip2_blocks(reader: ByteReader, path: Path, dtype: np.dtype[Any]) -> _Blocks:
    """Yield what one or several bzip2 streams hold, one after the other."""
    stored: Any = reader
    file = bz2.BZ2File(stored)
    try:
        while block := file.read(BLOCK_BYTES):
            yield block
    except EOFError:
        raise UnsupportedFormatError(f"{path}: the compressed data end too early; the file is cut off, copy or export it again") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise UnsupportedFormatError(f"{path}: damaged compressed data ({error}); copy or export the file again") from None


BLOCKS: dict[str, Callable[[ByteReader, Path, np.dtype[Any]], _Blocks]] = {"text": _text_blocks, "hex": _hex_blocks, "bzip2": _bzip2_blocks}
"""From the name of an encoding to what decodes the stream at its first voxel; the type is that of the voxels."""
