"""Convert images, label maps, logits and probabilities between file formats, and DICOM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from crfrefine import io
from crfrefine.arrays.label_maps import argmax_labels, map_labels
from crfrefine.arrays.softmax import sigmoid, softmax
from crfrefine.base.array_types import Labels
from crfrefine.base.geometry import reverse_grid, spacing_of
from crfrefine.base.inputs import keeping_inputs
from crfrefine.base.notes import Note
from crfrefine.base.option import note_on_values
from crfrefine.base.text import TIMES, counted
from crfrefine.cases.dataset_description import read_descriptions
from crfrefine.cases.foreground import holds_labels
from crfrefine.cases.grid_differences import explain_difference
from crfrefine.cases.network_output import recognize, take_logits
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.reading_options import RegionReading, find_regions
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.io.paths import (
    FORMAT_OF_NAME,
    FORMAT_OF_SUFFIX,
    LABELS_SUFFIXES,
    add_volumes,
    holds_scores_alone,
    require_suffix,
    suffix_of,
)
from crfrefine.io.reading import read_array, read_whole_numbers
from crfrefine.io.stored import describe_scaling, image_type, scaled_planes
from crfrefine.io.volume import Segment, VolumeHeader, map_segments, named_segments
from crfrefine.io.writing import check_replaceable, check_writable
from crfrefine.runs.tools.content import is_label_map
from crfrefine.runs.tools.options import ConversionOptions
from crfrefine.runs.tools.placing import with_axes, with_geometry_of


@keeping_inputs()
def convert_file(source: Path, target: Path, options: ConversionOptions) -> str:
    """Convert a volume to another format; return a sentence about input and output, and notes.

    Images and channels keep their values and their type, label maps get the smallest type. With
    `options.to`, logits become probabilities or labels; sigmoid channels of regions in a
    `dataset.json` beside the source become log-odds, probabilities, or nnU-Net's label map. For
    DICOM see `runs.tools.dicom`.
    Raises InputError, GridMismatchError or UnsupportedFormatError.
    """
    _check_options(source, target, options)
    add_volumes(source, options.like)
    *_, target_file = check_replaceable(target)

    header = io.read_header(source)
    like = None
    if options.like is not None:
        like = io.read_header(options.like, io.VOLUME_SUFFIXES)
    notes: list[Note] = []
    if options.same_voxels:
        header = with_geometry_of(header, like, notes)
    if options.axes is not None:
        header = with_axes(header, like, options.axes, options.align, notes)
        like = None  # The array has a grid of its own.
    placed = io.placed_on(header, like)
    if placed.turning is not None:
        notes.append(placed.turning)
    descriptions = list(read_descriptions([source]))
    regions = find_regions(None, descriptions)
    named: Sequence[Segment] = ()
    if descriptions:
        named = named_segments(descriptions[0].label_names)

    content = _content_of(header, target, options, regions)
    if options.mapping and content != "labels":
        found = "logits or probabilities" if content == "scores" else "an image"
        raise InputError(
            f"{source}: --map gives the values of a label map new labels; found {found}; leave "
            "--map out, or say --as labels"
        )
    if like is not None:
        require_grid(placed, like, is_filled=content == "labels")
    geometry = _geometry(placed, like, target)
    check_writable(target_file.parent)
    if content == "scores":
        segments = header.segments or named
        sentence = _convert_channels(placed, target, options.to, geometry, regions, segments)
    elif content == "labels":
        sentence = _convert_labels(placed, target, options, geometry, named, notes)
    else:
        sentence = _convert_image(placed, target, geometry, options.content)
    return "\n".join([*map(str, notes), sentence])


def _check_options(source: Path, target: Path, options: ConversionOptions) -> None:
    """Raise InputError for a target without a format, and for options that do not go together.

    And for those that are about DICOM.
    """
    require_suffix(target)
    if options.content == "image" and options.to is not None:
        raise InputError(f"{source}: an image does not become {options.to}; leave --as or --to out")
    if options.align is not None and options.axes is None:
        raise InputError(f"{source}: --align says how --axes places an array; leave it out")
    if options.axes is not None and holds_scores_alone(target):
        raise InputError(
            f"{target}: .npz and .npy hold no place; name a file such as NAME.nii.gz, or leave "
            "--axes out"
        )
    if options.segments is not None:
        raise InputError(
            f"{target}: --segments describes the labels of a DICOM segmentation; name a file such "
            "as NAME.dcm"
        )
    if (options.series, options.series_number, options.series_description) != (None, None, None):
        raise InputError(
            f"{source}, {target}: neither is DICOM; leave --series, --series-number and "
            "--series-description out"
        )
    if options.to == "labels":
        require_suffix(target, io.WRITTEN_SUFFIXES)


def _content_of(
    header: VolumeHeader, target: Path, options: ConversionOptions, regions: RegionReading
) -> str:
    """Return what a file is converted as: "scores" (logits, probabilities), "labels" or "image"."""
    content = options.content
    is_array = FORMAT_OF_NAME[header.family].holds_scores_alone or holds_scores_alone(target)
    if content == "image" and is_array:
        raise InputError(
            f"{header.path}, {target}: .npz and .npy hold logits alone; leave --as image out"
        )
    if content in ("image", "labels"):
        return content
    may_be_scores = is_array or (content, options.to) != (None, None)
    if may_be_scores:
        # The channel of a single region has one value per voxel, too.
        if header.num_channels > 1:
            return "scores"
        if regions.declares(1) and not holds_labels(header, of_region=True):
            return "scores"
    if content == "logits":
        raise InputError(
            f"{header.path}: holds one value per voxel; logits have one per label at each voxel, "
            "background included\n  Leave --as logits out to convert it as it is."
        )
    if options.to is not None:
        return "labels"
    if header.num_channels > 1:
        return "image"
    is_for_labels = suffix_of(target) in LABELS_SUFFIXES or holds_scores_alone(target)
    if is_for_labels or is_label_map(header):
        return "labels"
    return "image"


def _convert_labels(
    header: VolumeHeader,
    target: Path,
    options: ConversionOptions,
    like: VolumeHeader,
    named: Sequence[Segment],
    notes: list[Note],
) -> str:
    """Write a label map in the smallest type; `notes` gets a sentence if it is filled."""
    if options.to not in (None, "labels"):
        raise InputError(
            f"{header.path}: holds one value per voxel; a label map cannot become {options.to}, "
            "export the network's output before the argmax"
        )
    require_suffix(target, io.WRITTEN_SUFFIXES)
    values = labels_on(like, header, notes)
    labels, found = map_labels(values, options.mapping)
    segments = map_segments(header.segments, options.mapping) or named
    io.write_label_map(target, labels.reshape(like.grid_shape), like, segments=segments)
    described = describe_source(header, f"label map, {header.dtype}")
    sentence = f"{described} -> {target}: label map, {labels.dtype}"
    return with_note_on_values(sentence, options.mapping, found)


def with_note_on_values(sentence: str, mapping: Mapping[int, int], found: Sequence[int]) -> str:
    """Return a sentence with a note on values of --map that a label map lacks, if it does."""
    note = note_on_values(mapping, found, "no voxel")
    if note is None:
        return sentence
    return f"{sentence}\n{note}"


def labels_on(grid: VolumeHeader, header: VolumeHeader, notes: list[Note]) -> Labels:
    """Read a label map onto a grid, (*grid), of which it may hold a part."""
    values = read_whole_numbers(header)
    labels: Labels = WorkGrid(grid).nearest(
        header, values, "label map", notes, outside="become background"
    )
    return labels.T


def _convert_image(
    header: VolumeHeader, target: Path, like: VolumeHeader, content: str | None
) -> str:
    """Write an image, or channels of which nobody says what they are, with the file's values."""
    target_format = require_suffix(target, io.WRITTEN_SUFFIXES)
    stored = read_array(header, as_stored=True)
    dtype = image_type(stored, header.source, target_format.image_types)
    stored = stored.reshape(header.num_channels, *like.grid_shape[::-1])
    planes = scaled_planes(stored, header.source)
    io.write_image(target, dtype, like, planes, num_channels=header.num_channels)

    kind = "image"
    if header.num_channels > 1:
        kind = counted(header.num_channels, "channel")
        # Channels of floats may be an image's or the scores of labels.
        if content is not None or dtype.kind != "f":
            kind = f"image of {kind}"
    described = describe_source(header, f"{kind}, {header.dtype}")
    sentence = f"{described} -> {target}: {kind}, {dtype}"
    scaling = describe_scaling(header.source)
    if not scaling:
        return sentence
    remark = f", which no integers hold exactly; they are written as {dtype}"
    if dtype.kind in "iu":
        remark = f"; {dtype} is the smallest type that holds all of them exactly"
    return f"{sentence}\nits values are {scaling}{remark}"


