"""The arrays of a case: its reference, and label maps, probabilities and images on the same grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crfrefine import io
from crfrefine.arrays.label_maps import argmax_labels, foreground_labels
from crfrefine.arrays.nan_voxels import leave_out_nan
from crfrefine.arrays.probabilities import (
    BLOCK_VOXELS,
    SUM_TOLERANCE,
    check_share,
    clip_overshoot,
    find_padding,
    find_ties,
    identify,
    softmax,
    take_logarithms,
)
from crfrefine.arrays.region_scheme import RegionScheme, sigmoid, take_log_odds
from crfrefine.base.array_types import Array, Bool, Float32, Labels
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.text import see
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.evaluate.pairing import CasePair, MethodFiles
from crfrefine.evaluate.settings import Settings
from crfrefine.evaluate.structures import names_of
from crfrefine.io.reading import (
    LABEL_TOLERANCE,
    LogitsHeader,
    require_scalar,
    with_channel_axis,
)
from crfrefine.io.volume import Volume, VolumeHeader
from crfrefine.runs.cases.discovery import list_files
from crfrefine.runs.cases.foreground import holds_one_probability, read_all_channels
from crfrefine.runs.cases.label_input import merge_structures
from crfrefine.runs.cases.other_grid import WorkGrid
from crfrefine.runs.cases.reading_options import NO_REGIONS, RegionReading


class SoftLabels(NamedTuple):
    """The contents of a file of logits or probabilities."""

    label_map: Labels  # (*grid) the most probable label; of regions as nnU-Net combines them.
    probabilities: Float32  # (L, *grid) float32; of regions: (R, *grid).
    note: str  # Says whether they were taken as logits or as probabilities, and why.
    # The regions of the channels; None means that the channels are labels.
    regions: RegionScheme | None = None


@dataclass(frozen=True)
class Reference:
    """The label map that the methods of a case are measured against.

    Files on another grid are interpolated onto its own on request.
    """

    volume: Volume  # As read.
    header: VolumeHeader  # The header of the volume.
    settings: Settings  # The settings of the run.
    ignored: Bool | None = None  # (*grid) True where voxels are ignored; None means no voxel.
    # Gets a sentence about each file that was interpolated.
    notes: list[str] = field(default_factory=list)

    @property
    def work(self) -> WorkGrid:
        """The same grid, to interpolate onto."""
        return WorkGrid(self.header, "reference")

    def check(self, other: VolumeHeader, what: str) -> None:
        """Raise an error if a file is not on the grid of the reference."""
        if other.turning:
            self.notes.append(f"{other.path.name}: {other.turning}")
        if self.header.on_same_grid(other):
            return
        if self.settings.resample:
            self.work.require_overlap(other, what)
            return
        hint = f"Export it on the grid of the image, or resample it with nearest neighbors ({see('docs/reference/formats.md#grids')})."
        advice = self.work.advice(other, what, hint)
        raise GridMismatchError(
            f"{other.path}: not on the grid of the reference\n"
            f"{self.header.difference_from(other)}\n  {advice}"
        )


def read_reference(pair: CasePair, settings: Settings, warnings: list[str]) -> Reference:
    """Read the reference of a case: a label map, or structures, with sentences about them in `warnings`."""
    path = pair.reference
    ignore_label = settings.ignore_label
    if settings.structures:
        volume = read_structures(path, settings.structures, warnings)
    else:
        volume = io.read_labels(path)
    assert volume.header is not None
    ignored = volume.data == ignore_label if ignore_label is not None else None
    if ignored is not None and ignored.all():
        raise InputError(f"{path}: every voxel has the label {ignore_label}, to be ignored")
    return Reference(
        volume, volume.header, settings, ignored if ignored is not None and ignored.any() else None
    )


def read_structures(
    path: Path, numbers: Mapping[str, int], warnings: list[str], *, grid: VolumeHeader | None = None
) -> Volume:
    """Read a folder of structures, or a label map whose labels have names in a `dataset.json`, with the numbers of a run."""
    # `warnings` gets a sentence about covered structures; axes are turned to those of `grid`.
    if not path.is_dir():
        return _renumbered(io.read_labels(path, grid=grid), path, numbers)
    headers = [
        io.read_header(file, io.VOLUME_SUFFIXES) for file in list_files(path, io.VOLUME_SUFFIXES)
    ]
    headers = [io.placed_on(header, grid or headers[0]) for header in headers]
    for header in headers:
        require_scalar(header, "a binary file of one structure")
    merged = merge_structures(headers, numbers)
    if merged.lost:
        warnings.append(
            f"{merged.lost}; to measure a union of others, leave its file out and give its parts with --regions"
        )
    return Volume(merged.labels.T, *headers[0].geometry(), headers[0].path, headers[0])


def _renumbered(volume: Volume, path: Path, numbers: Mapping[str, int]) -> Volume:
    """Return a label map whose labels have the numbers of the run."""
    known = {0: 0} | {own: numbers[name] for name, own in names_of(path).items()}
    nameless = [label for label in foreground_labels(volume.data) if label not in known]
    if nameless:
        raise InputError(
            f"{path}: label {nameless[0]} has no name in dataset.json; labels are compared with structures by their names"
        )
    table = np.zeros(max(known) + 1, np.min_scalar_type(max(numbers.values())))
    table[list(known)] = list(known.values())
    return replace(volume, data=table[volume.data])


def read_masks(
    files: MethodFiles, reference: Reference, regions: RegionReading, warnings: list[str]
) -> tuple[Labels, SoftLabels | None]:
    """Read the label map of a method, (*grid), with its probabilities if the file holds them."""
    if files.problem:
        raise InputError(files.problem)
    path = files.label_map
    grid = reference.header
    structures = reference.settings.structures
    if path is not None and structures:
        return _onto(
            reference, read_structures(path, structures, warnings, grid=grid), "structures"
        ), None
    if path is not None:
        header = with_channel_axis(io.read_header(path), grid)
        # Logits and probabilities have several values per voxel, declare such values, or are the
        # channel of a region, or of label 1.
        may_be_map = header.num_channels == 1 and header.kind is None
        if may_be_map and not (
            regions.is_channel(header) or holds_one_probability(header, LABEL_TOLERANCE)
        ):
            return _onto(reference, io.read_labels(path, grid=grid), "label map"), None
    soft = read_probabilities(files.probabilities if path is None else (path,), reference, regions)
    return soft.label_map, soft


def _onto(reference: Reference, volume: Volume, what: str) -> Labels:
    """Return labels on the grid of the reference, (*grid)."""
    assert volume.header is not None
    reference.check(volume.header, what)
    labels: Labels = reference.work.nearest(
        volume.header, volume.data.T, what, reference.notes, outside="are background"
    )
    return labels.T


def read_probabilities(
    paths: tuple[Path, ...], reference: Reference, regions: RegionReading = NO_REGIONS
) -> SoftLabels:
    """Read logits or probabilities, one file or one per label, on the grid of the reference.

    On another, logits are interpolated.
    """
    grid = reference.header
    header = _scores_header(paths, reference, regions)
    file = header.files[0]
    name = header.path
    reference.check(file, "logits")
    stored, notes = read_all_channels(header, "auto")
    if header.lacks_background:
        reference.notes.extend(notes)
        regions.require_number(header.num_channels, name, lacks_background=True)
    scheme = None if header.lacks_background else regions.scheme_of(stored, name)
    decide, convert = (
        (identify, take_logarithms) if scheme is None else (regions.identify, take_log_odds)
    )
    kind, note = decide(stored, "auto", header.kind, name)
    if scheme is None and kind == "probabilities":
        clip_overshoot(stored)
    is_elsewhere = not grid.on_same_grid(file)
    if is_elsewhere:
        if kind == "probabilities":
            convert(stored)
            kind = "logits"
        of_labels = scheme is None
        stored = reference.work.interpolated(
            file,
            stored,
            "logits",
            reference.notes,
            outside="are background",
            are_of_labels=of_labels,
        )
    if scheme is None:
        labels = _decode(stored, kind, str(name), is_elsewhere)
    else:
        labels = _decode_regions(stored, scheme, kind, note)
    shape = grid.grid_shape[::-1]
    probabilities = reverse_grid(stored.reshape(len(stored), *shape))
    return SoftLabels(labels.reshape(shape).T, probabilities, note, scheme)


def _scores_header(
    paths: tuple[Path, ...], reference: Reference, regions: RegionReading
) -> LogitsHeader:
    """Return the headers of logits or probabilities, with or without the background."""
    grid = reference.header
    headers = [with_channel_axis(io.read_header(path), grid) for path in paths]
    header = io.logits_header(headers, fewest=1, grid=grid)
    is_alone = header.num_channels == 1 and not regions.declares(1)
    if not is_alone and not reference.settings.add_background:
        return header
    return replace(header, num_labels=header.num_labels + 1, lacks_background=True)


def _decode(stored: Float32, kind: str, name: str, is_elsewhere: bool) -> Array:
    """Return the label map of (L, [z,] y, x) logits or probabilities, which become probabilities in place: background in padding."""
    labels = argmax_labels(stored)
    if kind == "probabilities":
        padding = find_ties(stored)
        if padding is not None:  # Equal probabilities may be a distribution.
            padding &= abs(stored[0] * len(stored) - 1) > SUM_TOLERANCE
    else:
        padding = find_padding(stored)
    if padding is not None:
        check_share(int(np.count_nonzero(padding)), padding.size, name)
    if kind == "logits":
        flat = stored.reshape(len(stored), -1)
        for start in range(0, flat.shape[1], BLOCK_VOXELS):
            flat[:, start : start + BLOCK_VOXELS] = softmax(flat[:, start : start + BLOCK_VOXELS])
    if padding is not None and (kind == "probabilities" or is_elsewhere):
        for label, channel in enumerate(stored):
            channel[padding] = float(label == 0)
    return labels


def _decode_regions(stored: Float32, scheme: RegionScheme, kind: str, note: str) -> Array:
    """Return the label map of (R, [z,] y, x) log-odds or probabilities of regions, which become sigmoid probabilities in place."""
    if kind == "logits":
        for channel in stored:
            channel[:] = sigmoid(channel)
    undecided = find_padding(stored - np.float32(0.5), are_regions=True)
    if undecided is not None:
        check_share(int(np.count_nonzero(undecided)), undecided.size, note)
        stored[:, undecided] = 0.0
    return scheme.decode(stored - np.float32(0.5))


def read_image(path: Path, reference: Reference) -> Float32:
    """Read an image on the grid of the reference, (C, *grid): one channel, or those of a 4-D file.

    Voxels that are NaN get the lowest intensity, as background has it.
    """
    header = io.placed_on(io.read_header(path, io.VOLUME_SUFFIXES), reference.header)
    reference.check(header, "image")
    nan_files: list[Path] = []
    values = io.read_channels(header, nan_files=nan_files)
    if nan_files:
        leave_out_nan(values, None, path)
    image = reference.work.interpolated(header, values, "image", reference.notes, outside="are 0")
    return reverse_grid(image)
