"""Files that are written: whole or not at all, in the format that their suffix names.

A file is written under a hidden name beside its target, then renamed. If the target is a link, the
file behind it is written and the link stays. Inputs of the command (`base.inputs`) and anything but
regular files are refused. A killed process leaves its hidden file, which is removed after a day.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from stat import S_ISREG
from tempfile import TemporaryFile
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.array_types import Array, Shape
from crfrefine.base.geometry import reverse_grid, same_grid
from crfrefine.base.inputs import check_no_input
from crfrefine.base.limits import MAX_LABEL
from crfrefine.errors import (
    CapacityError,
    CrfRefineError,
    GridMismatchError,
    InputError,
    StorageError,
    UnsupportedFormatError,
)
from crfrefine.io.formats import FORMATS, LABELS_SUFFIXES, WRITTEN_SUFFIXES
from crfrefine.io.paths import files_written, require_suffix, suffix_of
from crfrefine.io.streams import BLOCK_BYTES
from crfrefine.io.volume import PIECE_BYTES, Segment, Segments, VolumeHeader, iter_pieces

# Called for every channel (0 of a label map) and planes of the grid, in the order of the file;
# returns (planes, [y,] x).
Planes: TypeAlias = Callable[[int, slice], Array]


class VoxelsToWrite(NamedTuple):
    """Voxels to write."""

    path: Path  # the file
    kind: str  # "labels", "image", "logits" or "probabilities"
    num_channels: int | None  # of a label map, and of an image with one value per voxel: None
    # of the voxels in the file: uint8, uint16, float32, or any that the format holds of an image
    dtype: np.dtype[Any]
    piece: Planes
    like: VolumeHeader  # of the same grid, whose geometry is kept
    segments: Segments = ()  # of a label map; formats without names ignore them

    @property
    def shape(self) -> Shape:
        """([z,] y, x), or (channels, [z,] y, x)."""
        grid_shape = self.like.stored_grid
        if self.num_channels is None:
            return grid_shape
        return (self.num_channels, *grid_shape)

    def blocks(self, *, interleaved: bool = False) -> Iterator[bytes]:
        """Yield the bytes in blocks of BLOCK_BYTES, the last one shorter.

        Compressed bytes must not depend on the pieces. Interleaved, the channels of a voxel are
        together; else one channel follows the other.
        """
        shape = (self.num_channels or 1, *self.like.stored_grid)
        waiting = bytearray()
        stored = self.dtype.newbyteorder("<")
        pieces = iter_pieces(shape, stored.itemsize, PIECE_BYTES, by_channel=not interleaved)
        for channels, planes in pieces:
            numbers = range(channels.start, channels.stop)
            values = [self.piece(number, planes) for number in numbers]
            part = values[0] if len(values) == 1 else np.stack(values, axis=-1)
            waiting += np.ascontiguousarray(part, stored).data
            while len(waiting) >= BLOCK_BYTES:
                yield bytes(waiting[:BLOCK_BYTES])
                del waiting[:BLOCK_BYTES]
        if waiting:
            yield bytes(waiting)


def write_label_map(
    path: str | Path,
    labels: NDArray[np.integer[Any]],
    like: VolumeHeader,
    *,
    threads: int = 1,
    segments: Sequence[Segment] = (),
) -> None:
    """Write a label map, (*grid) from 0 to 65535, atomically, as unscaled unsigned integers.

    The suffix of `path` names the format. The geometry of `like`, the header of the same grid, is
    kept: bit for bit if it is that of a file of this format. NIfTI and .seg.nrrd get the
    names and colors of `segments`.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iub":
        raise InputError(f"{path}: a label map holds integers, not {labels.dtype}")
    if labels.dtype.kind == "i" and labels.size and labels.min() < 0:
        raise InputError(
            f"{path}: a label map holds no negative labels, this one has {labels.min()}"
        )
    largest = int(labels.max(initial=0))
    if largest > MAX_LABEL:
        raise CapacityError(
            f"label {largest} does not fit: label maps hold labels up to {MAX_LABEL}"
        )
    dtype = np.dtype(np.uint8 if largest <= 255 else np.uint16)
    piece = _planes_of(path, labels[np.newaxis], like)
    voxels = VoxelsToWrite(Path(path), "labels", None, dtype, piece, like, tuple(segments))
    _write(voxels, threads)


def write_image(
    path: str | Path,
    dtype: np.dtype[Any],
    like: VolumeHeader,
    piece: Planes,
    *,
    num_channels: int = 1,
) -> None:
    """Write an image atomically, in a type that its format holds; `piece` as of `write_pieces`.

    NIfTI gets (x, y, z, channel), MetaImage and NRRD a vector image, MGH one frame per channel.
    Raises UnsupportedFormatError, which names other formats, if the format does not hold the type.
    """
    channels = num_channels if num_channels > 1 else None
    _write(VoxelsToWrite(Path(path), "image", channels, dtype, piece, like), 1)


def write_channels(
    path: str | Path,
    channels: NDArray[np.floating[Any]],
    like: VolumeHeader,
    *,
    kind: str = "logits",
    threads: int = 1,
) -> None:
    """Write logits or probabilities, (labels, *grid), as `write_pieces` does."""
    piece = _planes_of(path, np.asarray(channels), like)
    write_pieces(path, like, len(channels), piece, kind=kind, threads=threads)