def _convert_channels(
    header: VolumeHeader,
    target: Path,
    to: str | None,
    like: VolumeHeader,
    regions: RegionReading,
    named: Sequence[Segment],
) -> str:
    """Write channels as they are, as logits, as probabilities, or as the label map they give.

    Logits of regions are log-odds. `like` has the geometry of the target.
    """
    fewest = 1 if regions.declares(1) else 2
    placed = io.logits_header([header], fewest=fewest, grid=like)
    values = reverse_grid(io.read_channels(*placed.files))
    kind = header.kind
    if to is None and (kind is not None or not require_suffix(target).holds_scores_alone):
        source = describe_source(header, counted(len(values), "label"))
    else:  # It matters whether the values are logits or probabilities.
        scores = reverse_grid(values).copy()
        regions.require_number(placed)
        scheme = regions.scheme_of(scores, header)
        kind, _ = recognize(scores, header, regions, scheme)
        word = "label" if scheme is None else "region"
        source = describe_source(header, counted(len(values), word))
        if to == "labels":
            if scheme is None:
                labels = argmax_labels(values)
            else:
                labels = scheme.decode(reverse_grid(take_logits(scores, kind, scheme)))
                named = ()
            io.write_label_map(target, labels.reshape(like.grid_shape), like, segments=named)
            return f"{source} -> {target}: label map"
        if to not in (None, kind):
            logits = take_logits(scores, kind, scheme)
            kind = to
            if to == "probabilities":
                logits = softmax(logits) if scheme is None else sigmoid(logits)
            values = reverse_grid(logits)
    channels = values.reshape(len(values), *like.grid_shape)
    io.write_channels(target, channels, like, kind=kind or "logits")
    return f"{source} -> {target}: {kind or 'the same values'}"


