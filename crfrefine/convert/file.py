"""Convert images, label maps, logits and probabilities between file formats, and DICOM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from crfrefine.arrays.label_maps import renumber
from crfrefine.arrays.region_scheme import decode, probabilities_of
from crfrefine.arrays.scales import divide_by_scale
from crfrefine.base.array_types import Array, Float32, Labels
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.inputs import keeping_inputs
from crfrefine.base.label_options import notes_on_values
from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.notes import Note
from crfrefine.base.text import counted, text_of_sizes
from crfrefine.cases.content import is_label_map
from crfrefine.cases.dataset_description import read_dataset_description, read_descriptions
from crfrefine.cases.frame import FrameCheck, for_archive
from crfrefine.cases.label_input import read_mapped
from crfrefine.cases.network_output import kind_of_channels, take_logits
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.reading_options import RegionReading, find_regions
from crfrefine.convert.options import ConversionOptions
from crfrefine.convert.placing import grid_to_write, with_place
from crfrefine.errors import InputError
from crfrefine.io import (
    logits_header,
    placed_on,
    read_channels,
    read_header,
    write_channels,
    write_label_map,
)
from crfrefine.io.formats import (
    FORMAT_OF_NAME,
    LABELS_SUFFIXES,
    VOLUME_SUFFIXES,
    WRITTEN_SUFFIXES,
)
from crfrefine.io.paths import add_volumes, holds_scores_alone, is_dicom, require_suffix, suffix_of
from crfrefine.io.reading import read_array
from crfrefine.io.stored import describe_scaling, image_type, scaled_planes
from crfrefine.io.volume import Segments, VolumeHeader, map_segments, named_segments
from crfrefine.io.writing import check_replaceable, check_writable, write_image

# Words for the content of a file where options expect another one.
_FOUND = {
    "labels": "a label map",
    "scores": "logits or probabilities",
    "image": "an image (--as labels takes it for one)",
}


@keeping_inputs()
def convert_file(source: Path, target: Path, options: ConversionOptions) -> str:
    """Convert a volume to another format; return a sentence about input and output, and notes.

    Images and channels keep their values and their type, label maps get the smallest type. With
    `options.to`, logits become probabilities or labels; sigmoid channels of regions in a
    `dataset.json` beside the source become log-odds, probabilities, or nnU-Net's label map. For
    DICOM see `convert/dicom.py`.
    Raises InputError, GridMismatchError or UnsupportedFormatError.
    """
    require_suffix(target)
    check_options(source, target, options)
    add_volumes(source, options.like)
    *_, target_file = check_replaceable(target)

    header = read_header(source)
    like = None
    if options.like is not None:
        like = read_header(options.like, VOLUME_SUFFIXES)
    notes: list[Note] = []
    header, like, compared = with_place(header, like, options, notes)
    placed = placed_on(header, like)
    if placed.turning is not None:
        notes.append(placed.turning)
    regions = find_regions(None, read_descriptions([source]), options.channel_labels)

    content = _content_of(header, target, options, regions)
    if content != "labels":
        refuse_map(source, options, _FOUND[content])
    given = _given({"--scale": options.scale, "--channel-labels": options.channel_labels})
    if given and content != "scores":
        raise InputError(
            f"{source}: {given}: expected logits or probabilities, which --as logits says; found "
            f"{_FOUND[content]}"
        )
    if content != "scores" or options.to == "labels":
        require_suffix(target, WRITTEN_SUFFIXES)
    grid = grid_to_write(placed, like, target, is_filled=content == "labels")
    check_writable(target_file.parent)
    if content == "labels":
        labels = labels_on(grid, placed, options, notes)
        sentence = convert_labels(labels, placed, target, grid, options)
    elif content == "image":
        sentence = convert_image(read_array(placed, as_stored=True), placed, target, grid, options)
    else:
        if grid.affine is not None and holds_scores_alone(target):
            placed, grid = for_archive(placed, grid, target)
        values = read_channels(placed)
        if compared is not None:
            are_regions = regions.scheme_of(values, placed) is not None
            notes += FrameCheck(compared, placed, grid).look(values, are_regions=are_regions)
        sentence = _convert_channels(placed, values, target, options, grid, regions)
    return "\n".join([sentence, *map(str, notes)])


def _given(options: Mapping[str, object]) -> str:
    """Return the names of the options that have a value, as part of a sentence."""
    return " and ".join(name for name, value in options.items() if value is not None)


def check_options(source: Path, target: Path, options: ConversionOptions) -> None:
    """Raise InputError for options that do not go together, or not with these two files."""
    is_read = is_dicom(source)
    is_written = target.suffix.lower() == ".dcm"
    if is_read and is_written:
        raise InputError(
            f"{source} and {target}: both are DICOM; convert to a file such as NAME.nii.gz first"
        )
    wrong: dict[str, object] = {
        "--segments": options.segments,
        "--series": options.series,
        "--series-number": options.series_number,
        "--series-description": options.series_description,
    }
    reason = "neither is DICOM; name such a file, or"
    if is_read or is_written:
        wrong = {"--same-voxels": options.same_voxels or None, "--axes": options.axes}
        if is_read or options.content != "labels":
            wrong["--as"] = options.content
        if options.to != "labels":
            wrong["--to"] = options.to
        wrong |= {"--scale": options.scale, "--channel-labels": options.channel_labels}
        reason = (
            "DICOM says itself what it holds, an image or a label map, and where; convert to a "
            "file such as NAME.nii.gz first, or"
        )
    given = _given(wrong)
    if given:
        raise InputError(f"{source}, {target}: {reason} leave {given} out")
    if options.axes is not None and holds_scores_alone(target):
        raise InputError(
            f"{target}: .npz and .npy hold no place; name a file such as NAME.nii.gz, or leave "
            "--axes out"
        )


def refuse_map(source: Path, options: ConversionOptions, found: str) -> None:
    """Raise InputError if values get new labels, which only those of a label map may."""
    if options.mapping:
        raise InputError(
            f"{source}: --map gives the values of a label map new labels; found {found}; leave "
            "--map out"
        )


def _content_of(
    header: VolumeHeader, target: Path, options: ConversionOptions, regions: RegionReading
) -> str:
    """Return the kind of a conversion: "scores" (logits, probabilities), "labels" or "image"."""
    wanted = {options.content, options.to}
    is_array = FORMAT_OF_NAME[header.family].holds_scores_alone or holds_scores_alone(target)
    if options.content == "image":
        if is_array:
            raise InputError(
                f"{header.path}, {target}: .npz and .npy hold logits alone; leave --as image out"
            )
        return "image"
    if options.content != "labels" and (is_array or wanted != {None}):
        # The channel of a single region has one value per voxel, too.
        if header.num_channels > 1:
            return "scores"
        if regions.declares(1) and not is_label_map(header):
            return "scores"
    if wanted & {"logits", "probabilities"}:
        raise InputError(
            f"{header.path}: holds one value per voxel; logits have one per label at each voxel, "
            "background included: a label map cannot become probabilities or logits\n"
            "  Export the network's output before the argmax, or leave --as and --to out to "
            "convert it as it is."
        )
    if "labels" in wanted:
        return "labels"
    if header.num_channels > 1:
        return "image"
    is_far = any(not 0 <= value <= MAX_LABEL for value in options.mapping)
    if suffix_of(target) in LABELS_SUFFIXES or is_far or is_label_map(header):
        return "labels"
    return "image"


def labels_on(
    grid: VolumeHeader, header: VolumeHeader, options: ConversionOptions, notes: list[Note]
) -> Labels:
    """Read a label map, with its labels by --map, onto a grid, (*grid), which may be larger.

    `notes` gets one on values of --map that do not occur.
    """
    values, found = read_mapped(header, options.mapping)
    labels: Labels = WorkGrid(grid).nearest(
        header, values, "label map", notes, outside="become background"
    )
    notes += notes_on_values(options.mapping, found, "no voxel")
    return labels.T


def segments_in(header: VolumeHeader, mapping: Mapping[int, int]) -> Segments:
    """Return the segments that a file describes, or else those that a `dataset.json` names."""
    segments = map_segments(header.segments, mapping)
    if not segments:
        description = read_dataset_description(header.path)
        if description is not None:
            segments = named_segments(description.label_names)
    return segments


def convert_labels(
    labels: Labels,
    header: VolumeHeader,
    target: Path,
    grid: VolumeHeader,
    options: ConversionOptions,
) -> str:
    """Write the labels of a file, (*grid), in the smallest type; return a sentence."""
    segments = segments_in(header, options.mapping)
    write_label_map(target, labels.reshape(grid.grid_shape), grid, segments=segments)
    source = describe_source(header, f"label map, {header.dtype}")
    return f"{source} -> {target}: label map, {labels.dtype}"


def convert_image(
    stored: Array,
    header: VolumeHeader,
    target: Path,
    grid: VolumeHeader,
    options: ConversionOptions,
) -> str:
    """Write the stored values of a file, (channels, [z,] y, x), as an image; return a sentence."""
    dtype = image_type(stored, header.source, require_suffix(target, WRITTEN_SUFFIXES).image_types)
    num_channels = len(stored)
    planes = scaled_planes(stored.reshape(-1, *grid.stored_grid), header.source)
    write_image(target, dtype, grid, planes, num_channels=num_channels)

    kind = "image"
    if num_channels > 1:
        kind = counted(num_channels, "channel")
        # Channels of floats may be an image's or the scores of labels.
        if options.content is not None or dtype.kind != "f":
            kind = f"image of {kind}"
    source = describe_source(header, f"{kind}, {header.dtype}")
    sentence = f"{source} -> {target}: {kind}, {dtype}"
    scaling = describe_scaling(header.source)
    if not scaling:
        return sentence
    remark = f", which no integers hold exactly; they are written as {dtype}"
    if dtype.kind in "iu":
        remark = f"; {dtype} is the smallest type that holds all of them exactly"
    return f"{sentence}\nits values are {scaling}{remark}"


def _convert_channels(
    header: VolumeHeader,
    values: Float32,
    target: Path,
    options: ConversionOptions,
    grid: VolumeHeader,
    regions: RegionReading,
) -> str:
    """Write channels as they are, as logits, as probabilities, or as the label map they give.

    `values` are (channels, [z,] y, x). Logits of regions are log-odds. `grid` has the geometry of
    the target.
    """
    channels = logits_header([header], fewest=1 if regions.declares(1) else 2)
    to = options.to
    kind = header.kind or ""
    input_type = "auto"
    if options.scale is not None:
        divide_by_scale(values, options.scale, header.path)
        kind = input_type = "probabilities"
    scheme = None
    if to is not None or (not kind and holds_scores_alone(target)):
        # It matters whether the values are logits or probabilities.
        regions.require_number(channels)
        scheme = regions.scheme_of(values, header)
        kind, _ = kind_of_channels(values, header, regions, scheme, input_type)
    word = "label" if scheme is None else "region"
    sentence = f"{describe_source(header, counted(len(values), word))} -> {target}"
    if to == "labels":
        segments: Segments = ()
        channel_labels = None
        if scheme is None:
            segments = segments_in(header, {})
            channel_labels = regions.labels_of_channels(len(values))
        else:
            take_logits(values, kind, scheme)
        labels = decode(reverse_grid(values), scheme).reshape(grid.grid_shape)
        if channel_labels is not None:
            labels = renumber(labels, channel_labels)
        write_label_map(target, labels, grid, segments=segments)
        return f"{sentence}: label map"
    if to not in (None, kind):
        take_logits(values, kind, scheme)
        if to == "probabilities":
            values = probabilities_of(values, scheme)
        kind = to
    values = values.reshape(len(values), *grid.stored_grid)
    write_channels(target, reverse_grid(values), grid, kind=kind or "logits")
    return f"{sentence}: {kind or 'the same values'}"


def describe_source(header: VolumeHeader, kind: str) -> str:
    """Return the first half of the sentence: the input."""
    shape = text_of_sizes(header.grid_shape)
    remark = ""
    if header.misnamed is not None:
        remark = f" ({header.misnamed})"
    return f"{header.path}: {kind}, {shape}{remark}"
