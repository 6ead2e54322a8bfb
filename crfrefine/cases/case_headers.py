"""The headers of a case's files: read and checked against each other before any voxel is read."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from crfrefine import io
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import TIMES, listed, see
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.dataset_description import read_dataset_description
from crfrefine.cases.foreground import lacks_background
from crfrefine.cases.grid_differences import explain_difference
from crfrefine.cases.label_input import label_map_header
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.reading_options import DEFAULT_READING, GIVEN, ReadingOptions
from crfrefine.errors import GridMismatchError, InputError, naming_case
from crfrefine.io.reading import require_scalar, with_channel_axis
from crfrefine.io.volume import VolumeHeader

# Files that may be stored for a part of the image's grid, and are 0 elsewhere.
_FILLED = ("label map", "structure", "mask", "labels", "strokes")
_NEVER_RESAMPLED = {
    "modality": "Resample the modalities to one grid.",
    "strokes": "Draw them on the image; strokes are not resampled.",
}


@dataclass(frozen=True)
class CaseHeaders:
    """The headers of a case's files; all on one grid, unless the options allow to resample."""

    files: CaseFiles  # the paths
    images: tuple[VolumeHeader, ...]  # one per file; several channels only in a single file
    logits: io.LogitsHeader | None  # of all labels; None if no logits were requested
    mask: VolumeHeader | None  # the mask's header, if there is one
    labels: VolumeHeader | None  # the reference's header, if there is one
    strokes: tuple[VolumeHeader, ...]  # the headers of the strokes
    # mm to compute with, one per grid axis: given for the case, or the image's
    spacing: tuple[float, ...]

    @property
    def network(self) -> io.LogitsHeader:
        """The headers of the network's output; InputError if no logits were requested."""
        if self.logits is None:
            raise InputError("no logits")
        return self.logits

    @property
    def num_modalities(self) -> int:
        """M, the number of channels of the images."""
        return sum(header.num_channels for header in self.images)

    @property
    def companions(self) -> tuple[VolumeHeader, ...]:
        """All headers, without those of the images."""
        companions = [] if self.logits is None else [*self.logits.files]
        companions += [header for header in (self.mask, self.labels) if header is not None]
        return (*companions, *self.strokes)

    @property
    def notes(self) -> list[Note]:
        """Facts that the user should know.

        Another spacing than the image's, what the headers note, and turned voxel axes.
        """
        first = self.images[0]
        notes = list[Note]()
        if first.spacing is not None and first.spacing != self.spacing:
            given = _list_mm(self.spacing)
            stored = _list_mm(first.spacing)
            kind = NoteKind.GIVEN_SPACING
            notes.append(Note.of(kind, first.path.name, given=given, stored=stored))
        headers = (*self.images, *self.companions)
        for header in headers:
            for note in header.notes:
                # A note of the first image is not repeated, unless it is on a file's name.
                is_repeated = note in first.notes and note != header.misnamed
                if header is not first and is_repeated:
                    continue
                # The case, named before a note, may have the name of its file.
                if header.path.name != self.files.case_id:
                    note = note.about(header.path.name)
                notes.append(note)

        names_of: dict[Note, list[str]] = {}  # of files with turned axes, by how
        for header in headers:
            if header.turning is not None:
                names_of.setdefault(header.turning.about(""), []).append(header.path.name)
        for turning, names in names_of.items():
            notes.append(turning.about(listed(names, 3)))
        return notes


def _list_mm(spacing: tuple[float, ...]) -> str:
    return TIMES.join(f"{size:g}" for size in spacing)


def read_case_headers(files: CaseFiles, options: ReadingOptions = DEFAULT_READING) -> CaseHeaders:
    """Read the headers of a case's files and check their grids, without reading voxels.

    Raises InputError, UnsupportedFormatError, or GridMismatchError.
    """
    with naming_case(files.case_id):
        if files.lack:
            raise InputError(files.lack, cause="; ".join(files.missing))
        images = _read_images(files, options)
        logits = None
        if files.logits:
            logits = _read_network_header(files, images[0], options)
        mask = None
        if files.mask is not None:
            mask = _read_scalar(files.mask, "mask", images[0], options)
        labels = None
        if files.labels is not None:
            labels = _read_scalar(files.labels, "labels", images[0], options)
        strokes = [_read_scalar(path, "strokes", images[0], options) for path in files.strokes]
        spacing = files.spacing or images[0].geometry()[1]
        return CaseHeaders(files, images, logits, mask, labels, tuple(strokes), spacing)


