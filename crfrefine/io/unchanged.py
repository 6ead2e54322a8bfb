"""Inputs that change while they are read: the header of one file and the voxels of another, or voxels of both, would make one case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from crfrefine.errors import InputError

FileState: TypeAlias = tuple[Path, int, int, int]
"""A file, and what changes with its content: the number of its inode, its bytes, the nanosecond of its last change."""


def states_of(paths: Sequence[Path]) -> tuple[FileState, ...]:
    """Return the states of files; those that are not there have none, and reading reports them."""
    found = []
    for path in paths:
        try:
            status = path.stat()
        except (OSError, ValueError):
            continue
        found.append((path, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def require_unchanged(states: Sequence[FileState]) -> None:
    """Raise an error if a file is not as it was.

    Raises:
        InputError: it has other content.
        OSError: it is gone.
    """
    for path, *state in states:
        status = path.stat()
        if [status.st_ino, status.st_size, status.st_mtime_ns] != state:
            raise InputError(f"{path}: was changed while it was read; run again when nothing writes to it any more")
