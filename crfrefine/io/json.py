"""JSON: strict reading of files written by others, with errors that name fault and place; values for our own files.

Python's parser accepts NaN, infinity, numbers of any size and duplicate keys. Files may hold those in entries that are not used:
the result has `Unusable` in their place, and `require_usable` names the first one below an entry that is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

from crfrefine.base.text import shorten
from crfrefine.errors import InputError

MAX_BYTES = 1 << 26
"""Largest size of a file; a `dataset.json` with a hundred thousand cases has a few megabytes."""

_MAX_DIGITS = 30
_MAX_OF_A_KEY = 400


@dataclass(frozen=True)
class Unusable:
    """A value that JSON does not allow or that has no meaning."""

    reason: str  # its fault


def read_json(path: Path, most_bytes: int = MAX_BYTES) -> Any:
    """Read a JSON file of at most `most_bytes`; unusable values become `Unusable`.

    Raises:
        InputError: the file is not a regular file, cannot be read, or is not JSON; with line and column.
    """
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):
            raise InputError(f"{path}: expected a JSON file, this is {'a folder' if S_ISDIR(status.st_mode) else 'not a regular file'}")
        if status.st_size > most_bytes:
            raise InputError(
                f"{path}: {status.st_size / 1e6:.0f} MB are too much for a JSON file; at most {most_bytes / 1e6:.0f} MB are read"
            )
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        text = content.decode("utf-8-sig")  # Some editors begin a file with a byte order mark.
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise InputError(f"{path}: not JSON: line {line}, byte {column}: this is not UTF-8 text; save the file as UTF-8") from None
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None


def parse_json(text: str) -> Any:
    """Parse JSON; raise ValueError with a plain explanation, line and column."""
    if not text.strip():
        raise ValueError("the file is empty")
    try:
        return json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=_constant, object_pairs_hook=_table)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg.removesuffix(': ')}") from None
    except RecursionError:
        raise ValueError("lists or tables are nested too deeply") from None


def require_usable(value: Any, key: str) -> None:
    """Raise ValueError with the dotted key of the first `Unusable` in a value, if there is one."""
    waiting = [(key, value)]  # No recursion: the parser allows deeper nesting than Python.
    while waiting:
        name, entry = waiting.pop()
        if isinstance(entry, Unusable):
            raise ValueError(f"{name}: {entry.reason}")
        if isinstance(entry, Mapping):
            waiting += [
                (f"{name}.{shorten(inner, 40)}" if name else shorten(inner), below) for inner, below in reversed(list(entry.items()))
            ]
        elif isinstance(entry, list):
            waiting += [(f"{name}[{index}]", below) for index, below in reversed(list(enumerate(entry)))]
        if len(name) > _MAX_OF_A_KEY:
            raise ValueError(f"{shorten(name)}: lists or tables are nested too deeply")


def _integer(text: str) -> int | Unusable:
    return int(text) if len(text) <= _MAX_DIGITS else Unusable(f"{shorten(text, 20)} is a number of {len(text)} digits")


def _number(text: str) -> float | Unusable:
    value = float(text)
    return value if abs(value) < float("inf") else Unusable(f"{shorten(text, 20)} is larger than any number that can be stored")


def _constant(text: str) -> Unusable:
    return Unusable(f"{text} is not a JSON number")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        table[key] = Unusable("the key appears twice") if key in table else value
    return table


def without_nonfinite(value: Any) -> Any:
    """Return the value with None for each NaN and infinity in it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nonfinite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_nonfinite(entry) for entry in value)
    return value