def _read_images(files: CaseFiles, options: ReadingOptions) -> tuple[VolumeHeader, ...]:
    """Read the headers of the images, one modality per file, or all of them in a single one."""
    first = io.read_header(files.images[0], io.VOLUME_SUFFIXES)
    num_axes = len(first.grid_shape)
    if files.spacing is not None and len(files.spacing) != num_axes:
        raise InputError(
            f"{first.path}: has {num_axes} axes; "
            f"the spacing given for case {files.case_id!r} has {len(files.spacing)}"
        )
    images = [first]
    for path in files.images[1:]:
        images.append(io.placed_on(io.read_header(path, io.VOLUME_SUFFIXES), first))
    for image in images:
        if image.time and image.num_channels > 1:
            description = read_dataset_description(image.path)
            if description is None or len(description.channel_names) != image.num_channels:
                raise InputError(
                    f"{image.path}: by its header, its {image.num_channels} volumes follow each "
                    f"other in time ({image.time}); expected modalities\n"
                    "  Split it, and refine each volume as a case of its own:\n"
                    f"    crfrefine convert {shlex.quote(str(image.path))} FOLDER --split\n"
                    "  If they are modalities, name all of them in channel_names of a dataset.json "
                    "beside it."
                )
        if len(images) > 1 and image.num_channels > 1:
            raise InputError(
                f"{image.path}: expected one modality per file, as there are {len(images)} files; "
                f"this one has {image.num_channels}"
            )
        _require_overlap("modality", first, image, options)
    return tuple(images)


def _read_scalar(
    path: Path, what: str, image: VolumeHeader, options: ReadingOptions
) -> VolumeHeader:
    """Read the header of a file with one value per voxel, with its axes turned to the image's."""
    header = io.placed_on(io.read_header(path, io.VOLUME_SUFFIXES), image)
    require_scalar(header, what)
    _require_overlap(what, image, header, options)
    return header


def _read_network_header(
    files: CaseFiles, image: VolumeHeader, options: ReadingOptions
) -> io.LogitsHeader:
    """Read the headers of a network's output, and check its grid, its channels and its values."""
    network = _recognize(files, image, options)
    what = "logits"
    num_grids = 1  # The files of labels are on one grid.
    if network.is_label_map:
        what = "structure" if files.structures else "label map"
        num_grids = len(network.files)
    for header in network.files[:num_grids]:
        _require_overlap(what, image, header, options)
    # After the grids: a file with its channels first has a wrong number of channels.
    if options.mapping and what != "label map":
        found = "logits or probabilities, whose channels are labels in their order"
        if files.structures:
            found = "one file per structure, numbered by their names"
        raise InputError(
            f"{network.path}: --map gives the values of a label map new labels; found {found}; "
            "leave --map out"
        )
    if not network.is_label_map:
        options.regions.require_number(
            network.num_channels, network.path, lacks_background=network.lacks_background
        )
    return network


def _recognize(files: CaseFiles, image: VolumeHeader, options: ReadingOptions) -> io.LogitsHeader:
    """Return the headers of logits, probabilities, with or without background, or a label map."""
    regions = options.regions
    headers = [io.read_header(path) for path in files.logits]
    first = headers[0]
    if options.input_type != "labels":
        headers = [with_channel_axis(header, image) for header in headers]
    if lacks_background(headers, options):
        if options.add_background and options.input_type in ("labels", "logits"):
            raise InputError(
                f"{first.path}: --add-background: the background is computed from probabilities; "
                f"leave --input-type {options.input_type} out"
            )
        if options.add_background and regions.source == GIVEN:
            raise InputError(
                f"{first.path}: --add-background: regions have no background; leave {GIVEN} or "
                "--add-background out"
            )
        network = io.logits_header(headers, fewest=1, grid=image)
        return replace(network, num_labels=network.num_labels + 1, lacks_background=True)

    # The one channel of a single region is no label map, unless the user declares it.
    has_one_value = headers[0].num_channels == 1 and not regions.declares(1)
    may_be_map = options.input_type == "labels" or (options.input_type == "auto" and has_one_value)
    label_map = None
    if may_be_map and (len(files.logits) == 1 or files.structures):
        label_map = label_map_header([io.placed_on(file, image) for file in headers], options)
    if label_map is None:
        fewest = 1 if regions.declares(1) else 2
        return io.logits_header(headers, fewest=fewest, grid=image)
    if regions.source == GIVEN:
        raise InputError(
            f"{files.logits[0]}: expected channels of the regions of {GIVEN}, found one value "
            f"per voxel; a label map is refined as it is: leave {GIVEN} out"
        )
    return label_map


def _require_overlap(
    what: str, image: VolumeHeader, other: VolumeHeader, options: ReadingOptions
) -> None:
    """Raise GridMismatchError unless a file is on the image's grid, or may be brought onto it."""
    if image.on_same_grid(other):
        return
    if what in _FILLED and WorkGrid(image).part(other, what) is not None:
        return
    hint = _NEVER_RESAMPLED.get(what)
    if hint is None and options.resample:
        WorkGrid(image).require_overlap(other, what)
        return
    if hint is None:
        page = see("docs/reference/formats.md#grids")
        hint = (
            f"Export the {what} on the image's grid, or resample label maps and masks with "
            f"nearest neighbors ({page})."
        )
        hint = WorkGrid(image).advice(other, what, hint)
    else:
        hint = explain_difference(image, "image", other, what) or hint
    raise GridMismatchError(
        f"{what} and image are on different grids\n{image.difference_from(other)}\n  {hint}"
    )
