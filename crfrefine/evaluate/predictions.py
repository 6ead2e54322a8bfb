"""A method's label map and probabilities of a case, on the grid of the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crfrefine import io
from crfrefine.arrays.label_maps import argmax_labels, renumber
from crfrefine.arrays.padding import (
    check_share,
    find_padding,
    find_ties,
    notes_on_padding,
    write_background,
)
from crfrefine.arrays.probabilities import BLOCK_VOXELS
from crfrefine.arrays.region_scheme import RegionScheme, probabilities_of
from crfrefine.arrays.softmax import clip_overshoot
from crfrefine.base.array_types import Array, Bool, Float32, Labels
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.notes import Note, NoteKind
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.foreground import (
    holds_labels,
    holds_rounded_probabilities,
    read_all_channels,
)
from crfrefine.cases.frame import OF_FRAME, FrameCheck, read_network_file
from crfrefine.cases.label_names import names_of
from crfrefine.cases.network_output import kind_of_channels, take_logits
from crfrefine.errors import InputError
from crfrefine.evaluate.reference import Reference, read_labels
from crfrefine.io.headers import with_channel_axis
from crfrefine.io.volume import VolumeHeader, map_segments


class Prediction(NamedTuple):
    """A method's result for a case, from its file, on the grid of the reference."""

    label_map: Labels  # (*grid); regions are combined as nnU-Net does.
    # (L, *grid) float32, or of regions (R, *grid); None for a file of labels.
    probabilities: Float32 | None = None
    notes: tuple[Note, ...] = ()  # Whether they were taken as logits or as probabilities, and why.
    labels: Sequence[int] = ()  # Those of the channels, one each unless they are of regions.
    # The labels of the region of each channel; None means that the channels are labels.
    channels: tuple[tuple[int, ...], ...] | None = None
    mapped: tuple[int, ...] = ()  # The values of the file that `--map` gave new labels.
    names: Mapping[int, str] = {}  # Those of labels in the file, by their numbers in the run.


def read_masks(method: str, files: CaseFiles, reference: Reference) -> Prediction:
    """Read the label map of a method, with its probabilities if the file holds them."""
    if files.problem:
        raise InputError(files.problem)
    path = files.labels
    grid = reference.header
    measured = reference.measured
    if measured.structures:
        return _prediction_of_labels(method, files, reference, "structures")
    reading = measured.readings[method]
    mapping = reading.mapping
    paths = files.network if path is None else (path,)
    stored = io.read_header(paths[0])
    header = with_channel_axis(stored, grid)
    # Logits and probabilities have several values per voxel or declare such values, or they are the
    # single channel of a region or of label 1.
    is_map = path is not None and header.num_channels == 1 and header.kind is None
    if is_map and reading.scale is not None:
        is_map = not holds_rounded_probabilities(header)
    if is_map and holds_labels(header, of_region=reading.regions.declares(1)):
        return _prediction_of_labels(method, files, reference, "label map")
    if mapping:
        raise InputError(
            f"{paths[0]}: --map gives the values of a label map new labels; found logits or "
            "probabilities, whose channels are labels in their order; leave --map out"
        )
    prediction = _read_channels(paths, reference, method)
    is_alone = len(paths) == 1 and stored.num_channels == 1 and prediction.channels is None
    if is_alone and not prediction.label_map.any():
        reference.warnings.append(NoteKind.NOWHERE_HALF(stored.path.name))
    return prediction


def _prediction_of_labels(
    method: str, files: CaseFiles, reference: Reference, what: str
) -> Prediction:
    """Read a label map or structures onto the grid of the reference."""
    volume, mapped, names = read_labels(
        files, reference.measured, method, reference.warnings, reference.header
    )
    reference.check(volume.header, what)
    labels: Labels = reference.work.nearest(
        volume.header, volume.data.T, what, reference.notes, outside="are background"
    )
    return Prediction(labels.T, mapped=mapped, names=names)


def read_scores(
    method: str, files: CaseFiles, reference: Reference, label_map: Path | None
) -> Prediction | None:
    """Read the logits or probabilities that a method has beside its label map; None without any."""
    if files.problem and not files.missing:
        raise InputError(files.problem)
    if not files.network or files.structures:
        return None
    reading = reference.measured.readings[method]
    if reading.mapping:
        raise InputError(
            f"{files.network[0]}: --map gives the label map new labels, not the channels of "
            "probabilities"
        )
    return _read_channels(files.network, reference, method, label_map)


