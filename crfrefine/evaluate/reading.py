"""Read the label maps and probabilities of a case on the grid of its reference, one method at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine import io
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.arrays.padding import BLOCK_VOXELS, check_share, find_padding
from crfrefine.arrays.probabilities import SUM_TOLERANCE, identify, softmax
from crfrefine.axes import file_order
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.io.volume import Volume, VolumeHeader, describe_difference

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.evaluate.pairing import MethodFiles


@dataclass(frozen=True)
class SoftLabels:
    """The contents of a file of logits or probabilities.

    Attributes:
        label_map: (*grid) the most probable label.
        probabilities: (L, *grid) float32.
        note: whether they were taken as logits or as probabilities, and why.
    """

    label_map: NDArray[np.unsignedinteger[Any]]
    probabilities: NDArray[np.float32]
    note: str


def read_reference(path: Path) -> Volume:
    """Read the label map of the reference.

    Raises:
        InputError: not a label map, or a file without geometry.
        UnsupportedFormatError: damaged or of an unknown kind.
    """
    header = io.read_header(path, io.VOLUME_SUFFIXES)
    if header.num_channels > 1:
        raise InputError(f"{path}: expected a label map with one value per voxel, this file has {header.num_channels}")
    header.geometry()
    return io.read_labels(path)


def read_masks(files: MethodFiles, like: Volume) -> tuple[NDArray[np.unsignedinteger[Any]], SoftLabels | None]:
    """Read the label map of a method, (*grid), with its probabilities if the file holds them.

    Raises:
        GridMismatchError: not on the grid of the reference; both grids are described.
        InputError: no readable file, or neither a label map nor probabilities.
        UnsupportedFormatError: damaged or of an unknown kind.
    """
    if files.problem:
        raise InputError(files.problem)
    if files.label_map is not None and not _holds_probabilities(files.label_map):
        return _read_label_map(files.label_map, like), None
    soft = read_probabilities(files.probabilities if files.label_map is None else (files.label_map,), like)
    return soft.label_map, soft


def remarks_on_name(path: Path) -> tuple[str, ...]:
    """Return a remark about a file whose content does not match its name."""
    misnamed = io.read_header(path).misnamed
    return () if misnamed is None else (f"{path.name}: {misnamed}",)


def _holds_probabilities(path: Path) -> bool:
    """Return whether a file has several values per voxel, like logits and probabilities, or declares such values."""
    header = io.read_header(path)
    return header.num_channels > 1 or header.kind is not None


def _read_label_map(path: Path, like: Volume) -> NDArray[np.unsignedinteger[Any]]:
    _require_same_grid(like, io.read_header(path, io.VOLUME_SUFFIXES))
    labels: NDArray[np.unsignedinteger[Any]] = io.read_labels(path).data.reshape(like.grid_shape)
    return labels


def read_probabilities(paths: tuple[Path, ...], like: Volume) -> SoftLabels:
    """Read logits or probabilities that must be on the grid of the reference.

    Raises:
        GridMismatchError: they are on another grid; both grids are described.
        InputError: neither logits nor a distribution over labels.
        UnsupportedFormatError: damaged or of an unknown kind.
    """
    header = io.read_logits_header(paths)
    _require_same_grid(like, header.files[0])
    read = io.read_logits(paths)
    order = file_order(read.values)
    stored = order.to_storage(read.values)  # contiguous
    kind, note = identify(stored, "auto", read.kind, header.path)
    note = "; ".join([note, *(f"{file.path.name}: {file.misnamed}" for file in header.files if file.misnamed is not None)])
    labels = order.to_user(argmax_labels(stored))
    padding = find_padding(stored)
    if padding is not None:
        if kind == "probabilities":  # Equal probabilities may be a distribution.
            padding &= abs(stored[0] * len(stored) - 1) > SUM_TOLERANCE
        check_share(int(np.count_nonzero(padding)), padding.size, str(header.path))
        if kind == "probabilities":
            for label, channel in enumerate(stored):
                channel[padding] = float(label == 0)
    if kind == "logits":
        flat = stored.reshape(len(stored), -1)
        for start in range(0, flat.shape[1], BLOCK_VOXELS):
            flat[:, start : start + BLOCK_VOXELS] = softmax(flat[:, start : start + BLOCK_VOXELS])
    grid = like.grid_shape
    return SoftLabels(labels.reshape(grid), read.values.reshape((len(stored), *grid), order="A"), note)


def read_image(path: Path, like: Volume) -> NDArray[np.float32]:
    """Read the first channel of an image that must be on the grid of the reference, (*grid).

    Raises:
        GridMismatchError: it is on another grid; both grids are described.
        InputError: values that are NaN or infinite.
        UnsupportedFormatError: damaged or of an unknown kind.
    """
    _require_same_grid(like, io.read_header(path, io.VOLUME_SUFFIXES))
    image: NDArray[np.float32] = io.read_volume(path).channels[0].reshape(like.grid_shape)
    return image


def _require_same_grid(like: Volume, other: VolumeHeader) -> None:
    reference = like.header
    if reference is None or reference.on_same_grid(other):
        return
    difference = describe_difference(reference.path, reference.grid_shape, reference.affine, other.path, other.grid_shape, other.affine)
    raise GridMismatchError(
        f"{other.path}: not on the grid of the reference\n{difference}\n"
        "  Export it on the grid of the image, or resample it with nearest neighbors (docs/reference/formats.md#grids)."
    )
