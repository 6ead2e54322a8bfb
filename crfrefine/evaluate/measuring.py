"""One case: read its label maps and measure every method.

Runs in a separate process, so inputs and outputs can be pickled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

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
from crfrefine.base.failures import Failure, failing_alone
from crfrefine.base.geometry import reverse_grid
from crfrefine.base.text import see, shorten
from crfrefine.errors import ConfigError, GridMismatchError, InputError
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.evaluate.pairing import CasePair, MethodFiles, names_of
from crfrefine.io.reading import (
    LABEL_TOLERANCE,
    LogitsHeader,
    require_scalar,
    with_channel_axis,
)
from crfrefine.io.volume import Volume, VolumeHeader
from crfrefine.metrics.calibration import measure_calibration
from crfrefine.metrics.overlap import measure_case, one_voxel
from crfrefine.metrics.regions import ALL_LABELS, Region, make_region, parse_region
from crfrefine.metrics.registry import RegionValues
from crfrefine.runs.cases.dataset_description import DatasetDescription, read_descriptions
from crfrefine.runs.cases.discovery import list_files
from crfrefine.runs.cases.foreground import holds_one_probability, read_all_channels
from crfrefine.runs.cases.label_input import merge_structures
from crfrefine.runs.cases.other_grid import WorkGrid
from crfrefine.runs.cases.reading_options import NO_REGIONS, RegionReading
from crfrefine.runs.records import Record


@dataclass(frozen=True)
class Settings:
    """The settings that the values of a case depend on, besides its files.

    The regions are as known before any label map is read.
    """

    # Foreground labels in `dataset.json`; those found in label maps are added.
    labels: tuple[int, ...] = ()
    # Sets of labels by their name.
    named: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    # Names of the regions whose mean Dice decides the verdict; empty: each label.
    judged: tuple[str, ...] = ()
    # Displayed name of a region, by its name.
    titles: Mapping[str, str] = field(default_factory=dict)
    ignore_label: int | None = None  # Voxels where the reference has this label are ignored.
    tolerance_mm: float | str = 1.0  # Tolerance of the surface Dice, as of the options.
    # True if predictions on another grid are interpolated onto that of the reference.
    resample: bool = False
    # By method, which channels of its files are regions.
    channels: Mapping[str, RegionReading] = field(default_factory=dict)
    structures: Mapping[str, int] = field(default_factory=dict)  # As of the `Pairing`.
    add_background: bool = False  # True if files of several channels lack the background.

    def all_regions(self, labels: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Return each label as a region, those of `labels` and the planned ones, then the named regions."""
        numbers = sorted({*labels, *self.labels} - {0, self.ignore_label})
        return {**{str(label): (label,) for label in numbers}, **self.named}

    def with_structures(self, structures: Mapping[str, int]) -> Settings:
        """Return the settings for label maps of structures (number by name), which do not have the labels of a `dataset.json`."""
        if not structures:
            return self
        named = {name: self.named[name] for name in self.judged}
        titles = {
            str(number): f"{number} {shorten(' '.join(name.split()))}"
            for name, number in structures.items()
        }
        return replace(
            self, labels=(), named=named, titles=titles, ignore_label=None, structures=structures
        )


def make_settings(options: EvaluationOptions, notes: list[str]) -> Settings:
    """Return settings with the regions of the options and of a `dataset.json` beside the reference or above; may raise ConfigError."""
    description = next(read_descriptions([options.labels]), DatasetDescription(options.labels))
    ignored = description.ignore_label if options.ignore_label is None else options.ignore_label
    titles = {str(label): f"{label} {name}" for label, name in description.label_names.items()}
    foreground = {
        name: members
        for name, members in description.labels.items()
        if name != "ignore" and 0 not in members
    }
    described: list[Region] = []
    try:
        if description.has_regions:
            described = [_as_label(make_region(*entry), titles) for entry in foreground.items()]
        else:
            described = []
    except ConfigError as error:  # Its labels, and the one to ignore, are still valid.
        notes.append(f"{description.path}: {error}; continuing without its regions")
    named: dict[str, tuple[int, ...]] = {}
    for region in (_as_label(parse_region(text), titles) for text in options.regions):
        if named.setdefault(region.name, region.labels) != region.labels:
            raise ConfigError(f"--regions {region.name}: appears twice, with different labels")
    judged = tuple(named) or tuple(dict.fromkeys(region.name for region in described))
    named |= {region.name: region.labels for region in described if region.name not in named}
    for name, members in named.items():
        if name == ALL_LABELS or (name.isdigit() and name != "+".join(map(str, members))):
            raise ConfigError(
                f"region {name!r}: is the name of a label, or of all labels together; choose another one"
            )
        if ignored in members:
            raise ConfigError(
                f"region {name!r}: label {ignored} marks voxels that are ignored, it cannot belong to a region"
            )
    # A region that equals a label, such as "2=2", would appear twice.
    plain = {members[0] for name, members in named.items() if name == str(members[0])}
    named = {name: members for name, members in named.items() if name != str(members[0])}
    numbers = plain.union(*description.labels.values()) - {0, ignored}
    return Settings(
        tuple(sorted(numbers)),
        named,
        judged,
        titles,
        ignored,
        options.tolerance_mm,
        options.resample,
        add_background=options.add_background,
    )


