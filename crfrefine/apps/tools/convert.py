"""Convert logits, probabilities and label maps between file formats and between kinds of values, and DICOM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine import io
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.arrays.probabilities import softmax, to_logits
from crfrefine.arrays.region_scheme import identify_regions, sigmoid, take_log_odds
from crfrefine.base.axes import file_order
from crfrefine.base.inputs import add_inputs, keeping_inputs
from crfrefine.base.text import TIMES, counted
from crfrefine.cases.dataset_description import read_names
from crfrefine.cases.region_reading import RegionReading, find_regions
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.io.atomic import check_replaceable
from crfrefine.io.paths import require_suffix
from crfrefine.io.recognition import add_volumes, files_written, is_dicom
from crfrefine.io.segments import named_segments
from crfrefine.io.volume import Volume, VolumeHeader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.base.array_types import Float32


@keeping_inputs()
def convert_file(
    source: str | Path, target: str | Path, *, to: str | None = None, like: str | Path | None = None, segments: str | Path | None = None
) -> str:
    """Convert a label map, logits or probabilities of several labels, or DICOM; return a sentence about input and output.

    `to` is "logits", "probabilities" (softmax), "labels" (argmax) or the kind of the source; sigmoid channels whose regions a
    `dataset.json` beside the source declares become log-odds, probabilities, or the label map that nnU-Net makes of them. `like` is an
    image with the same voxels, whose geometry the target gets, the order of its axes included; it is
    needed for a source without geometry (.npz). A DICOM series becomes an image, a segmentation a label map. A label map becomes a DICOM
    segmentation of the series `like`; `segments` is a segmentation that describes its labels.

    Raises:
        InputError: the source has no geometry and `like` is missing, a label map should become logits, or DICOM files do not fit together.
        GridMismatchError: source and `like` are on different grids.
        UnsupportedFormatError: a format that cannot be read or written, or a damaged file.
    """
    source, target = Path(source), Path(target)
    if is_dicom(source) or target.suffix.lower() == ".dcm":
        return _convert_dicom(source, target, to, None if like is None else Path(like), None if segments is None else Path(segments))
    if segments is not None:
        raise InputError(f"{target}: --segments describes the labels of a DICOM segmentation; name a file such as NAME.dcm")
    require_suffix(target)
    if to == "labels":
        require_suffix(target, io.WRITTEN_SUFFIXES)
    add_volumes(source, None if like is None else Path(like))
    check_replaceable(*reversed(files_written(target)))
    header = io.read_header(source)
    like_header = io.read_header(like, io.VOLUME_SUFFIXES) if like is not None else None
    placed = header if like_header is None else io.placed_on(header, like_header)
    turned = [f"{header.path.name}: {placed.turning}"] if placed.turned is not None else []
    geometry = _geometry(placed, like_header, target)
    notes = list(turned)
    regions = find_regions(None, [source.parent], notes)
    if header.num_channels == 1 and not regions.is_channel(header):
        return "\n".join([*turned, _convert_labels(header, target, to, geometry)])
    return "\n".join([*notes, _convert_channels(header, target, to, geometry, regions)])


def _convert_labels(header: VolumeHeader, target: Path, to: str | None, like: Volume) -> str:
    if to not in (None, "labels"):
        raise InputError(
            f"{header.path}: holds one value per voxel; a label map cannot become {to}, export the network's output before the argmax"
        )
    require_suffix(target, io.WRITTEN_SUFFIXES)
    labels = io.read_labels(header.path, grid=like.header)
    segments = header.segments or named_segments(read_names([header.path]).labels)
    io.write_label_map(target, labels.data.reshape(like.grid_shape), like, segments=segments)
    kind = "label map" if header.dtype in ("uint8", "uint16") else "volume"  # CT has signed integers.
    return f"{_told(header, kind)} -> {target}: {kind}"


def _convert_dicom(source: Path, target: Path, to: str | None, like: Path | None, segments: Path | None) -> str:
    """Convert a series or a segmentation to another format, or a label map to a segmentation of the series `like`."""
    from crfrefine.io import dicom

    is_read = is_dicom(source)
    if is_read and target.suffix.lower() == ".dcm":
        raise InputError(f"{source} and {target}: both are DICOM; convert to a file such as NAME.nii.gz first")
    if to not in (None, "labels"):
        raise InputError(f"{source}: DICOM holds images and label maps, no {to}; leave --to out")
    add_inputs(*(file for path in (source, like, segments) if path for file in (path.iterdir() if path.is_dir() else [path])))
    check_replaceable(*reversed(files_written(target)))
    if is_read:
        require_suffix(target, io.WRITTEN_SUFFIXES)
        volume = dicom.read(source, like)
        assert volume.header is not None
        is_label_map = volume.header.format == dicom.SEGMENTATION
        if is_label_map:
            io.write_label_map(target, volume.data, volume, segments=volume.header.segments)
        else:
            io.write_image(target, volume.data, volume)
        kind = "label map" if is_label_map else "image"
        return "\n".join([f"{_told(volume.header, kind)} -> {target}: {kind}, {volume.data.dtype}", *volume.header.notes])
    if like is None or not is_dicom(like):
        raise InputError(f"{target}: a DICOM segmentation refers to the series it was made on; name its folder with --like SERIES")
    header = io.read_header(source, io.VOLUME_SUFFIXES)
    grid = dicom.read_grid(like)
    if not io.placed_on(header, grid).on_same_grid(grid):
        raise GridMismatchError(f"{source}: not on the grid of --like\n{header.difference_from(grid)}\n  Name the series that was refined.")
    labels = io.read_labels(source, grid=grid)
    named = header.segments or named_segments(read_names([source]).labels)
    dicom.write(target, labels.data, named, like, segments)
    return f"{_told(header)} -> {target}: DICOM segmentation of {like}"


def _convert_channels(header: VolumeHeader, target: Path, to: str | None, like: Volume, regions: RegionReading) -> str:
    read = io.read_logits([header.path], fewest=regions.fewest_channels, grid=like.header)
    values, kind = read.values, read.kind
    needs_kind = to is not None or (kind is None and require_suffix(target).holds_scores_alone)
    scheme = regions.scheme_of(values, header.path) if needs_kind else None
    if scheme is not None:
        return _convert_regions(header, target, to, like, values, kind, scheme)
    if to == "labels":
        segments = named_segments(read_names([header.path]).labels)
        io.write_label_map(target, argmax_labels(values).reshape(like.grid_shape), like, segments=segments)
        return f"{_told(header)} -> {target}: label map"
    if needs_kind:
        values, kind = _as_kind(values, kind, to, header.path)
    written = kind or "logits"
    io.write_channels(target, values.reshape(len(values), *like.grid_shape), like, kind=written)
    return f"{_told(header)} -> {target}: {kind or 'the same values'}"


def _convert_regions(
    header: VolumeHeader, target: Path, to: str | None, like: Volume, values: Float32, kind: str | None, scheme: RegionScheme
) -> str:
    """Write the channels of regions as log-odds, as probabilities, or as the label map that nnU-Net makes of them."""
    order = file_order(values)
    log_odds = order.to_storage(values).copy()
    found, _ = identify_regions(log_odds, "auto", kind=kind, name=str(header.path))
    if found == "probabilities":
        take_log_odds(log_odds)
    grid, source = like.grid_shape, _told(header, counted(scheme.num_regions, "region"))
    if to == "labels":
        io.write_label_map(target, scheme.decode(order.to_user(log_odds)).reshape(grid), like)
        return f"{source} -> {target}: label map"
    written = to or found
    if written != found:
        values = order.to_user(log_odds if written == "logits" else sigmoid(log_odds))
    io.write_channels(target, values.reshape(len(values), *grid), like, kind=written)
    return f"{source} -> {target}: {written}"


def _as_kind(values: Float32, kind: str | None, to: str | None, path: Path) -> tuple[Float32, str]:
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
        raise GridMismatchError(
            f"{header.path}: not on the grid of --like\n{header.difference_from(like)}\n"
            "  convert does not interpolate. Leave --like out to keep the file's own grid; infer, train-crf and evaluate\n"
            "  interpolate it onto the grid of the image with --resample."
        )
    chosen = like or header
    if chosen.affine is None or chosen.spacing is None:
        if not require_suffix(target).holds_scores_alone:
            raise InputError(f"{header.path}: has no geometry, and {target.name} needs one; name the image it belongs to with --like IMAGE")
        num_axes = len(chosen.grid_shape)
        return Volume(_empty(chosen.grid_shape), np.eye(4), (1.0,) * num_axes)
    return Volume(_empty(chosen.grid_shape), chosen.affine, chosen.spacing, chosen.path, chosen)


def _empty(grid_shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.broadcast_to(np.uint8(0), grid_shape)


def _told(header: VolumeHeader, kind: str = "") -> str:
    """Return the first half of the sentence: the input; without a `kind`, a label map, or channels of labels."""
    kind = kind or ("label map" if header.num_channels == 1 else f"{header.num_channels} labels")
    remark = "" if header.misnamed is None else f" ({header.misnamed})"
    return f"{header.path}: {kind}, {TIMES.join(str(size) for size in header.grid_shape)}{remark}"
