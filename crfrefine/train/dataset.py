"""The labeled cases of a run: found, and compared with each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from crfrefine.arrays.label_maps import foreground_labels, map_labels
from crfrefine.arrays.network import with_numbers_of_channels
from crfrefine.arrays.region_scheme import RegionScheme
from crfrefine.base.label_options import REFERENCE, mapping_of
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import listed, see
from crfrefine.cases.case import Case, load_case
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.case_headers import CaseHeaders, read_case_headers
from crfrefine.cases.dataset_description import DatasetDescription, read_descriptions
from crfrefine.cases.discovery import Sources
from crfrefine.cases.finding import find_cases
from crfrefine.cases.incomplete import Incomplete, note_on_left_out, require_complete
from crfrefine.cases.label_names import without_mapped
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.reading_options import (
    ReadingOptions,
    declared_labels,
    find_modality_names,
    find_regions,
)
from crfrefine.cases.roles import require_modalities
from crfrefine.errors import InputError
from crfrefine.io.paths import add_volumes
from crfrefine.parameters.model import CrfParameters
from crfrefine.train.label_values import (
    find_labels,
    names_of_run,
    notes_on_names,
    require_all,
    require_one_numbering,
)
from crfrefine.train.options import TrainingOptions

# Cases of more voxels are read and measured one at a time: several of them in memory would be too
# much.
LARGE_CASE_VOXELS = 4_000_000


class LabeledCases:
    """The complete cases of a run, all with the same labels, modalities and axes."""

    def __init__(self, options: TrainingOptions, base: CrfParameters) -> None:
        """Find the cases of a run that starts from a model.

        Raise InputError for fewer than two, unusable files, unlike sizes, or, with `strict`,
        incomplete cases.
        """
        cases, self.left_out = _discover(options)  # of those that lack a file, sorted by name
        self.found = cases.found  # how many cases a pattern of images has; "" for folders
        self.files = tuple(case for case in cases if not case.missing)  # sorted by name
        places = [options.nnunet or options.images, options.images]
        description = next(read_descriptions(places), DatasetDescription(options.images))
        descriptions = list(read_descriptions([options.logits, options.images]))
        labels_folder = [] if options.labels is None else [options.labels]
        beside_references = next(read_descriptions(labels_folder, []), DatasetDescription(Path()))
        reading = ReadingOptions(
            mask_mode=base.intensity.mask if options.masks is None else "none",
            regions=find_regions(None, descriptions, options.channel_labels),
            reference_names=without_mapped(
                beside_references.label_names, mapping_of(options.mapped, REFERENCE)
            ),
        ).with_inputs_as(options)

        modality_names = find_modality_names(self.files, descriptions)
        require_modalities(self.files, modality_names, base.modalities)
        headers, (num_channels, num_modalities, num_axes) = _read_headers(
            self.files, reading, options.images
        )
        # in order; empty if unknown
        self.modality_names = modality_names if len(modality_names) == num_modalities else ()
        self.notes = [*cases.notes]  # ignored files, and why
        reading = replace(reading, names=names_of_run(descriptions, headers, reading))
        require_one_numbering(headers, reading)
        self.notes += notes_on_names(headers, reading)
        # The regions of the channels; None means that the channels are labels.
        self.regions: RegionScheme | None = None
        is_map = num_channels == 0
        if is_map:
            declared = declared_labels(self.files, descriptions, base)
            reading = replace(reading, declared=declared)
        else:
            self.regions = _regions_of_channels(headers, reading, num_channels, self.notes)
        labels, notes_on_labels = find_labels(self.files, options.images, reading, is_map=is_map)
        self.notes += notes_on_labels
        if is_map:
            reading = replace(reading, declared=labels)
            num_channels = labels.num_labels
        self.reading = reading  # Labels are declared only for label maps.
        # The numbers of channels of the logits (one per label or region), modalities and axes.
        self.sizes = (num_channels, num_modalities, num_axes)
        if self.left_out:
            self.notes.insert(0, note_on_left_out(self.left_out, len(cases)))
        self.notes += _notes_on_grids(headers)

        self._names = {0: "background", **description.label_names}
        self.ignore_label = description.ignore_label  # marks voxels without a reference
        largest = max(math.prod(header.image.grid_shape) for header in headers)
        self.are_large = largest > LARGE_CASE_VOXELS  # so that they are read one at a time

    @property
    def case_ids(self) -> tuple[str, ...]:
        """Names of the cases."""
        return tuple(files.case_id for files in self.files)

    @property
    def channel_labels(self) -> tuple[int, ...] | None:
        """The label of each channel, background first; None means their numbers."""
        if self.regions is not None or self.reading.declared is not None:
            return None
        return self.reading.regions.labels_of_channels(self.sizes[0])

    @property
    def label_names(self) -> tuple[str, ...]:
        """A name per label, background first."""
        labels = self.channel_labels or range(self.num_labels)
        return tuple(self._names.get(label) or f"label {label}" for label in labels)

    @property
    def num_labels(self) -> int:
        """L of a label map, background included."""
        if self.regions is not None:
            return self.regions.num_labels
        return self.sizes[0]


def _discover(options: TrainingOptions) -> tuple[CaseList, Incomplete]:
    """Return the cases in the folders, and what incomplete ones lack.

    Raise InputError for fewer than two complete ones.
    """
    sources = Sources(
        [options.images],
        [options.logits],
        options.masks,
        options.labels,
        nnunet=options.nnunet,
        input_type=options.input_type,
        add_background=options.add_background,
        needs_all=True,
    )
    cases = find_cases(sources)
    paths = [options.images, options.labels, options.logits, options.masks]
    for case in cases:
        paths += case.paths
    add_volumes(*paths)

    left_out = {case.case_id: case.missing for case in cases if case.missing}
    names = f"CASE_0000.nii.gz, CASE.nii.gz and CASE.npz ({see('docs/reference/formats.md')})"
    require_complete(
        left_out,
        len(cases),
        "at least two cases with image, labels and logits: training holds cases out to measure on",
        cases.advice or (f"Names must agree, such as {names}.",),
        at_least=2,
        is_strict=options.strict,
    )
    return cases, left_out


def _read_headers(
    files: Sequence[CaseFiles], reading: ReadingOptions, folder: Path
) -> tuple[list[CaseHeaders], tuple[int, int, int]]:
    """Return the headers of cases, and their channels (0 for a label map), modalities and axes.

    Raise InputError if a case has others than the first one.
    """

    def read_headers(case: CaseFiles, _: int) -> CaseHeaders:
        if case.structures:
            advice = "merge them into a label map with the numbers of the reference"
            raise InputError(f"{case.network[0].parent} has one file per structure; {advice}")
        return read_case_headers(case, reading)

    headers = require_all(read_headers, files, folder)
    all_sizes = []
    for case in headers:
        num_channels = 0 if case.network.is_label_map else case.network.num_labels
        all_sizes.append((num_channels, case.num_modalities, len(case.image.grid_shape)))
    first = all_sizes[0]
    for case, sizes in zip(headers, all_sizes, strict=True):
        if sizes != first:
            raise InputError(
                f"case {case.files.case_id!r}: (channels, modalities, axes), with 0 channels for a "
                f"label map, are {sizes}, but {first} in case {headers[0].files.case_id!r}; "
                "all must be alike"
            )
    return headers, first


def _regions_of_channels(
    headers: Sequence[CaseHeaders], reading: ReadingOptions, num_channels: int, notes: list[Note]
) -> RegionScheme | None:
    """Return the regions of the channels, with a note; None means that the channels are labels."""
    declared = reading.regions
    lacks_background = any(header.network.lacks_background for header in headers)
    if lacks_background or not declared.declares(num_channels):
        return None
    regions = declared.scheme
    if num_channels == declared.num_labels:
        # The number of channels does not tell whether they are regions; the values of a case do.
        regions = load_case(headers[0].files, reading).network.regions
    if regions is not None:
        notes.append(
            NoteKind.CHANNELS_OF_REGIONS(source=declared.source, regions=regions.describe())
        )
    return regions


def _notes_on_grids(headers: Sequence[CaseHeaders]) -> list[Note]:
    """Return notes on cases with files of other voxel axes than the image, or on a part of it."""
    turned = []
    filled = []
    unknown = []
    for header in headers:
        case_id = header.files.case_id
        grid = WorkGrid(header.image)
        if any(companion.turning for companion in header.companions):
            turned.append(case_id)
        parts = [grid.part(companion, "labels") for companion in header.companions]
        if any(part is not None and part.num_inside < part.num_voxels for part in parts):
            filled.append(case_id)
        if any(note.kind is NoteKind.UNKNOWN_FRAME for note in header.notes):
            unknown.append(case_id)
    notes = [
        NoteKind.TURNED_CASES(cases=turned),
        NoteKind.FILLED_CASES(cases=filled),
        NoteKind.FRAME_CASES(cases=unknown),
    ]
    return [note for note in notes if note.values["cases"]]


def read_labeled(files: CaseFiles, cases: LabeledCases, *, threads: int) -> Case:
    """Read one case with its reference, in which the label L marks voxels to ignore.

    Labels are the numbers of channels, whatever they mean in the files. Raise InputError if
    they do not fit each other.
    """
    case = load_case(files, cases.reading, threads=threads, with_labels=True)
    assert case.labels is not None
    if case.network.regions != cases.regions:
        kind = "labels" if case.network.regions is None else "regions"
        raise InputError(
            f"its channels are {kind}, unlike those of other cases\n  {files.network[0]}"
        )
    is_ignored = case.labels == cases.ignore_label
    if is_ignored.all():
        raise InputError(
            f"{files.labels}: every voxel has the label {cases.ignore_label}, to be ignored"
        )
    num_labels = case.network.num_labels
    paths = f"  {files.labels}\n  {files.network[0]}"
    channel_labels = case.network.channel_labels
    if channel_labels is not None:
        numbers = {label: number for number, label in enumerate(channel_labels)}
        if cases.ignore_label is not None:
            numbers[cases.ignore_label] = len(channel_labels)
        unknown = sorted({0, *foreground_labels(case.labels)} - numbers.keys())
        if unknown:
            raise InputError(
                f"the reference has the labels {listed(unknown)}, expected those of the channels, "
                f"{listed(channel_labels)} by {cases.reading.regions.source}\n{paths}\n"
                f"  Give them one of these labels with --map {REFERENCE}:{unknown[0]}=LABEL."
            )
        labels, _ = map_labels(case.labels, numbers)
        return replace(case, labels=labels, network=with_numbers_of_channels(case.network))

    largest = int(case.labels.max(initial=0, where=~is_ignored))
    if largest >= num_labels:
        if case.network.regions is not None:
            source = case.network.regions.describe()
        elif cases.reading.declared is not None:
            source = cases.reading.declared.source
        else:
            source = "the channels of the logits"
        raise InputError(
            f"the reference has a label {largest}, but there are {num_labels} labels "
            f"(0 to {num_labels - 1}) according to {source}\n{paths}\n"
            f"  Give it one of these labels with --map {REFERENCE}:{largest}=LABEL."
        )
    if not is_ignored.any():
        return case
    labels = np.where(is_ignored, num_labels, case.labels).astype(np.min_scalar_type(num_labels))
    return replace(case, labels=labels)