def _as_label(region: Region, titles: Mapping[str, str]) -> Region:
    """Return the label that has the name of the region, since it has its own row.

    Else the region.
    """
    number = str(region.labels[0])
    is_label = len(region.labels) == 1 and titles.get(number) == f"{number} {shorten(region.name)}"
    if is_label:
        return Region(number, region.labels)
    return region


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


@dataclass
class CaseResult(Record):
    """The measurements of a case: `status` is "measured" or "failed"."""

    status: str = "measured"
    # By method; methods that could not be measured are missing.
    values: dict[str, RegionValues] = field(default_factory=dict)
    # Optional results that are missing and structures that others cover, each after the name of the
    # method, or "reference".
    warnings: list[str] = field(default_factory=list)


# The finest atlases have half as many; a gray image taken for a label map has thousands.
MAX_MEASURED = 2000


def measure_pair(settings: Settings, pair: CasePair) -> CaseResult:
    """Measure every method in a case.

    A method that cannot be measured is recorded, and the others continue.
    """
    started = time.perf_counter()
    result = CaseResult(pair.case_id)
    with failing_alone(result.fail, pair.reference):
        if pair.problem:
            raise InputError(pair.problem)
        warnings: list[str] = []
        reference = read_reference(pair, settings, warnings)
        result.warnings += [f"reference: {text}" for text in warnings]
        result.notes += [f"reference: {note}" for note in reference.header.notes]
        for name, files in pair.methods.items():

            def fail(failure: Failure, name: str = name) -> None:
                result.fail(replace(failure, part=name))

            with failing_alone(fail, *files.paths):
                _measure_method(name, files, replace(reference, notes=[]), result, fail)
    result.times["measure"] = time.perf_counter() - started
    return result


def _measure_method(
    name: str,
    files: MethodFiles,
    reference: Reference,
    result: CaseResult,
    fail: Callable[[Failure], None],
) -> None:
    settings = reference.settings
    warnings = list[str]()
    channels = settings.channels.get(name, NO_REGIONS)
    label_map, soft = read_masks(files, reference, channels, warnings)
    result.warnings += [f"{name}: {text}" for text in warnings]
    if reference.ignored is not None:
        label_map = np.where(reference.ignored, 0, label_map)
    wanted = reference.volume.data
    spacing = reference.volume.spacing
    tolerance = settings.tolerance_mm
    labels = sorted({*foreground_labels(label_map), *foreground_labels(wanted)})
    if len(labels) > MAX_MEASURED:
        many = f"the label map and the reference have {len(labels)} different labels"
        raise InputError(f"{many}; expected at most {MAX_MEASURED}: is one of them an image?")
    tolerance_mm = one_voxel(spacing) if isinstance(tolerance, str) else tolerance
    how: dict[str, Any] = {"tolerance_mm": tolerance_mm, "ignore_label": settings.ignore_label}
    values = result.values[name] = measure_case(
        label_map, wanted, settings.all_regions(labels), spacing, **how
    )
    del label_map
    if files.asked_for_probabilities:  # The calibration uses other files.
        soft = None

    def fail_calibration(failure: Failure) -> None:
        if files.asked_for_probabilities or soft is not None or failure.traceback is not None:
            fail(failure)
        else:
            result.warnings.append(f"{name}: no calibration: {failure.message}")

    with failing_alone(fail_calibration, *files.probabilities):
        if files.probabilities_problem:
            raise InputError(files.probabilities_problem)
        if soft is None and files.probabilities:
            soft = read_probabilities(files.probabilities, reference, channels)
        if soft is not None:
            _add_calibration(values, soft, reference)
            result.notes.append(f"{name}: {soft.note}")
    result.notes += [f"{name}: {note}" for note in dict.fromkeys(reference.notes)]


def _add_calibration(values: RegionValues, soft: SoftLabels, reference: Reference) -> None:
    settings = reference.settings
    wanted = reference.volume.data
    scheme = soft.regions
    num_labels = len(soft.probabilities) if scheme is None else scheme.num_labels
    regions = settings.all_regions(
        [*(int(name) for name in values if name.isdigit()), *range(1, num_labels)]
    )
    channels = None if scheme is None else scheme.labels
    measured = measure_calibration(
        soft.probabilities, wanted, regions, channels=channels, ignore_label=settings.ignore_label
    )
    for region, row in measured.items():
        values.setdefault(region, {}).update(row)
