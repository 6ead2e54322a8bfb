"""Outputs that are not regular files, such as devices, pipes and /dev/stdout: written to directly or refused, never replaced."""

from __future__ import annotations

import errno
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

from crfrefine.errors import CrfRefineError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
)
# Names such as /dev/stdout and /proc/self/fd/1 point there.
_DESCRIPTOR_FOLDERS = ("/dev/fd", "/proc/self/fd", "/proc/thread-self/fd")
_MAX_LINKS = 40  # as many as Linux follows


def special_kind(path: Path) -> str | None:
    """Return the kind of a path, links followed, that is no regular file, such as "a named pipe"; None for a regular file or a free name.

    Raises:
        OSError: the system does not tell, as for names that are too long and circular links.
    """
    if _descriptor(path) is not None:
        return "a stream of this process"
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), None)


def check_special(path: Path) -> None:
    """Raise CrfRefineError if the path cannot take plain bytes, or this user may not write to it.

    A pipe is not opened: its reader would take the closing for the end of the data.
    """
    kind = special_kind(path)
    if kind in ("a folder", "a block device", "a socket"):
        raise CrfRefineError(f"{path}: cannot be written: it is {kind}; name a regular file, a character device or a pipe")
    if _descriptor(path) is None and not os.access(path, os.W_OK):
        raise CrfRefineError(f"{path}: cannot be written: it is {kind} that this user may not write to")


def write_special(path: Path, content: bytes) -> None:
    """Write to a character device, a pipe with a reader, or a stream of this process, without replacing it."""
    check_special(path)
    try:
        with os.fdopen(_open(path), "wb") as file:
            file.write(content)
    except OSError as error:
        raise CrfRefineError(f"{path}: cannot be written: {_reason(path, error)}") from error


def _open(path: Path) -> int:
    """Return a new blocking descriptor for a path that passed `check_special`."""
    own = _descriptor(path)
    if own is not None:
        # A file that a stream is redirected to must not be opened again: writing would begin at its start.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, or none at all
                stream.flush()
        return os.dup(own)
    # Without O_NONBLOCK, a pipe without a reader would block the process forever.
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
        os.close(descriptor)
        raise OSError(errno.EBUSY, "it was replaced by another file while it was opened")
    os.set_blocking(descriptor, True)
    return descriptor


def _descriptor(path: Path) -> int | None:
    """Return the file descriptor of this process that a name such as /dev/stdout points to; None for any other name."""
    folders = {Path(os.path.realpath(folder)) for folder in _DESCRIPTOR_FOLDERS}
    for _ in range(_MAX_LINKS):
        folder = Path(os.path.realpath(path.parent))
        if path.name.isdecimal() and folder in folders:
            return int(path.name)
        if not path.is_symlink():
            return None
        path = folder / path.readlink()
    return None


def _reason(path: Path, error: OSError) -> str:
    if error.errno == errno.ENXIO:
        return f"it has no reader (it is {special_kind(path)}); start the reader first"
    if error.errno == errno.EPIPE:
        return "its reader closed it before the end"
    return error.strerror or str(error)
