"""Atomic files: written under a hidden name beside the target, then renamed.

If the target is a link, the file behind it is written and the link stays. Inputs of the command
(`base.inputs`) and anything but regular files are refused. A killed process leaves its hidden file,
which is removed after a day.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from stat import S_ISREG
from tempfile import TemporaryFile
from typing import BinaryIO

from crfrefine.base.inputs import check_no_input
from crfrefine.errors import CrfRefineError, InputError, StorageError

# Bytes of the target's name in the hidden name, which must not be too long for the disk.
_MAX_NAME_BYTES = 100
_LEFTOVER_SECONDS = 86_400

# `wait` is called before the files that a thread has written get their names.
_thread = threading.local()


@contextmanager
def naming_after(wait: Callable[[], None]) -> Iterator[None]:
    """Let the files that this thread writes in the block get their names once `wait` returns.

    If it raises an error, they are removed as after any other.
    """
    _thread.wait = wait
    try:
        yield
    finally:
        del _thread.wait


@contextmanager
def atomic_files(*paths: Path) -> Iterator[tuple[BinaryIO, ...]]:
    """Open files of one folder for writing, which get their names if the block ends without error.

    Otherwise, also after Ctrl-C, the partial files are removed, and existing files stay unchanged.
    The last of several files that belong together names the others, and is renamed after them.
    """
    targets = check_replaceable(*paths)
    hidden_paths = []
    for target in targets:
        name = os.fsencode(target.name)[:_MAX_NAME_BYTES].decode(errors="ignore")
        hidden_paths.append(target.with_name(f".{name}.tmp-{os.urandom(8).hex()}"))
    files: list[BinaryIO] = []
    try:
        remove_leftovers(targets[-1].parent)
        for hidden in hidden_paths:
            files.append(hidden.open("xb"))
        yield tuple(files)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        wait = getattr(_thread, "wait", None)
        if wait is not None:
            wait()
        if len(targets) > 1:
            # An old header must not exist beside new voxels, not even for an instant.
            targets[-1].unlink(missing_ok=True)
        for hidden, target in zip(hidden_paths, targets, strict=True):
            hidden.replace(target)
    except OSError as error:
        raise cannot_write(paths[-1], error) from error
    finally:
        for file in files:
            with suppress(OSError):  # On a full disk, closing fails again.
                file.close()
        for hidden in hidden_paths:  # Those that have their names are not there.
            with suppress(OSError):
                hidden.unlink(missing_ok=True)


def write_small_file(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_files(path) as (file,):
        file.write(content)


def cannot_write(path: Path, error: OSError) -> CrfRefineError:
    """Return the error for a file that cannot be written: StorageError if no other file can."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"{path}: cannot be written: the disk is full; free some space and run again"
        )
    folder = Path(os.path.realpath(path)).parent
    if error.errno == errno.ENOENT:
        return CrfRefineError(f"{path}: cannot be written: there is no folder {folder}")
    kind = StorageError if error.errno == errno.EROFS else CrfRefineError
    return kind(f"{path}: cannot be written: {error.strerror or error}, in the folder {folder}")


def check_replaceable(*paths: Path) -> list[Path]:
    """Return the regular files behind paths, existing or not; raise if they cannot be written."""
    for path in paths:
        check_no_input(path)
        try:
            is_regular = S_ISREG(path.stat().st_mode)
        except FileNotFoundError:
            is_regular = True
        except OSError as error:
            raise cannot_write(path, error) from error
        # Standard output may be a regular file, which other programs write to. Links are not
        # followed.
        shown = os.path.abspath(path)  # noqa: PTH100
        if not is_regular or shown.startswith(("/dev/std", "/dev/fd/", "/proc/")):
            raise CrfRefineError(
                f"{path}: cannot be written: it exists and is no regular file, "
                "which is not replaced; choose another name"
            )

    targets = [Path(os.path.realpath(path)) if path.is_symlink() else path for path in paths]
    for path, target in zip(paths[:-1], targets[:-1], strict=True):
        # A header finds its voxels by their name in its folder, also through a link.
        if os.path.realpath(targets[-1].with_name(path.name)) != os.path.realpath(target):
            raise CrfRefineError(
                f"{paths[-1]}: cannot be written: it is a link to {targets[-1]}, "
                "where its voxels would not be found\n"
                f"  Name that file itself, link {path.name} there too, "
                "or choose a format of one file."
            )
    return targets


def check_writable(folder: Path) -> None:
    """Create a folder and a file in it, before a run needs them; raise InputError on failure."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        TemporaryFile(dir=folder).close()
    except FileExistsError as error:
        raise InputError(f"{folder}: expected a folder, this is a file") from error
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write to this folder: {error.strerror or error}"
        ) from error


def check_small_output(path: Path) -> None:
    """Raise CrfRefineError if `write_small_file` could not write this file; create its folder."""
    (target,) = check_replaceable(path)
    check_writable(target.parent)


@cache
def remove_leftovers(folder: Path) -> None:
    """Remove hidden files of this user not written to for a day; look into a folder once."""
    for path in folder.glob(".*.tmp-" + "[0-9a-f]" * 16):
        with suppress(OSError):
            status = path.lstat()
            is_own = S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            if is_own and status.st_mtime < time.time() - _LEFTOVER_SECONDS:
                path.unlink()
