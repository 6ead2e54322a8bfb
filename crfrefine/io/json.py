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
from contextlib import suppress
from pathlib import Path
from typing import Any

from crfrefine.base.failures import expected_error
from crfrefine.base.text import shorten_value
from crfrefine.errors import InputError
from crfrefine.io.paths import require_file
from crfrefine.io.writing import cannot_write, check_replaceable

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


class LineFile:
    """A file to which several processes may add lines of JSON, each with the `common` values."""

    def __init__(self, path: Path, **common: Any) -> None:
        (target,) = check_replaceable(path)
        self._path = path
        self._common = common
        self._waiting = b""  # lines that the disk has not taken
        try:
            self._file = os.open(target, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise cannot_write(path, error) from error

    def append(self, *lines: Mapping[str, Any]) -> None:
        """Add lines, after those still waiting; raise CrfRefineError if the disk takes none."""
        # Processes that do so at the same time wait for each other, except on storage without
        # locks, where lines may be lost. A last line that a killed process left unfinished is
        # removed. It waits until the disk has the lines. One thread at a time.
        added = [to_json({**self._common, **line}) for line in lines]
        self._waiting += "".join(added).encode()
        try:
            self._write()
        except OSError as error:
            raise cannot_write(self._path, error) from error
        self._waiting = b""

    def _write(self) -> None:
        """Write the waiting lines after the last whole one; after an error, there is no new line.

        Storage without locks is used without one.
        """
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        size = os.fstat(self._file).st_size
        try:
            start = size
            tail = b""
            while start > 0 and b"\n" not in tail:
                begin = max(0, start - max(1 << 16, len(tail)))
                tail = os.pread(self._file, start - begin, begin) + tail
                start = begin
            last_line = tail.rpartition(b"\n")[2]
            content = self._waiting
            if last_line and not isinstance(parse_line(last_line), dict):
                size -= len(last_line)
                os.ftruncate(self._file, size)
            elif last_line:  # An editor may leave out the last line break.
                content = b"\n" + content
            while content:
                content = content[os.write(self._file, content) :]
            os.fsync(self._file)
        except BaseException:
            os.ftruncate(self._file, size)
            raise
        finally:
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Write the waiting lines, and close the file."""
        try:
            if self._waiting:
                self.append()
        finally:
            os.close(self._file)


def parse_line(line: bytes) -> Any:
    """Return the value of a line; None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
