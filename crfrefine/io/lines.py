"""Files of JSON lines that several processes may write at a time: each line is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from crfrefine.io.atomic import cannot_write, check_replaceable
from crfrefine.io.json import parse_json
from crfrefine.io.system import locked

_BLOCK_BYTES = 1 << 16


def open_lines(path: Path) -> int:
    """Return the descriptor of a file to add lines to; the file is created if it does not exist.

    Raises:
        CrfRefineError: the file is an input or not a regular file, or the system refuses to open it.
    """
    (target,) = check_replaceable(path)
    try:
        return os.open(target, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise cannot_write(path, error) from error


def append_lines(descriptor: int, lines: bytes, *, sync: bool = False) -> None:
    """Add whole lines to the end of a file. Processes that do so at the same time wait for each other.

    A last line that a killed process left unfinished is removed. Storage without locks lets no process wait: lines may be lost there.

    Args:
        descriptor: of `open_lines`; one thread uses it at a time.
        lines: each ends with a line break.
        sync: whether to wait until the disk has them.

    Raises:
        OSError: such as of a full disk; then no line was written.
    """
    with locked(descriptor):
        size = os.fstat(descriptor).st_size
        tail = _last_line(descriptor, size)
        if unfinished_line(tail):
            size -= len(tail)
            os.ftruncate(descriptor, size)
        elif tail:  # An editor may leave out the last line break.
            lines = b"\n" + lines
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            if sync:
                os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, size)
            raise


def unfinished_line(content: bytes) -> int:
    """Return the number of bytes of an unfinished line at the end of JSON lines; 0 without one."""
    tail = content[content.rfind(b"\n") + 1 :]
    return 0 if not tail or isinstance(parse_line(tail), dict) else len(tail)


def parse_line(line: bytes) -> Any:
    """Return the value of a line; None if it is not JSON."""
    try:
        return parse_json(line.decode())
    except ValueError:  # UnicodeDecodeError is one, too.
        return None


def _last_line(descriptor: int, size: int) -> bytes:
    """Return the part after the last line break of a file."""
    start, tail = size, b""
    while start > 0 and b"\n" not in tail:
        begin = max(0, start - max(_BLOCK_BYTES, len(tail)))
        os.lseek(descriptor, begin, os.SEEK_SET)  # Lines go to the end of the file wherever it was read.
        tail = os.read(descriptor, start - begin) + tail
        start = begin
    return tail.rpartition(b"\n")[2]
