"""Reading and writing volumes, logits and label maps; nibabel is imported only in this package, and only when a file needs it.

Arrays keep the order of the files, x fastest; the returned arrays are transposed views, ([channel,] x, y, z).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine.base.axes import StorageOrder, file_order
from crfrefine.base.geometry import same_shape
from crfrefine.base.labels import smallest_label_type
from crfrefine.errors import CrfRefineError, GridMismatchError, InputError, UnsupportedFormatError
from crfrefine.io.logits import LogitsFile, LogitsHeader, read_logits, read_logits_header
from crfrefine.io.paths import LABELS_SUFFIXES, LOGITS_SUFFIXES, VOLUME_SUFFIXES, WRITTEN_SUFFIXES, require_suffix, stem_of, suffix_of
from crfrefine.io.pieces import LABEL_TOLERANCE, Piece, decoded_pieces, read_pieces, read_whole_numbers
from crfrefine.io.recognition import files_written
from crfrefine.io.volume import MAX_BYTES, Segment, Volume, VolumeHeader, VoxelsToWrite
from crfrefine.io.volumes import allocate, placed_on, read_header, read_into

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

__all__ = [
    "LOGITS_SUFFIXES",
    "VOLUME_SUFFIXES",
    "WRITTEN_SUFFIXES",
    "LogitsFile",
    "LogitsHeader",
    "Piece",
    "Segment",
    "VolumeHeader",
    "allocate",
    "is_whole",
    "placed_on",
    "read_header",
    "read_into",
    "read_labels",
    "read_logits",
    "read_logits_header",
    "read_pieces",
    "read_volume",
    "stem_of",
    "suffix_of",
    "write_channels",
    "write_image",
    "write_label_map",
    "write_pieces",
]

_CHECKED_BYTES = 1 << 22  # Decoded at once for a check only.


def read_volume(path: str | Path) -> Volume:
    """Read a scalar or multi-channel volume as float32, scaled.

    Beyond the result, it takes a block of the file.

    Returns:
        data (x, y, z), (x, y), or (channels, ...) if there are several.

    Raises:
        UnsupportedFormatError: the file is of unknown type, damaged or cut off, or its layout is ambiguous.
        InputError: the file is missing, or values are NaN or infinite.
    """
    header = read_header(path, VOLUME_SUFFIXES)
    values = allocate(header)
    read_into(header, values)
    channels = file_order(values).to_user(values)
    return Volume(channels if header.num_channels > 1 else channels[0], *header.geometry(), header.path, header)


def read_labels(path: str | Path, *, grid: VolumeHeader | None = None) -> Volume:
    """Read a label map as the smallest unsigned integer type, even if it is stored as float or with a scaling.

    Beyond the result, it takes a few megabytes.

    Args:
        path: the file.
        grid: header of the image, to which axes are turned.

    Raises:
        InputError: values that are not whole numbers, negative, or above 65535; more than one channel.
        UnsupportedFormatError: as for `read_volume`.
    """
    header = read_header(path, VOLUME_SUFFIXES)
    if grid is not None:
        header = placed_on(header, grid)
    header.geometry()
    numbers = read_whole_numbers(header)
    if numbers.off > LABEL_TOLERANCE:
        raise InputError(
            f"{path}: not a label map: expected whole numbers, found values up to {numbers.off:.2g} away from one; "
            "it may be a probability map or an image"
        )
    numbers.require_range(header.path)
    return Volume(StorageOrder.of_files(numbers.labels.ndim).to_user(numbers.labels), *header.geometry(), header.path, header)


def write_label_map(
    path: str | Path,
    labels: NDArray[np.integer[Any]],
    like: Volume,
    *,
    threads: int = 1,
    segments: Sequence[Segment] = (),
) -> None:
    """Write a label map atomically, as small unsigned integers without scaling.

    Args:
        path: its suffix names the format.
        labels: (*grid), from 0 to 65535.
        like: a volume on the same grid; its geometry is kept, bit for bit if the file has the same format.
        threads: for compression; the bytes written do not depend on it.
        segments: names and colors of labels; NIfTI gets a table of them.

    Raises:
        CrfRefineError: the file cannot be written (InputError, GridMismatchError, UnsupportedFormatError or CapacityError).
    """
    path = Path(path)
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iub":
        raise InputError(f"{path}: a label map holds integers, not {labels.dtype}")
    _require_grid(path, labels.shape, like)
    if labels.dtype.kind == "i" and labels.size and labels.min() < 0:
        raise InputError(f"{path}: a label map holds no negative labels, this one has {labels.min()}")
    dtype = smallest_label_type(int(labels.max(initial=0)))
    stored = StorageOrder.of_files(labels.ndim).to_storage(labels).reshape(like.grid_shape[::-1])
    voxels = VoxelsToWrite(path, "labels", None, stored.shape, np.dtype(dtype), lambda _, planes: stored[planes], segments=tuple(segments))
    _write(voxels, like, threads)


def write_image(path: str | Path, values: NDArray[Any], like: Volume) -> None:
    """Write an image, (*grid), atomically in its type; only NIfTI holds every type."""
    path = Path(path)
    _require_grid(path, values.shape, like)
    if suffix_of(path) not in (".nii.gz", ".nii"):
        raise UnsupportedFormatError(f"{path}: an image is written as NIfTI; expected .nii.gz or .nii")
    stored = StorageOrder.of_files(values.ndim).to_storage(values)
    _write(VoxelsToWrite(path, "labels", None, stored.shape, values.dtype, lambda _, planes: stored[planes]), like, 1)


def write_channels(path: str | Path, channels: NDArray[np.floating[Any]], like: Volume, *, kind: str = "logits", threads: int = 1) -> None:
    """Write logits or probabilities atomically, as float32.

    Args:
        path: its suffix names the format: NIfTI gets (x, y, z, label), MetaImage and NRRD a vector image, .npz (label, z, y, x).
        channels: (labels, *grid).
        like: a volume on the same grid; its geometry is kept.
        kind: "logits" or "probabilities", the name of the array in an .npz.
        threads: for compression; the bytes written do not depend on it.

    Raises:
        CrfRefineError: the file cannot be written (GridMismatchError or UnsupportedFormatError).
    """
    path = Path(path)
    channels = np.asarray(channels)
    _require_grid(path, channels.shape[1:], like)
    stored = file_order(channels).to_storage(channels).reshape(len(channels), *like.grid_shape[::-1])
    write_pieces(path, like, len(stored), lambda channel, planes: stored[channel, planes], kind=kind, threads=threads)


def write_pieces(
    path: str | Path,
    like: Volume,
    num_channels: int,
    piece: Callable[[int, slice], NDArray[np.floating[Any]]],
    *,
    kind: str = "logits",
    threads: int = 1,
    most_bytes: int = MAX_BYTES,
) -> None:
    """Write logits or probabilities atomically, as float32, piece by piece: the bytes of `write_channels`, without the whole array.

    Args:
        path: as for `write_channels`.
        like: a volume on the same grid; its geometry is kept.
        num_channels: of the file.
        piece: returns the values of planes of a channel, (planes, [y,] x) in the order of storage. Each is asked for once: for NIfTI
            and .npz channel by channel, for MetaImage and NRRD all channels of some planes, then those of the next ones.
        kind: "logits" or "probabilities", the name of the array in an .npz.
        threads: for compression; the bytes written do not depend on it.
        most_bytes: asked for before they are written, of one channel or of all, whichever comes first; at least one plane.

    Raises:
        CrfRefineError: the file cannot be written (GridMismatchError or UnsupportedFormatError); nothing is left of it. Whatever
            `piece` raises does the same.
    """
    path = Path(path)
    _write(VoxelsToWrite(path, kind, num_channels, like.grid_shape[::-1], np.dtype(np.float32), piece, most_bytes), like, threads)


def is_whole(path: str | Path) -> bool:
    """Return whether a file exists, has the format of its name, and can be read to its end, with all voxels and the right checksum."""
    try:
        header = read_header(path)
        for _ in decoded_pieces(header, most_bytes=_CHECKED_BYTES):
            pass
    except CrfRefineError:
        return False
    return header.misnamed is None


def _require_grid(path: Path, shape: tuple[int, ...], like: Volume) -> None:
    if shape != like.grid_shape and not same_shape(shape, like.grid_shape):
        raise GridMismatchError(
            f"{path}: cannot write an array of shape {shape} on the grid {like.grid_shape} of {like.path or 'the volume'}"
        )


def _write(voxels: VoxelsToWrite, like: Volume, threads: int) -> None:
    path, kind = voxels.path, voxels.kind
    known = require_suffix(path, WRITTEN_SUFFIXES) if kind == "labels" else require_suffix(path)
    if kind != "labels" and suffix_of(path) in LABELS_SUFFIXES:
        raise UnsupportedFormatError(f"{path}: a segmentation holds a label map alone, no {kind}; write NIfTI (.nii.gz) instead")
    known.load().write(replace(voxels, voxel_files=files_written(path)[1:]), like, threads)
