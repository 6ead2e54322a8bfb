"""The files that a name stands for: the voxels of a text header may be in a separate file, which is read and written with it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from crfrefine.base.failures import reading
from crfrefine.errors import UnexpectedError
from crfrefine.io.formats import Format
from crfrefine.io.paths import format_of, written_voxel_file
from crfrefine.io.recognition import named_header, recognize


def files_read(path: Path) -> tuple[Path, ...]:
    """Return the file, and the files with its voxels if its header names any."""
    path = named_header(path)
    known = format_of(path) or recognize(path)
    if isinstance(known, Format) and (known.voxel_endings or known.is_folder):
        # Reading the file later reports the error with its case; this function also looks at other cases.
        with suppress(UnexpectedError), reading(path):
            return (path, *known.voxel_files(path))
    return (path,)


def files_written(path: Path) -> tuple[Path, ...]:
    """Return the file, and the file with its voxels if the format separates them."""
    voxels = written_voxel_file(path)
    return (path,) if voxels is None else (path, voxels)


def identities(path: Path) -> set[Path | tuple[int, int]]:
    """Return identities of a file; two names mean the same file if their sets share an element."""
    found: set[Path | tuple[int, int]] = {Path(os.path.realpath(path))}  # no exception for circular links
    # On case-insensitive file systems, different names can mean the same file.
    with suppress(OSError):
        status = path.stat()
        found.add((status.st_dev, status.st_ino))
    return found