def _geometry(header: VolumeHeader, like: VolumeHeader | None, target: Path) -> VolumeHeader:
    """Return the header whose geometry the file to write gets.

    A plane becomes a volume of one slice if it has a place that only such a volume has in another
    format.
    """
    chosen = like or header
    if chosen.affine is None or chosen.spacing is None:
        if not require_suffix(target).holds_scores_alone:
            raise InputError(
                f"{header.path}: has no geometry, and {target.name} needs one; name the image it "
                "belongs to with --like IMAGE"
            )
        return chosen
    is_same_format = FORMAT_OF_SUFFIX[suffix_of(target)].name == chosen.family
    if len(chosen.grid_shape) != 3 and not is_same_format:
        in_plane = np.array(chosen.affine)
        in_plane[:2, :2] = np.eye(2)
        in_plane[:2, 3] = 0.0
        in_space = spacing_of(chosen.affine)
        if in_space[2] > 0 and not np.array_equal(in_plane, np.eye(4)):
            return replace(chosen, grid_shape=(*chosen.grid_shape, 1), spacing=in_space)
    return chosen


def require_grid(
    header: VolumeHeader, like: VolumeHeader, *, is_filled: bool, advice: str | None = None
) -> None:
    """Raise GridMismatchError if a file has another grid than that of --like.

    A label map (`is_filled`) may be stored for a part of it. Without advice the error explains how
    the grids differ, if that can be told.
    """
    if header.on_same_grid(like):
        return
    if is_filled and WorkGrid(like).part(header, "label map") is not None:
        return
    advice = advice or explain_difference(like, "image", header, "file")
    if advice is None:
        advice = (
            "convert does not interpolate, as the other commands do with --resample. "
            "Leave --like out to keep the file's own grid."
        )
    raise GridMismatchError(
        f"{header.path}: not on the grid of --like\n{header.difference_from(like)}\n  {advice}"
    )


def describe_source(header: VolumeHeader, kind: str) -> str:
    """Return the first half of the sentence: the input."""
    shape = TIMES.join(map(str, header.grid_shape))
    remark = ""
    if header.misnamed is not None:
        remark = f" ({header.misnamed})"
    return f"{header.path}: {kind}, {shape}{remark}"
