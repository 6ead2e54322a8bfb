"""JSON: reading of files written by others, with errors that name fault and place; values for our own files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

from crfrefine.errors import InputError

MAX_BYTES = 1 << 26
"""Largest size of a file; a `dataset.json` with a hundred thousand cases has a few megabytes."""


def read_json(path: Path, most_bytes: int = MAX_BYTES) -> Any:
    """Read a JSON file of at most `most_bytes`.

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
        return parse_json(content.decode("utf-8-sig"))  # Some editors begin a file with a byte order mark.
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: not JSON: line {line}: this is not UTF-8 text; save the file as UTF-8") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None


def parse_json(text: str) -> Any:
    """Parse JSON; raise ValueError with a plain explanation, line and column. NaN and infinity are numbers, as in Python."""
    try:
        return json.loads(text, object_pairs_hook=_table)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg.removesuffix(': ')}") from None
    except RecursionError:
        raise ValueError("lists or tables are nested too deeply") from None


class Twice:
    """The value of a key that appears twice in a table: no check takes it."""

    def __repr__(self) -> str:
        return "a key that appears twice"


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        table[key] = Twice() if key in table else value
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
