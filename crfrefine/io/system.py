"""Locks of files, and disks on which upper and lower case are the same."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(descriptor: int) -> Iterator[None]:
    """Hold the lock of a file in this block, after every other process that has it; storage without locks is used without one."""
    has_lock = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        has_lock = False
    try:
        yield
    finally:
        if has_lock:
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def ignores_case(folder: Path) -> bool:
    """Return whether names that differ only in upper and lower case are one file in a folder, which need not exist yet.

    So it is on many network drives and USB disks. The nearest folder above that exists and has a letter in its name is
    looked up in the other case.
    """
    path = Path(os.path.realpath(folder))
    for known in (path, *path.parents):
        other = known.with_name(known.name.swapcase()) if known.name else known
        if other != known and known.exists():
            return other.exists() and other.samefile(known)
    return False