def write_pieces(
    path: str | Path,
    like: VolumeHeader,
    num_channels: int,
    piece: Planes,
    *,
    kind: str = "logits",
    threads: int = 1,
    segments: Sequence[Segment] = (),
) -> None:
    """Write logits or probabilities atomically, as float32, piece by piece.

    The bytes are those of `write_channels`.
    NIfTI gets (x, y, z, label), MetaImage and NRRD a vector image, .npz (label, z, y, x) under the
    name `kind`. `piece` returns the values of planes of a channel, (planes, [y,] x) in the order of
    storage; each is asked for once, for MetaImage and NRRD all channels of some planes before the
    next planes. The geometry of `like` is kept. NIfTI gets the names and colors of the labels in
    `segments`. If `piece` raises an error, nothing is left of the
    file.
    """
    dtype = np.dtype(np.float32)
    voxels = VoxelsToWrite(Path(path), kind, num_channels, dtype, piece, like, tuple(segments))
    _write(voxels, threads)


def _planes_of(path: str | Path, channels: Array, like: VolumeHeader) -> Planes:
    """Return what gives the planes of an array, (channels, *grid) on the grid of `like`."""
    if not same_grid(channels.shape[1:], None, like.grid_shape, None):
        raise GridMismatchError(
            f"{path}: cannot write an array of shape {channels.shape[1:]} on the grid "
            f"{like.grid_shape} of {like.path}"
        )
    stored = reverse_grid(channels).reshape(len(channels), *like.stored_grid)
    return lambda channel, planes: stored[channel, planes]


def _write(voxels: VoxelsToWrite, threads: int) -> None:
    """Write voxels in the format that the suffix of their file names."""
    path = voxels.path
    if voxels.kind in ("labels", "image"):  # They need a place in the world.
        known = require_suffix(path, WRITTEN_SUFFIXES)
    else:
        known = require_suffix(path)
    if voxels.kind != "labels" and suffix_of(path) in LABELS_SUFFIXES:
        raise UnsupportedFormatError(
            f"{path}: a segmentation holds a label map alone, no {voxels.kind}; "
            "write NIfTI (.nii.gz) instead"
        )
    if voxels.kind == "image" and voxels.dtype.name not in known.image_types:
        others = []
        for other in FORMATS:
            if other.suffixes[0] in WRITTEN_SUFFIXES and voxels.dtype.name in other.image_types:
                others.append(f"{other.name} ({other.suffixes[0]})")
        raise UnsupportedFormatError(
            f"{path}: {known.name} holds voxels of the types {', '.join(known.image_types)}, "
            f"found {voxels.dtype.name}; write {', '.join(others)} instead"
        )
    import_module(known.module).write(voxels, threads)


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
def atomic_files(path: Path) -> Iterator[tuple[BinaryIO, ...]]:
    """Open a file for writing, which gets its name if the block ends without error.

    Otherwise, also after Ctrl-C, the partial file is removed, and an existing one stays unchanged.
    If the format has a separate file of voxels, that is opened, too, and comes first: the header
    names it, and is renamed after it.
    """
    targets = check_replaceable(path)
    hidden_paths = []
    for target in targets:
        start = os.fsencode(target.name)[:_MAX_NAME_BYTES]
        name = start.decode(sys.getfilesystemencoding(), errors="ignore")
        hidden_paths.append(target.with_name(f".{name}.tmp-{os.urandom(8).hex()}"))
    files = []
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
        raise cannot_write(path, error) from error
    finally:
        for file in files:
            with suppress(OSError):  # On a full disk, closing fails again.
                file.close()
        for hidden in hidden_paths:  # Those that have their names are not there.
            with suppress(OSError):
                hidden.unlink(missing_ok=True)


def write_small_file(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_files(path) as (*_, file):
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


def check_replaceable(path: Path) -> list[Path]:
    """Return the regular files behind an output, existing or not; raise if one cannot be written.

    The last is that of the path, the one before it that of its voxels if they have their own.
    """
    files = files_written(path)[::-1]
    targets = []
    for file in files:
        check_no_input(file)
        try:
            is_regular = S_ISREG(file.stat().st_mode)
        except FileNotFoundError:
            is_regular = True
        except OSError as error:
            raise cannot_write(file, error) from error
        # Standard output may be a regular file, which other programs write to. Links are not
        # followed.
        shown = os.path.abspath(file)  # noqa: PTH100
        if not is_regular or shown.startswith(("/dev/std", "/dev/fd/", "/proc/")):
            raise CrfRefineError(
                f"{file}: cannot be written: it exists and is no regular file, "
                "which is not replaced; choose another name"
            )
        targets.append(Path(os.path.realpath(file)) if file.is_symlink() else file)

    for file, target in zip(files[:-1], targets[:-1], strict=True):
        # A header finds its voxels by their name in its folder, also through a link.
        if os.path.realpath(targets[-1].with_name(file.name)) != os.path.realpath(target):
            raise CrfRefineError(
                f"{path}: cannot be written: it is a link to {targets[-1]}, "
                "where its voxels would not be found\n"
                f"  Name that file itself, link {file.name} there too, "
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


def check_output(path: Path) -> None:
    """Raise CrfRefineError if an output could not be written; create its folder."""
    check_writable(check_replaceable(path)[-1].parent)


@cache
def remove_leftovers(folder: Path) -> None:
    """Remove hidden files of this user not written to for a day; look into a folder once."""
    for path in folder.glob(".*.tmp-" + "[0-9a-f]" * 16):
        with suppress(OSError):
            status = path.lstat()
            is_own = S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            if is_own and status.st_mtime < time.time() - _LEFTOVER_SECONDS:
                path.unlink()
