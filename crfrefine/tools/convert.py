"""Logits, probabilities and label maps from one file format to another, and from one kind of values to the next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine import io
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.arrays.probabilities import softmax, to_logits
from crfrefine.axes import file_order
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.io.atomic import check_replaceable
from crfrefine.io.files import files_read, files_written, identities
from crfrefine.io.paths import require_suffix
from crfrefine.io.volume import TIMES, Volume, VolumeHeader

if TYPE_CHECKING:
    from numpy.typing import NDArray


def convert_file(source: str | Path, target: str | Path, *, to: str | None = None, like: str | Path | None = None) -> str:
    """Convert a file with a label map, or with logits or probabilities of several labels.

    Args:
        source: the file to read.
        target: the file to write; its suffix names the format.
        to: "logits", "probabilities" (softmax) or "labels" (argmax); None: what the source holds.
        like: an image on the same grid, whose geometry the target gets; needed where the source has none (.npz).

    Returns:
        A sentence that says what was read and what was written.

    Raises:
        InputError: the source has no geometry and `like` is missing, or a label map is asked to become logits.
        GridMismatchError: source and `like` are on different grids.
        UnsupportedFormatError: a format that cannot be read or written, or a damaged file.
    """
    source, target = Path(source), Path(target)
    require_suffix(target)
    if to == "labels":
        require_suffix(target, io.VOLUME_SUFFIXES)
    _check_no_input_is_replaced(target, [source] if like is None else [source, Path(like)])
    check_replaceable(*reversed(files_written(target)))
    header = io.read_header(source)
    geometry = _geometry(header, io.read_header(like, io.VOLUME_SUFFIXES) if like is not None else None, target)
    if header.num_channels == 1:
        return _convert_labels(header, target, to, geometry)
    return _convert_channels(header, target, to, geometry)


def _check_no_input_is_replaced(target: Path, given: list[Path]) -> None:
    inputs = set().union(*(identities(path) for name in given for path in files_read(name)))
    for path in files_written(target):
        if identities(path) & inputs:
            raise InputError(f"{path}: is the input too; write to another file")


def _convert_labels(header: VolumeHeader, target: Path, to: str | None, like: Volume) -> str:
    if to not in (None, "labels"):
        raise InputError(
            f"{header.path}: holds one value a voxel; a label map cannot become {to}, export the network's output before the argmax"
        )
    require_suffix(target, io.VOLUME_SUFFIXES)
    labels = io.read_labels(header.path)
    io.write_label_map(target, labels.data.reshape(like.grid_shape), like)
    return f"{_told(header)} -> {target}: label map"


def _convert_channels(header: VolumeHeader, target: Path, to: str | None, like: Volume) -> str:
    read = io.read_logits([header.path])
    values, kind = read.values, read.kind
    if to == "labels":
        io.write_label_map(target, argmax_labels(values).reshape(like.grid_shape), like)
        return f"{_told(header)} -> {target}: label map"
    if to is not None or (kind is None and require_suffix(target).holds_scores_alone):
        values, kind = _as_kind(values, kind, to, header.path)
    written = kind or "logits"
    io.write_channels(target, values.reshape(len(values), *like.grid_shape), like, kind=written)
    return f"{_told(header)} -> {target}: {kind or 'the same values'}"


def _as_kind(values: NDArray[np.float32], kind: str | None, to: str | None, path: Path) -> tuple[NDArray[np.float32], str]:
    """Return the values as logits or probabilities, whichever is asked for, and the name of what they are."""
    order = file_order(values)
    stored = order.to_storage(values)  # contiguous
    logits = stored.copy()
    found = to_logits(logits, "auto", kind, path)[0]
    if to is None or to == found:
        return values, found
    converted = logits if to == "logits" else softmax(stored)
    return order.to_user(converted), to


def _geometry(header: VolumeHeader, like: VolumeHeader | None, target: Path) -> Volume:
    """Return an empty volume with the geometry of the file to write."""
    if like is not None and not header.on_same_grid(like):
        raise GridMismatchError(f"{header.path}: not on the grid of --like\n{header.difference_from(like)}")
    chosen = like or header
    if chosen.affine is None or chosen.spacing is None:
        if not require_suffix(target).holds_scores_alone:
            raise InputError(f"{header.path}: has no geometry, and {target.name} needs one; name the image it belongs to with --like IMAGE")
        num_axes = len(chosen.grid_shape)
        return Volume(_empty(chosen.grid_shape), np.eye(4), (1.0,) * num_axes)
    return Volume(_empty(chosen.grid_shape), chosen.affine, chosen.spacing, chosen.path, chosen)


def _empty(grid_shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.broadcast_to(np.uint8(0), grid_shape)


def _told(header: VolumeHeader) -> str:
    """Return what was read, in a sentence's first half."""
    kind = "label map" if header.num_channels == 1 else f"{header.num_channels} labels"
    remark = "" if header.misnamed is None else f" ({header.misnamed})"
    return f"{header.path}: {kind}, {TIMES.join(str(size) for size in header.grid_shape)}{remark}"
