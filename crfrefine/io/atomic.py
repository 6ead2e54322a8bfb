"""Atomic files: written under a hidden name beside the target, then renamed.

If the target is a link, the file it points to is written and the link stays. An input of the command is never replaced (`base.inputs`).
Anything but a regular file is never replaced: small files are written to it directly (`special_files`), volumes are refused.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from crfrefine.base.inputs import check_no_input
from crfrefine.errors import CrfRefineError, InputError, StorageError
from crfrefine.io.special_files import check_special, special_kind, write_special
from crfrefine.io.streams import is_named_gzip, write_gzip
from crfrefine.io.temporary import is_locked, open_scratch, open_temporary, remove_leftovers, temporary_name


@contextmanager
def atomic_files(*paths: Path) -> Iterator[tuple[BinaryIO, ...]]:
    """Open files of one folder for writing; they get their names only if the block ends without an error.

    If anything ends the block early, Ctrl-C included, the partial files are removed; those of a killed process, when the next one writes
    into the folder (`temporary`).

    Args:
        paths: one file, or several that belong together: the last one names the others and is renamed after them. Existing regular files
            are replaced at the end.

    Raises:
        CrfRefineError: the folder is not writable, the disk is full, or a name belongs to an input of the command or to something other
            than a regular file; existing files stay unchanged.
    """
    targets = check_replaceable(*paths)
    temporary: list[Path] = []
    files: list[BinaryIO] = []
    try:
        for target in targets:
            files.append(open_temporary(target, temporary))
        yield tuple(files)
        for name, file in zip(temporary, files, strict=True):
            file.flush()
            os.fsync(file.fileno())
            if not is_locked(name):
                file.close()
        if len(targets) == 1:
            temporary[0].replace(targets[0])
        else:
            _replace_together(temporary, targets)
        for file in files:
            file.close()
    except BaseException as error:
        for file in files:
            with suppress(OSError):  # On a full disk, closing fails again.
                file.close()
        for leftover in temporary:
            with suppress(OSError):
                leftover.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(paths[-1], error) from error
        raise


def write_bytes(path: Path, parts: Iterable[bytes | memoryview], threads: int) -> None:
    """Write a file atomically, compressed with gzip if its name says so."""
    with atomic_files(path) as (file,):
        if is_named_gzip(path):
            write_gzip(file, parts, threads)
        else:
            file.writelines(parts)


def write_small_file(path: Path, content: bytes) -> None:
    """Write a file atomically; write to a character device or a pipe directly; raise CrfRefineError if that is not possible."""
    if _kind(path) is not None:
        write_special(path, content)
        return
    with atomic_files(path) as (file,):
        file.write(content)


def check_small_file(path: Path) -> None:
    """Raise CrfRefineError if `write_small_file` would refuse this path, whatever its folder allows."""
    if _kind(path) is not None:
        check_special(path)


def remove_file(path: Path) -> None:
    """Remove a file, if there is one; raise CrfRefineError for anything but a regular file, as for writing, or if that is not possible."""
    (target,) = check_replaceable(path)
    try:
        target.unlink(missing_ok=True)
    except OSError as error:
        raise CrfRefineError(f"{path}: cannot be removed: {error.strerror or error}") from error


def real_path(path: Path) -> Path:
    """Return the target of a link, whether it exists or not; return any other path unchanged."""
    with suppress(OSError):  # If the system refuses to resolve a path, it refuses to open it too.
        if path.is_symlink():
            return Path(os.path.realpath(path))
    return path


def cannot_write(path: Path, error: OSError) -> CrfRefineError:
    """Return the error to raise if the operating system refuses to write a file; StorageError if it will refuse all other files too."""
    folder = real_path(path).parent
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "the disk is full; free some space and run again"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = f"the folder {folder} cannot be written to ({error.strerror})"
    elif error.errno == errno.ENOENT:
        reason = f"there is no folder {folder}"
    else:
        reason = error.strerror or str(error)
    kind = StorageError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) else CrfRefineError
    return kind(f"{path}: cannot be written: {reason}")


def check_replaceable(*paths: Path) -> list[Path]:
    """Return the regular files that paths stand for, existing or not.

    Raises:
        CrfRefineError: `atomic_files` cannot write one of them; so a run finds out before it computes.
    """
    for path in paths:
        kind = _kind(path)
        if kind is not None:
            raise CrfRefineError(f"{path}: cannot be written: it is {kind}, which is not replaced by a file; choose another name")
    targets = [real_path(path) for path in paths]
    for path, target in zip(paths[:-1], targets[:-1], strict=True):
        # A header finds its voxels by their name in its own folder, even if it is reached through a link.
        if os.path.realpath(targets[-1].with_name(path.name)) != os.path.realpath(target):
            raise CrfRefineError(
                f"{paths[-1]}: cannot be written: it is a link to {targets[-1]}, where its voxels would not be found\n"
                f"  Name that file itself, link {path.name} there too, or choose a format of one file."
            )
    return targets


def _kind(path: Path) -> str | None:
    check_no_input(path)
    try:
        return special_kind(path)
    except OSError as error:
        raise cannot_write(path, error) from error


def _replace_together(temporary: Sequence[Path], targets: Sequence[Path]) -> None:
    """Rename the files, the last one at the end; restore the old ones if that fails."""
    aside: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    try:
        # An old header must not exist beside new voxels, not even for an instant: it is removed first.
        for target in reversed(targets):
            aside.append((temporary_name(target, may_lock=False), target))
            with suppress(FileNotFoundError):
                target.replace(aside[-1][0])
        for name, target in zip(temporary, targets, strict=True):
            placed.append(target)
            name.replace(target)
    except BaseException:
        for target in reversed(placed):
            with suppress(OSError):
                target.unlink(missing_ok=True)
        for old, target in reversed(aside):
            with suppress(OSError):
                old.replace(target)
        raise
    for old, _ in aside:
        with suppress(OSError):
            old.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Create a folder and a file in it, so that a run does not fail only at the end of its first case; remove what killed runs left there.

    Raises:
        InputError: the folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        open_scratch(folder).close()
    except FileExistsError as error:
        raise InputError(f"{folder}: expected a folder, this is a file") from error
    except OSError as error:
        raise InputError(f"{folder}: cannot write to this folder: {error.strerror or error}") from error


def check_small_output(path: Path) -> None:
    """Raise CrfRefineError if `write_small_file` could not write this file; create its folder.

    The folder of a device or a pipe is not checked: nothing is created there.
    """
    check_small_file(path)
    if special_kind(path) is None:
        check_writable(real_path(path).parent)
