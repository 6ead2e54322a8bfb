"""Write label maps, images, logits and probabilities in the format that a file's suffix names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.geometry import reverse_grid, same_grid
from crfrefine.base.limits import MAX_LABEL
from crfrefine.errors import CapacityError, GridMismatchError, InputError, UnsupportedFormatError
from crfrefine.io.paths import (
    FORMATS,
    LABELS_SUFFIXES,
    WRITTEN_SUFFIXES,
    files_written,
    require_suffix,
    suffix_of,
)
from crfrefine.io.volume import Planes, Segment, VolumeHeader, VoxelsToWrite


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
    _write(VoxelsToWrite(Path(path), "labels", None, dtype, piece, tuple(segments)), like, threads)


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
    path = Path(path)
    known = require_suffix(path, WRITTEN_SUFFIXES)
    if dtype.name not in known.image_types:
        others = []
        for other in FORMATS:
            if other.suffixes[0] in WRITTEN_SUFFIXES and dtype.name in other.image_types:
                others.append(f"{other.name} ({other.suffixes[0]})")
        raise UnsupportedFormatError(
            f"{path}: {known.name} holds voxels of the types {', '.join(known.image_types)}, "
            f"found {dtype.name}; write {', '.join(others)} instead"
        )
    channels = num_channels if num_channels > 1 else None
    _write(VoxelsToWrite(path, "image", channels, dtype, piece), like, 1)


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
    voxels = VoxelsToWrite(Path(path), kind, num_channels, dtype, piece, tuple(segments))
    _write(voxels, like, threads)


def _planes_of(path: str | Path, channels: NDArray[Any], like: VolumeHeader) -> Planes:
    """Return what gives the planes of an array, (channels, *grid) on the grid of `like`."""
    if not same_grid(channels.shape[1:], None, like.grid_shape, None):
        raise GridMismatchError(
            f"{path}: cannot write an array of shape {channels.shape[1:]} on the grid "
            f"{like.grid_shape} of {like.path}"
        )
    stored = reverse_grid(channels).reshape(len(channels), *like.grid_shape[::-1])
    return lambda channel, planes: stored[channel, planes]


def _write(voxels: VoxelsToWrite, like: VolumeHeader, threads: int) -> None:
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
    voxels = replace(voxels, grid_shape=like.grid_shape[::-1], voxel_files=files_written(path)[1:])
    import_module(known.module).write(voxels, like, threads)