def _read_channels(
    paths: tuple[Path, ...], reference: Reference, method: str, label_map: Path | None = None
) -> Prediction:
    """Read logits or probabilities, one file or one per label, on the grid of the reference.

    Logits on another grid are interpolated. An array is compared with the label map of its method.
    """
    reading = reference.measured.readings[method]
    grid = reference.header
    headers = []
    compared = None
    for path in paths:
        stored_header, compared = read_network_file(path, grid, label_map=label_map)
        headers.append(stored_header)
        reference.warnings.extend(note for note in stored_header.notes if note.kind in OF_FRAME)
    header = io.logits_header(headers, fewest=1, grid=grid)
    regions = reading.regions
    is_alone = header.num_channels == 1 and not regions.declares(1)
    if is_alone or reading.add_background:
        header = header._replace(num_labels=header.num_labels + 1, lacks_background=True)
    file = header.files[0]
    reference.check(file, "logits")
    regions.require_number(header)
    stored, notes = read_all_channels(header, reading)
    reference.notes.extend(notes)
    scheme = regions.scheme_of(stored, header)
    check = FrameCheck(compared, file, grid)
    reference.warnings.extend(check.look(stored, are_regions=scheme is not None))
    kind, note = kind_of_channels(stored, header, regions, scheme, reading.type_of_scores)
    if scheme is None and kind == "probabilities":
        clip_overshoot(stored)

    unseen = None
    if not header.is_on_grid:
        stored, unseen = reference.work.interpolated_scores(
            file,
            take_logits(stored, kind, scheme),
            reference.notes,
            outside="are background",
            are_regions=scheme is not None,
        )
        kind = "logits"
    what = str(header.path) if scheme is None else str(note)
    labels, unseen = _decode(stored, scheme, kind, unseen)
    if unseen is not None:
        check_share(int(np.count_nonzero(unseen)), unseen.size, what)
        write_background(stored, unseen, are_regions=scheme is not None)
        for remark in notes_on_padding(unseen, unseen, are_regions=scheme is not None):
            if remark.kind is NoteKind.HOLES:
                reference.warnings.append(remark.about(header.path.name))

    shape = reference.header.grid_shape[::-1]
    probabilities = reverse_grid(stored.reshape(len(stored), *shape))
    labels = labels.reshape(shape).T
    if scheme is None:
        return _of_labels(labels, probabilities, note, file, method, reference)
    return Prediction(labels, probabilities, (note,), range(scheme.num_labels), scheme.labels)


def _of_labels(
    numbers: Labels,
    probabilities: Float32,
    note: Note,
    file: VolumeHeader,
    method: str,
    reference: Reference,
) -> Prediction:
    """Return a prediction by the number of the channel at each voxel, as its label.

    Labels with names have the numbers of the run.
    """
    measured = reference.measured
    num_labels = len(probabilities)
    declared = measured.readings[method].regions.labels_of_channels(num_labels)
    labels = declared or range(num_labels)
    label_map, moved = measured.names.renumber(
        file.path,
        measured.names_in(file, method),
        renumber(numbers, labels),
        reference.warnings,
        "",
    )
    new_labels = [moved.get(label, label) for label in labels]
    names = names_of(map_segments(file.segments, moved))
    return Prediction(label_map, probabilities, (note,), new_labels, names=names)


def _decode(
    stored: Float32, scheme: RegionScheme | None, kind: str, unseen: Bool | None
) -> tuple[Array, Bool | None]:
    """Return the label map of (channels, [z,] y, x) scores, and where they say nothing.

    Logits, or log-odds of regions, become probabilities in place. `unseen` is known of interpolated
    scores; else the shapes of ties tell it, as in `infer`.
    """
    if scheme is None:
        labels = argmax_labels(stored)
        ties = find_ties(stored)
        if unseen is None and ties is not None:
            unseen = find_padding(stored, is_probability=kind == "probabilities")
        if kind == "probabilities" and ties is not None:
            stored[:, ties] = 1.0 / len(stored)  # Ties may sum to 0, as undecided votes do not.

    if kind == "logits":
        flat = stored.reshape(len(stored), -1)
        for start in range(0, flat.shape[1], BLOCK_VOXELS):
            block = flat[:, start : start + BLOCK_VOXELS]
            block[:] = probabilities_of(block, scheme)
    if scheme is not None:
        log_odds = stored - np.float32(0.5)  # of their sign, and 0 in padding
        if unseen is None:
            unseen = find_padding(log_odds, are_regions=True)
        labels = scheme.decode(log_odds)
        del log_odds
    return labels, unseen
