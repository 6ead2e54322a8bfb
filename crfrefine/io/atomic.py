"""Files that are there whole or not at all: written under a hidden name beside the target, then renamed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from crfrefine.errors import CrfRefineError


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only when the block ends well.

    Whatever ends the block early, Ctrl-C included, removes what was written; a killed process leaves `.NAME.tmp-PID` at most.

    Args:
        path: the file to be; one that is there already is replaced at the end.

    Raises:
        CrfRefineError: the folder cannot be written to, or the disk is full.
    """
    with atomic_files(path) as (file,):
        yield file


@contextmanager
def atomic_files(*paths: Path) -> Iterator[tuple[BinaryIO, ...]]:
    """Open files that belong together; the last one names the others and comes into being after them.

    Args:
        paths: the files to be, all in one folder, such as the voxels and then their header.

    Raises:
        CrfRefineError: the folder cannot be written to, or the disk is full.
    """
    temporary = [temporary_name(path) for path in paths]
    placed: list[Path] = []
    files: list[BinaryIO] = []
    try:
        for name in temporary:
            files.append(name.open("wb"))
        yield tuple(files)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        if len(paths) > 1:
            # An old header must not be seen beside new voxels, not even for an instant.
            paths[-1].unlink(missing_ok=True)
        for name, path in zip(temporary, paths, strict=True):
            name.replace(path)
            placed.append(path)
    except BaseException as error:
        for file in files:
            with suppress(OSError):  # On a full disk, closing fails once more.
                file.close()
        for leftover in temporary + (placed if len(placed) < len(paths) else []):
            with suppress(OSError):
                leftover.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(paths[-1], error) from error
        raise


def temporary_name(path: Path) -> Path:
    """Return the hidden name beside the target under which it is written: no suffix of it names a format."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def cannot_write(path: Path, error: OSError) -> CrfRefineError:
    """Return the error to raise where the operating system refuses to write a file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "the disk is full; free some space and run again with --continue"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = f"the folder {path.parent} cannot be written to ({error.strerror})"
    elif error.errno == errno.ENOENT:
        reason = f"there is no folder {path.parent}"
    else:
        reason = error.strerror or str(error)
    return CrfRefineError(f"{path}: cannot be written: {reason}")
