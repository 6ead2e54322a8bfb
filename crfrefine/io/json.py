"""JSON: files that users give, with errors that name fault and place, and values to write.

Several processes may add lines to one file at the same time.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crfrefine.base.failures import expected_error
from crfrefine.base.text import shorten_value
from crfrefine.errors import InputError
from crfrefine.io.paths import require_file
from crfrefine.io.writing import cannot_write

# Largest size of a file; a `dataset.json` with a hundred thousand cases has a few megabytes.
MAX_BYTES = 1 << 26


def read_json(path: Path) -> Any:
    """Read a JSON file of at most MAX_BYTES; raise InputError with the place of a fault."""
    require_file(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(
                f"{path}: too much for a JSON file; at most {MAX_BYTES / 1e6:.0f} MB are read"
            )
        # Some editors begin a file with a byte order mark.
        text = path.read_bytes().decode("utf-8-sig")
        # NaN and infinity are numbers, as in Python.
        return json.loads(text, object_pairs_hook=_table)
    except OSError as error:
        raise expected_error(error, path) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not JSON: byte {error.start} is not UTF-8 text; save the file as UTF-8"
        ) from None
    except RecursionError:
        raise InputError(f"{path}: not JSON: lists or tables are nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {shorten_value(key)} appears twice in a table")
    return table


def without_nonfinite(value: Any) -> Any:
    """Return the value with None for each NaN and infinity in it."""
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return None
    if isinstance(value, dict):
        return {key: without_nonfinite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nonfinite(entry) for entry in value]
    return value


def to_json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """Return values as JSON with a line break at its end, numbers that JSON lacks as null."""
    shown = dict(values)
    write = functools.partial(json.dumps, indent=indent, default=str, allow_nan=False)
    try:
        text = write(shown)
    except ValueError:  # NaN or infinity, which few records have
        text = write(without_nonfinite(shown))
    return text + "\n"


def add_lines(path: Path, waiting: list[Mapping[str, Any]]) -> None:
    """Add lines of JSON to a file, and empty their list; raise CrfRefineError, and add none.

    Several processes may do so at the same time: they wait for each other, except on storage
    without locks, where lines may be lost. A last line that a killed process left unfinished is
    removed. The disk has the lines in the end.
    """
    content = "".join(map(to_json, waiting)).encode()
    try:
        with path.open("a+b", buffering=0) as file:  # Closing it ends the lock.
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
            size = os.fstat(file.fileno()).st_size
            start = size
            tail = b""
            while start > 0 and b"\n" not in tail:
                begin = max(0, start - max(1 << 16, len(tail)))
                tail = os.pread(file.fileno(), start - begin, begin) + tail
                start = begin
            last_line = tail.rpartition(b"\n")[2]
            if last_line and not isinstance(parse_line(last_line), dict):
                size -= len(last_line)
                file.truncate(size)
            elif last_line:  # An editor may leave out the last line break.
                content = b"\n" + content
            try:
                while content:
                    content = content[file.write(content) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(size)
                raise
    except OSError as error:
        raise cannot_write(path, error) from error
    waiting.clear()


def parse_line(line: bytes) -> Any:
    """Return the value of a line; None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
