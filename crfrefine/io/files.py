"""Which files a name stands for: a text header may have its voxels in a file of their own, which is read and written with it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from crfrefine.errors import UnexpectedError
from crfrefine.failures import reading
from crfrefine.io.formats import Format
from crfrefine.io.paths import format_of, written_voxel_file
from crfrefine.io.recognition import recognize


def files_read(path: Path) -> tuple[Path, ...]:
    """Return the file, and those with its voxels where its header names such files."""
    known = format_of(path) or recognize(path)
    if isinstance(known, Format) and known.voxel_endings:
        # Reading the file says what is wrong with it, and names its case: here other cases are looked at as well.
        with suppress(UnexpectedError), reading(path):
            return (path, *known.load().voxel_files(path))
    return (path,)


def files_written(path: Path) -> tuple[Path, ...]:
    """Return the file, and the one with its voxels where the format keeps them apart."""
    voxels = written_voxel_file(path)
    return (path,) if voxels is None else (path, voxels)


def identities(path: Path) -> set[Path | tuple[int, int]]:
    """Return what tells whether two names mean one file, as far as both have an element in common."""
    found: set[Path | tuple[int, int]] = {Path(os.path.realpath(path))}  # no exception where links lead in a circle
    # Where upper and lower case are one, as on many disks of other systems, names differ and the file is the same.
    with suppress(OSError):
        status = path.stat()
        found.add((status.st_dev, status.st_ino))
    return found
