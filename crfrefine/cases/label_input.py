"""Read a label map instead of a network's logits, a reference, and strokes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from crfrefine.arrays.arguments import given_network_spacing
from crfrefine.arrays.interpolated import notes_on_labels
from crfrefine.arrays.label_maps import (
    channels_of,
    labels_of_one_hot,
    map_labels,
    present_labels,
    renumber,
)
from crfrefine.arrays.network import AUTO, LabelMapNetwork
from crfrefine.arrays.scales import are_rounded_probabilities, usual_scale
from crfrefine.base.array_types import Labels
from crfrefine.base.label_options import REFERENCE
from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import listed
from crfrefine.cases.content import evidence_of_image
from crfrefine.cases.label_names import MAP_OPTION, LabelNames, names_of, without_mapped
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.roles import ADVICE_ON_STROKES, error_of_image
from crfrefine.errors import InputError
from crfrefine.io.reading import (
    LABEL_ADVICE,
    LABEL_LIMITS,
    LABEL_TOLERANCE,
    Piece,
    read_whole_numbers,
)
from crfrefine.io.volume import Segment, Segments, VolumeHeader, map_segments

if TYPE_CHECKING:
    from pathlib import Path

    from crfrefine.cases.case_headers import CaseHeaders
    from crfrefine.cases.reading_options import ReadingOptions

# The advice where one whole number per voxel is rather a probability; `{top}` is its scale.
GIVE_SCALE = "For the probability of label 1, give --scale {top:g}"
FOR_PROBABILITIES = f"{GIVE_SCALE} --input-type probabilities"
CUT_REFERENCE = "A reference has labels: cut the probability of a structure at half of {top:g}"
EXCHANGED = "-i and -p seem to be exchanged: -i takes the images, -p the network's output."
MAX_SHOWN = 12  # most labels that a message lists
_MAX_GRAY_VALUES = 256  # under "auto", a file with more different values is rather an image


def read_mapped(
    file: VolumeHeader,
    mapping: Mapping[int, int],
    tolerance: float = LABEL_TOLERANCE,
    advice: str = LABEL_ADVICE,
    rounding: str = "",
) -> tuple[Labels, tuple[int, ...]]:
    """Read a label map, ([z,] y, x), with the new labels of a mapping, and its values that occur.

    Only values of the mapping may be no labels, such as -1 or 70000. Arguments and errors are as of
    `read_whole_numbers`.
    """
    limits = (min((0, *mapping)), max((MAX_LABEL, *mapping)))
    values = read_whole_numbers(file, tolerance, advice, rounding, limits)
    if limits == LABEL_LIMITS:
        return map_labels(values, mapping)
    present = np.unique(values).tolist()
    numbers = [mapping.get(value, value) for value in present]
    for value, number in zip(present, numbers, strict=True):
        if not 0 <= number <= MAX_LABEL:
            raise InputError(
                f"{file.path}: not a label map: expected labels from 0 to {MAX_LABEL}, found "
                f"{value}, which --map {value}=LABEL gives a label"
            )
    found = tuple(value for value in present if value in mapping)
    return renumber(np.searchsorted(present, values), numbers), found


def read_label_map(
    headers: CaseHeaders, options: ReadingOptions, notes: list[Note]
) -> LabelMapNetwork:
    """Read a label map onto the grid of the image; `notes` gets those for the user.

    Raises InputError if it cannot be one.
    """
    file = headers.network.first
    is_requested = options.input_type == "labels"
    advice = (
        "logits need one value per label (-p BACKGROUND -p FOREGROUND), or --regions NAME=1 for a "
        "single region; for the log-odds of label 1 alone, a network's output before the sigmoid, "
        "give --input-type logits; for its probability in percent, --input-type probabilities "
        "--scale 100"
    )
    if headers.image.num_channels > 1:
        advice += f"\n  {EXCHANGED}"
    tolerance = LABEL_TOLERANCE
    rounding = ""
    if not is_requested:  # In doubt, only whole numbers are labels.
        tolerance = 0.0
        rounding = (
            "--input-type labels rounds labels that a program has scaled, those within "
            f"{LABEL_TOLERANCE:g}; "
        )
    labels, mapped = read_mapped(file, options.mapping, tolerance, advice, rounding)
    names = without_mapped(names_of(file.segments), options.mapping)
    labels, _ = options.names.renumber(file.path, names, labels, notes)

    present = present_labels(labels)
    reason = "requested"
    if not is_requested:
        reason = "it has one value per voxel, whole numbers from 0 up"
        if len(present) > _MAX_GRAY_VALUES:
            raise InputError(
                f"{file.path}: one value per voxel, {len(present)} different ones, as in an image; "
                "expected logits with one value per label, background included. For a label map, "
                "give --input-type labels. "
                f"{FOR_PROBABILITIES.format(top=usual_scale(present[-1]))}"
            )
        require_labels(labels, file.path, FOR_PROBABILITIES)
    remarks = notes_on_labels(labels)
    declared = options.declared
    if declared is not None:
        unknown = sorted({*present}.difference(declared.numbers))
        if unknown:
            raise InputError(
                f"{file.path}: has labels that are not declared: {listed(unknown, MAX_SHOWN)}\n"
                f"  Expected labels among {listed(declared.numbers, MAX_SHOWN)} of "
                f"{declared.source}: add them there, or give them one of these labels with "
                f"--map {unknown[0]}=LABEL." + "".join(f"\n  {remark}." for remark in remarks)
            )
    name = file.path.name
    notes.append(NoteKind.TAKEN_AS(name=name, what="a label map", reason=reason))
    notes += [remark.about(name) for remark in remarks]
    label_map = LabelMapNetwork(labels, present, options.num_declared, mapped=mapped)
    return on_image_grid(label_map, file, headers, options, notes)


def require_labels(values: Labels, path: Path, advice: str) -> None:
    """Raise InputError for whole numbers, ([z,] y, x), that are rather rounded probabilities.

    In the advice, `{top}` is their scale.
    """
    if not are_rounded_probabilities(values):
        return
    highest = int(values.max())
    different = np.count_nonzero(np.bincount(values.reshape(-1)))
    raise InputError(
        f"{path}: expected a label map, found {different} different whole numbers up to {highest} "
        "that change from voxel to voxel, as those of an image do, or of the probability of one "
        f"structure in percent or from 0 to 255\n  {advice.format(top=usual_scale(highest))}."
    )


def segments_of_label_map(file: VolumeHeader, options: ReadingOptions) -> Segments:
    """Return the segments of a label map with the numbers that the run gives its labels."""
    names = without_mapped(names_of(file.segments), options.mapping)
    mapped = map_segments(file.segments, options.mapping)
    return map_segments(mapped, options.names.moves(names))


def names_in_reference(file: VolumeHeader, options: ReadingOptions) -> dict[int, str]:
    """Return the names of labels in a reference, or else in a `dataset.json` beside it."""
    names = without_mapped(names_of(file.segments), options.reference_mapping)
    return names or dict(options.reference_names)


def read_reference(
    file: VolumeHeader, options: ReadingOptions, known: Sequence[Segment], notes: list[Note]
) -> Labels:
    """Read a reference, ([z,] y, x), whose labels get their numbers in the run, or in `known`.

    These are the segments of the network's output, which count if the run has no names.
    """
    labels, _ = read_mapped(file, options.reference_mapping)
    require_labels(labels, file.path, CUT_REFERENCE)
    wanted = options.names or LabelNames.of(names_of(known), "the network's output")
    names = names_in_reference(file, options)
    labels, _ = wanted.renumber(file.path, names, labels, notes, f"{MAP_OPTION}{REFERENCE}:")
    return labels


def read_strokes(
    file: VolumeHeader,
    grid: WorkGrid,
    options: ReadingOptions,
    known: Sequence[Segment],
    notes: list[Note],
) -> Labels:
    """Read drawn voxels onto a grid, (*grid); names are matched as in `read_reference`.

    A stroke with the name of the background gets the value BACKGROUND.
    """
    from crfrefine.arrays.strokes import BACKGROUND

    values = read_whole_numbers(file)
    evidence = evidence_of_image(values)
    if evidence:
        raise error_of_image(file.path, "strokes", evidence, ADVICE_ON_STROKES)
    notes += notes_on_labels(values, file.path.name)
    wanted = options.names or LabelNames.of(names_of(known), "the network's output")
    _, moved = wanted.renumber(file.path, names_of(file.segments), values, notes, option="")
    for label, number in moved.items():
        moved[label] = number or BACKGROUND
    labels, _ = map_labels(values, moved)
    return grid.nearest(file, labels, "strokes", notes, outside="are not drawn").T


def label_map_of_one_hot(
    headers: CaseHeaders,
    pieces: Iterable[Piece],
    options: ReadingOptions,
    notes: list[Note],
) -> LabelMapNetwork | None:
    """Return the label map of one-hot channels, by their pieces.

    None if they are something else, or declared as such. `notes` gets those for the user.
    """
    if options.input_type != "auto":
        return None
    header = headers.network
    shape = (header.num_labels, *header.first.stored_grid)
    parts = ((piece.channels.start, piece.planes, piece.values) for piece in pieces)
    labels = labels_of_one_hot(parts, shape, header.path)
    if labels is None:
        return None
    reason = "each voxel has 1 in one channel and 0 in the others"
    notes.append(NoteKind.TAKEN_AS(name=header.path.name, what="a label map", reason=reason))
    num_labels = header.num_labels
    channel_labels = options.regions.labels_of_channels(num_labels)
    if channel_labels is not None:
        labels = renumber(labels, channel_labels)
        num_labels = max(channel_labels) + 1
    label_map = LabelMapNetwork(labels, present_labels(labels), num_labels)
    return on_image_grid(label_map, header.first, headers, options, notes)


def on_image_grid(
    label_map: LabelMapNetwork,
    file: VolumeHeader,
    headers: CaseHeaders,
    options: ReadingOptions,
    notes: list[Note],
) -> LabelMapNetwork:
    """Return the label map of a file on the image's grid.

    Its number of labels, 0 if none are declared, is then that of the labels that occur.
    """
    labels = label_map.labels
    present = label_map.channels
    lost = dict(label_map.lost)
    network_spacing = given_network_spacing(options.network_spacing, headers.image.num_axes)
    like = headers.image
    placed = WorkGrid(like).nearest(file, labels, "label map", notes, outside="become background")
    if not like.on_same_grid(file):
        if network_spacing == AUTO:
            # Voxels of the file that one voxel of the image is long, along each axis.
            in_file = np.linalg.solve(file.required_affine[:3, :3], like.required_affine[:3, :3])
            lengths = np.linalg.norm(in_file, axis=0)[: like.num_axes]
            if (lengths < 1.0 - 1e-3).any():  # A coarser grid; headers keep six digits.
                network_spacing = tuple((np.array(headers.spacing) / lengths).tolist())
        # On another grid, small structures may be lost.
        present = present_labels(placed)
        for label in sorted({*label_map.channels}.difference(present, lost, [0])):
            lost[label] = int(np.count_nonzero(labels == label))
    channels = channels_of(present)
    return replace(
        label_map,
        labels=placed.T,
        channels=channels,
        num_labels=label_map.num_labels or channels[-1] + 1,
        network_spacing=network_spacing,
        lost=lost,
    )
