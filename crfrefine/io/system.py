"""What Linux offers for files and other systems do not: flags of `os.open`, locks, owners, files without names. Asked for here alone.

macOS has no `/proc` and no files without names. Windows has no locks of this kind and no owners, and an open file keeps its name there: it
can be neither replaced nor removed before it is closed.
"""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    HAS_LOCKS = False
else:
    HAS_LOCKS = True

LONGEST_NAME = 255  # bytes, if the system does not tell


def open_flags(*names: str) -> int:
    """Return the flags of `os.open` with these names, without those that this system lacks; bytes are written as they are."""
    number = getattr(os, "O_BINARY", 0)  # Windows would write a line end as two bytes.
    for name in names:
        number |= getattr(os, name, 0)
    return number


def knows_unnamed_files() -> bool:
    """Return whether the system knows files without a name; not all of its disks do."""
    return hasattr(os, "O_TMPFILE")


def removes_when_closed() -> bool:
    """Return whether the system removes a file opened with `O_TEMPORARY` when it is closed, as it cannot be removed before."""
    return hasattr(os, "O_TEMPORARY")


def lock(descriptor: int) -> bool:
    """Lock a file until it is closed, on a system that `HAS_LOCKS`; return False if another process has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_own(status: os.stat_result) -> bool:
    """Return whether a file is this user's, or the system does not tell whose files are."""
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()


def longest_name(folder: Path) -> int:
    """Return how many bytes the name of a file in a folder may have."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows; a missing folder, which is reported when the file is opened.
        return LONGEST_NAME
