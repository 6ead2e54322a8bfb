"""Read the label maps and probabilities of a case on the grid of its reference, or interpolated onto it, one method at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfrefine import io
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.arrays.probabilities import BLOCK_VOXELS, SUM_TOLERANCE, check_share, find_padding, identify, softmax, take_logarithms
from crfrefine.arrays.region_scheme import sigmoid, take_log_odds
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.text import see
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.evaluate.regions import RegionPlan
from crfrefine.evaluate.structures import read_structures
from crfrefine.io.volume import Volume, VolumeHeader
from crfrefine.runs.cases.other_grid import WorkGrid
from crfrefine.runs.cases.reading_options import NO_REGIONS, RegionReading

if TYPE_CHECKING:
    from crfrefine.arrays.region_scheme import RegionScheme
    from crfrefine.base.array_types import Array, Bool, Float32, Labels
    from crfrefine.evaluate.pairing import CasePair, MethodFiles


@dataclass(frozen=True)
class Settings:
    """The settings that the values of a case depend on, besides its files."""

    plan: RegionPlan  # Regions, and the label to ignore.
    tolerance_mm: float | str  # Tolerance of the surface Dice, as of the options.
    resample: bool = False  # True if predictions on another grid are interpolated onto that of the reference.
    channels: Mapping[str, RegionReading] = field(default_factory=dict)  # By method, which channels of its files are regions.


@dataclass(frozen=True)
class SoftLabels:
    """The contents of a file of logits or probabilities."""

    label_map: Labels  # (*grid) the most probable label; of regions as nnU-Net combines them.
    probabilities: Float32  # (L, *grid) float32; of regions: (R, *grid).
    note: str  # Says whether they were taken as logits or as probabilities, and why.
    regions: RegionScheme | None = None  # The regions of the channels; None means that the channels are labels.


@dataclass(frozen=True)
class Reference:
    """The label map that the methods of a case are measured against; files on another grid are interpolated onto its own on request."""

    volume: Volume  # As read.
    header: VolumeHeader  # The header of the volume.
    settings: Settings  # The settings of the run.
    structures: Mapping[str, int]  # As of `CasePair`.
    ignored: Bool | None = None  # (*grid) True where voxels are ignored; None means no voxel.
    notes: list[str] = field(default_factory=list)  # Gets a sentence about each file that was interpolated.

    @property
    def work(self) -> WorkGrid:
        """The same grid, to interpolate onto."""
        return WorkGrid(self.header, "reference")

    def check(self, other: VolumeHeader, what: str) -> None:
        """Raise an error if a file is not on the grid of the reference."""
        if other.turned is not None:
            self.notes.append(f"{other.path.name}: {other.turning}")
        if self.header.on_same_grid(other):
            return
        if self.settings.resample:
            self.work.require_overlap(other, what)
            return
        hint = f"Export it on the grid of the image, or resample it with nearest neighbors ({see('docs/reference/formats.md#grids')})."
        raise GridMismatchError(
            f"{other.path}: not on the grid of the reference\n{self.header.difference_from(other)}\n  {self.work.advice(other, hint)}"
        )


def read_reference(pair: CasePair, settings: Settings, warnings: list[str]) -> Reference:
    """Read the reference of a case: a label map, or structures, with sentences about them in `warnings`."""
    path, ignore_label = pair.reference, settings.plan.ignore_label
    volume = read_structures(path, pair.structures, warnings) if pair.structures else io.read_labels(path)
    assert volume.header is not None
    ignored = volume.data == ignore_label if ignore_label is not None else None
    if ignored is not None and ignored.all():
        raise InputError(f"{path}: every voxel has the label {ignore_label}, to be ignored")
    return Reference(volume, volume.header, settings, pair.structures, ignored if ignored is not None and ignored.any() else None)


def read_masks(files: MethodFiles, reference: Reference, regions: RegionReading, warnings: list[str]) -> tuple[Labels, SoftLabels | None]:
    """Read the label map of a method, (*grid), with its probabilities if the file holds them."""
    if files.problem:
        raise InputError(files.problem)
    path, grid = files.label_map, reference.header
    if path is not None and reference.structures:
        return _onto(reference, read_structures(path, reference.structures, warnings, grid=grid), "structures"), None
    if path is not None:
        header = io.read_header(path)
        # Logits and probabilities have several values per voxel, declare such values, or are the channel of a region.
        if header.num_channels == 1 and header.kind is None and not regions.is_channel(header):
            return _onto(reference, io.read_labels(path, grid=grid), "label map"), None
    soft = read_probabilities(files.probabilities if path is None else (path,), reference, regions)
    return soft.label_map, soft


def _onto(reference: Reference, volume: Volume, what: str) -> Labels:
    """Return labels on the grid of the reference, (*grid)."""
    assert volume.header is not None
    reference.check(volume.header, what)
    labels: Labels = reference.work.nearest(volume.header, volume.data.T, what, reference.notes, outside="are background")
    return labels.T


def read_probabilities(paths: tuple[Path, ...], reference: Reference, regions: RegionReading = NO_REGIONS) -> SoftLabels:
    """Read logits or probabilities, one file or one per label, on the grid of the reference; on another, logits are interpolated."""
    grid = reference.header
    header = io.read_logits_header(paths, fewest=regions.fewest_channels, grid=grid)
    file, name = header.files[0], header.path
    reference.check(file, "logits")
    read = io.read_logits(paths, fewest=regions.fewest_channels, grid=grid)
    stored = reverse_grid(read.values)  # contiguous
    scheme = regions.scheme_of(stored, name)
    decide, convert = (identify, take_logarithms) if scheme is None else (regions.identify, take_log_odds)
    kind, note = decide(stored, "auto", read.kind, name)
    note = "; ".join([note, *(f"{file.path.name}: {file.misnamed}" for file in header.files if file.misnamed is not None)])
    is_elsewhere = not grid.on_same_grid(file)
    if is_elsewhere:
        if kind == "probabilities":
            convert(stored)
            kind = "logits"
        del read
        of_labels = scheme is None
        stored = reference.work.interpolated(file, stored, "logits", reference.notes, outside="are background", are_of_labels=of_labels)
    labels = _decode(stored, kind, str(name), is_elsewhere) if scheme is None else _decode_regions(stored, scheme, kind, note)
    shape = grid.grid_shape[::-1]
    probabilities = reverse_grid(stored.reshape(len(stored), *shape))
    return SoftLabels(labels.reshape(shape).T, probabilities, note, scheme)


def _decode(stored: Float32, kind: str, name: str, is_elsewhere: bool) -> Array:
    """Return the label map of (L, [z,] y, x) logits or probabilities, which become probabilities in place: background in padding."""
    labels, padding = argmax_labels(stored), find_padding(stored)
    if padding is not None:
        if kind == "probabilities":  # Equal probabilities may be a distribution.
            padding &= abs(stored[0] * len(stored) - 1) > SUM_TOLERANCE
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
    """Read an image on the grid of the reference, (C, *grid): one channel, or those of a 4-D file."""
    header = io.placed_on(io.read_header(path, io.VOLUME_SUFFIXES), reference.header)
    reference.check(header, "image")
    values = io.allocate(header)
    io.read_into(header, values)
    image = reference.work.interpolated(header, values, "image", reference.notes, outside="are 0")
    return reverse_grid(image)
