"""Convert logits, probabilities and label maps between file formats and between kinds of values, and DICOM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import crfrefine
from crfrefine import errors, io
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.arrays.probabilities import identify, softmax, take_logarithms
from crfrefine.arrays.region_scheme import sigmoid, take_log_odds
from crfrefine.base.failures import failing_alone
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.inputs import add_inputs, keeping_inputs
from crfrefine.base.text import TIMES, counted
from crfrefine.errors import GridMismatchError, InputError, UnexpectedError, UnsupportedFormatError
from crfrefine.io.atomic import check_replaceable
from crfrefine.io.paths import add_volumes, files_written, is_dicom, require_suffix
from crfrefine.io.volume import Segment, Volume, VolumeHeader, named_segments
from crfrefine.runs.cases.dataset_description import read_dataset_description, read_descriptions
from crfrefine.runs.cases.reading_options import RegionReading, find_regions

SECONDS = 60  # Processor time that a conversion of DICOM may take; each million bytes of its files adds a second.
_START = "import sys; sys.path.append(sys.argv[1]); from crfrefine.runs.tools.convert import serve; serve()"


@keeping_inputs()
def convert_file(
    source: Path, target: Path, to: str | None, like: Path | None, segments: Path | None
) -> str:
    """Convert a label map, logits or probabilities of several labels, or DICOM; return a sentence about input and output.

    `to` is "logits", "probabilities" (softmax), "labels" (argmax) or None; sigmoid channels of regions in a
    `dataset.json` beside the source become log-odds, probabilities, or nnU-Net's label map. `like` is an
    image with the same voxels, whose geometry the target gets, as a source without one needs. A DICOM series
    becomes an image, a segmentation a label map; a label map becomes a segmentation of the series `like`,
    with the descriptions of another one, `segments`. Raises InputError, GridMismatchError or UnsupportedFormatError.
    """
    if is_dicom(source) or target.suffix.lower() == ".dcm":
        return _convert_apart(source, target, to, like, segments)
    if segments is not None:
        raise InputError(
            f"{target}: --segments describes the labels of a DICOM segmentation; name a file such as NAME.dcm"
        )
    require_suffix(target)
    if to == "labels":
        require_suffix(target, io.WRITTEN_SUFFIXES)
    add_volumes(source, like)
    check_replaceable(*reversed(files_written(target)))
    header = io.read_header(source)
    like_header = io.read_header(like, io.VOLUME_SUFFIXES) if like is not None else None
    placed = header if like_header is None else io.placed_on(header, like_header)
    notes = [f"{header.path.name}: {placed.turning}"] if placed.turning else []
    geometry = _geometry(placed, like_header, target)
    descriptions = list(read_descriptions([source]))
    regions, segments_of_names = (
        find_regions(None, descriptions),
        named_segments(descriptions[0].label_names if descriptions else {}),
    )
    if header.num_channels > 1 or regions.is_channel(header):
        return "\n".join(
            [
                *notes,
                _convert_channels(header, target, to, geometry, regions, segments_of_names),
            ]
        )
    if to not in (None, "labels"):
        raise InputError(
            f"{header.path}: holds one value per voxel; a label map cannot become {to}, export the network's output before the argmax"
        )
    require_suffix(target, io.WRITTEN_SUFFIXES)
    labels = io.read_labels(header.path, grid=geometry.header)
    named = header.segments or segments_of_names
    io.write_label_map(target, labels.data.reshape(geometry.grid_shape), geometry, segments=named)
    kind = (
        "label map" if header.dtype in ("uint8", "uint16") else "volume"
    )  # CT has signed integers.
    return "\n".join([*notes, f"{_describe(header, kind)} -> {target}: {kind}"])


def _convert_apart(
    source: Path, target: Path, to: str | None, like: Path | None, segments: Path | None
) -> str:
    """Convert from or to DICOM in a process with limits, which decoders of damaged files need; its errors are raised here."""
    request = json.dumps([source, target, to, like, segments, SECONDS], default=str)
    command = [
        sys.executable,
        "-P",
        "-c",
        _START,
        str(Path(crfrefine.__file__).parents[1]),
        request,
    ]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        is_late = done.returncode == -signal.SIGXCPU
        reason = (
            "takes far longer than that of files of its size should"
            if is_late
            else f"ended with status {done.returncode}"
        )
        raise UnsupportedFormatError(
            f"{source if is_dicom(source) else like}: damaged DICOM: its decoding {reason}; copy or export it again"
        )
    answer: dict[str, str] = json.loads(done.stdout.splitlines()[-1])  # Decoders may print.
    for kind in answer.keys() - {"done"}:
        raise getattr(errors, kind, UnexpectedError)(answer[kind])
    return answer["done"]


def serve() -> None:
    """Convert as the argument says, and print the sentence, or the message and the kind of the error."""
    source, target, to, like, segments, seconds = json.loads(sys.argv[2])
    answer = {}
    with failing_alone(lambda failure: answer.update({failure.kind: failure.message}), source):
        answer["done"] = _convert_dicom(
            Path(source),
            Path(target),
            to,
            like and Path(like),
            segments and Path(segments),
            seconds,
        )
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
    sys.stdout.flush()
    os._exit(0)


@keeping_inputs()
def _convert_dicom(
    source: Path,
    target: Path,
    to: str | None,
    like: Path | None,
    segments: Path | None,
    seconds: int,
) -> str:
    """Convert a series or a segmentation to another format, or a label map to a segmentation of the series `like`."""
    try:
        from crfrefine.io import dicom
    except ImportError as error:
        raise InputError(
            f"{source}: DICOM needs a package that is not installed ({error}); pip install 'crfrefine[dicom]'"
        ) from None
    dicom.seconds = seconds
    is_read = is_dicom(source)
    if is_read and target.suffix.lower() == ".dcm":
        raise InputError(
            f"{source} and {target}: both are DICOM; convert to a file such as NAME.nii.gz first"
        )
    if to not in (None, "labels"):
        raise InputError(f"{source}: DICOM holds images and label maps, no {to}; leave --to out")
    add_inputs(
        *(
            file
            for path in (source, like, segments)
            if path
            for file in (path.iterdir() if path.is_dir() else [path])
        )
    )
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
        return "\n".join(
            [
                f"{_describe(volume.header, kind)} -> {target}: {kind}, {volume.data.dtype}",
                *volume.header.notes,
            ]
        )
    if like is None or not is_dicom(like):
        found = "" if like is None else f", found {like}, which holds no DICOM files"
        raise InputError(
            f"{target}: a DICOM segmentation refers to the series it was made on; name its folder with --like SERIES{found}"
        )
    header = io.read_header(source, io.VOLUME_SUFFIXES)
    series = dicom.read_series(like)
    grid = series.header
    if not io.placed_on(header, grid).on_same_grid(grid):
        raise GridMismatchError(
            f"{source}: not on the grid of --like\n{header.difference_from(grid)}\n  Name the series that was refined."
        )
    labels = io.read_labels(source, grid=grid)
    named = header.segments
    if not named and (description := read_dataset_description(source)):
        named = named_segments(description.label_names)
    dicom.write(target, labels.data, named, series, segments)
    return f"{_describe(header, 'label map')} -> {target}: DICOM segmentation of {like}"


def _convert_channels(
    header: VolumeHeader,
    target: Path,
    to: str | None,
    like: Volume,
    regions: RegionReading,
    named: Sequence[Segment],
) -> str:
    """Write channels as they are, as logits (log-odds of regions), as probabilities, or as the label map that they give."""
    fewest = 1 if regions.declares(1) else 2
    values, kind = io.read_logits([header.path], fewest=fewest, grid=like.header), header.kind
    needs_kind = to is not None or (kind is None and require_suffix(target).holds_scores_alone)
    scheme = regions.scheme_of(values, header.path) if needs_kind else None
    source = _describe(header, counted(len(values), "label" if scheme is None else "region"))
    label_map = argmax_labels(values) if to == "labels" and scheme is None else None
    if needs_kind and label_map is None:
        logits = reverse_grid(values).copy()  # contiguous
        decide = identify if scheme is None else regions.identify
        kind, _ = decide(logits, "auto", kind, header.path)
        if kind == "probabilities":
            (take_logarithms if scheme is None else take_log_odds)(logits)
        if scheme is not None and to == "labels":
            label_map = scheme.decode(reverse_grid(logits))
        elif to not in (None, kind):
            to_probabilities = softmax if scheme is None else sigmoid
            kind, values = to, reverse_grid(logits if to == "logits" else to_probabilities(logits))
    if label_map is not None:
        io.write_label_map(
            target,
            label_map.reshape(like.grid_shape),
            like,
            segments=named if scheme is None else (),
        )
        return f"{source} -> {target}: label map"
    io.write_channels(
        target, values.reshape(len(values), *like.grid_shape), like, kind=kind or "logits"
    )
    return f"{source} -> {target}: {kind or 'the same values'}"


def _geometry(header: VolumeHeader, like: VolumeHeader | None, target: Path) -> Volume:
    """Return an empty volume with the geometry of the file to write."""
    if like is not None and not header.on_same_grid(like):
        advice = "convert does not interpolate, as the other commands do with --resample. Leave --like out to keep the file's own grid."
        raise GridMismatchError(
            f"{header.path}: not on the grid of --like\n{header.difference_from(like)}\n  {advice}"
        )
    chosen = like or header
    empty: NDArray[np.uint8] = np.broadcast_to(np.uint8(0), chosen.grid_shape)
    if chosen.affine is not None and chosen.spacing is not None:
        return Volume(empty, chosen.affine, chosen.spacing, chosen.path, chosen)
    if not require_suffix(target).holds_scores_alone:
        raise InputError(
            f"{header.path}: has no geometry, and {target.name} needs one; name the image it belongs to with --like IMAGE"
        )
    return Volume(empty, np.eye(4), (1.0,) * empty.ndim)


def _describe(header: VolumeHeader, kind: str) -> str:
    """Return the first half of the sentence: the input."""
    remark = "" if header.misnamed is None else f" ({header.misnamed})"
    return f"{header.path}: {kind}, {TIMES.join(str(size) for size in header.grid_shape)}{remark}"
