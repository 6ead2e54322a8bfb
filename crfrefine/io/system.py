"""What Linux offers for files and other systems do not: flags of `os.open`, locks, owners, files without names.

This module alone asks the operating system for it.

macOS has no `/proc` and no files without names. Windows has no locks of this kind and no owners, and an open file keeps its name there: it
can be neither replaced nor removed before it is closed.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    HAS_LOCKS = False
else:
    HAS_LOCKS = True

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_REFUSED_NAME = re.compile(r'.*[<>:"|?*\\\x00-\x1f].*|.*[ .]|(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?', re.IGNORECASE)
"""Names that Windows does not take; with a colon, it would write to a hidden part of another file."""


def open_flags(*names: str) -> int:
    """Return the flags of `os.open` with these names, without those that this system lacks; bytes are written as they are."""
    number = getattr(os, "O_BINARY", 0)  # Windows would write a line end as two bytes.
    for name in names:
        number |= getattr(os, name, 0)
    return number


def lock(descriptor: int) -> bool:
    """Lock a file until it is closed, on a system that `HAS_LOCKS`; return False if another process has it, or it has no name left."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(descriptor).st_nlink > 0


@contextmanager
def locked(descriptor: int) -> Iterator[None]:
    """Hold the lock of a file in this block, after every other process that has it; storage without locks is used without one."""
    has_lock = HAS_LOCKS
    if has_lock:
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


def is_refused(name: str) -> bool:
    """Return whether this system takes no file of this name, or another one in its place."""
    return hasattr(os, "O_TEMPORARY") and _REFUSED_NAME.fullmatch(name) is not None


def ignores_case(folder: Path) -> bool:
    """Return whether names that differ only in upper and lower case are one file in a folder, which need not exist yet.

    So it is by default on macOS and Windows, and on disks that come from there. The nearest folder above that exists and has a letter in
    its name is looked up in the other case.
    """
    path = Path(os.path.realpath(folder))
    for known in (path, *path.parents):
        other = known.with_name(known.name.swapcase()) if known.name else known
        if other != known and known.exists():
            return other.exists() and other.samefile(known)
    return False
