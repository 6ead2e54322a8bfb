"""The headers of a case's files, and how they fit each other.

They are read before the voxels, apart from a network's file of floats with one per voxel: only its
voxels tell a label map from the scores of label 1. They are decoded once for it, piece by piece.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

from crfrefine.base.array_types import Spacing
from crfrefine.base.failures import naming_case
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import listed, see, text_of_sizes
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.dataset_description import read_dataset_description
from crfrefine.cases.foreground import holds_labels
from crfrefine.cases.frame import read_network_file
from crfrefine.cases.grid_differences import explain_difference
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.reading_options import DEFAULT_READING, ReadingOptions
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.io.formats import VOLUME_SUFFIXES
from crfrefine.io.headers import (
    NetworkHeader,
    logits_header,
    placed_on,
    read_header,
    require_scalar,
)
from crfrefine.io.volume import VolumeHeader

# Files that may be stored for a part of the image's grid, and are 0 elsewhere.
_FILLED = ("label map", "structure", "mask", "labels", "strokes")
# What --map does not change, and why: a network's output other than a label map.
_NOT_MAPPED = {
    "logits": "logits or probabilities, whose channels are labels in their order",
    "structure": "one file per structure, numbered by their names",
}
# What to do with strokes on another grid, which --resample leaves out.
_STROKES_ELSEWHERE = "Draw them on the image; strokes are not resampled."


class CaseHeaders(NamedTuple):
    """The headers of a case's files: on the image's grid, a part of it, or, on request, another."""

    files: CaseFiles  # the paths
    images: tuple[VolumeHeader, ...]  # one per file; several channels only in a single file
    network: NetworkHeader  # of its output; without files if none was requested
    mask: VolumeHeader | None  # the mask's header, if there is one
    labels: VolumeHeader | None  # the reference's header, if there is one
    strokes: tuple[VolumeHeader, ...]  # the headers of the strokes
    # mm to compute with, one per grid axis: given for the case, or the image's
    spacing: Spacing
    # the label map with which a network's output is compared, if it is an array without geometry
    compared: VolumeHeader | None = None

    @property
    def image(self) -> VolumeHeader:
        """The header of the first modality, whose grid is that of the case."""
        return self.images[0]

    @property
    def num_modalities(self) -> int:
        """M, the number of channels of the images."""
        return sum(image.num_channels for image in self.images)

    @property
    def companions(self) -> tuple[VolumeHeader, ...]:
        """All headers, without those of the images."""
        scalars = (self.mask, self.labels, *self.strokes)
        return (*self.network.files, *(header for header in scalars if header is not None))

    @property
    def notes(self) -> list[Note]:
        """Facts that the user should know.

        Another spacing than the image's, modalities on other grids, notes of the headers, and
        turned voxel axes.
        """
        first = self.image
        notes = list[Note]()
        if first.spacing is not None and first.spacing != self.spacing:
            notes.append(
                NoteKind.GIVEN_SPACING(
                    first.path.name,
                    given=text_of_sizes(f"{size:g}" for size in self.spacing),
                    stored=text_of_sizes(f"{size:g}" for size in first.spacing),
                )
            )
        names = self.files.modalities or [image.path.name for image in self.images]
        for name, image in zip(names, self.images, strict=False):
            if not first.on_same_grid(image):
                outside = "take no part, as if outside the mask"
                notes += WorkGrid(first).describe(image, f"modality {name}", outside)
        headers = (*self.images, *self.companions)
        for header in headers:
            for note in header.notes:
                # A note of the first image is not repeated, unless it is on a file's name.
                is_repeated = note in first.notes and note != header.misnamed
                if header is not first and is_repeated:
                    continue
                # The name of the case stands before a note, and may be that of the file.
                if header.path.name != self.files.case_id:
                    note = note.about(header.path.name)
                notes.append(note)

        names_of: dict[Note, list[str]] = {}  # of files with turned axes, by how
        for header in headers:
            if header.turning is not None:
                names_of.setdefault(header.turning.about(""), []).append(header.path.name)
        for turning, turned in names_of.items():
            notes.append(turning.about(listed(turned, 3)))
        return notes


def read_case_headers(files: CaseFiles, options: ReadingOptions = DEFAULT_READING) -> CaseHeaders:
    """Read the headers of a case's files and check their grids.

    Voxels are read only of a network's file of floats with one per voxel, and only the first time.

    Raises InputError, UnsupportedFormatError, or GridMismatchError.
    """
    with naming_case(files.case_id):
        if files.problem:
            raise InputError(files.problem, cause="; ".join(files.missing))
        images = _read_images(files, options)
        image = images[0]
        network = NetworkHeader((), 0, None)
        compared = None
        if files.network:
            network, compared = _read_network_header(files, image, options)
            what = "logits"
            if files.structures:
                what = "structure"
            elif network.is_label_map:
                what = "label map"
            for header in network.files:
                _require_image_grid(what, image, header, options)
            # After the grids: a file with its channels first has a wrong number of channels.
            if options.mapping and what in _NOT_MAPPED:
                raise InputError(
                    f"{network.path}: --map gives the values of a label map new labels; "
                    f"found {_NOT_MAPPED[what]}; leave --map out"
                )
            options.regions.require_number(network)
        mask = None
        if files.mask is not None:
            mask = read_scalar(files.mask, "mask", image, options)
        labels = None
        if files.labels is not None:
            labels = read_scalar(files.labels, "labels", image, options)
        strokes = [read_scalar(path, "strokes", image, options) for path in files.strokes]
        return CaseHeaders(
            files,
            images,
            network,
            mask,
            labels,
            tuple(strokes),
            files.spacing or image.geometry()[1],
            compared,
        )


def _read_images(files: CaseFiles, options: ReadingOptions) -> tuple[VolumeHeader, ...]:
    """Read the headers of the images, one modality per file, or all of them in a single one."""
    first = read_header(files.images[0], VOLUME_SUFFIXES)
    num_axes = first.num_axes
    if files.spacing is not None and len(files.spacing) != num_axes:
        raise InputError(
            f"{first.path}: has {num_axes} axes; "
            f"the spacing given for case {files.case_id!r} has {len(files.spacing)}"
        )
    images = [first]
    for path in files.images[1:]:
        images.append(placed_on(read_header(path, VOLUME_SUFFIXES), first))
    for image in images:
        if image.num_channels > 1 and image.time:
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
        if image.num_channels > 1 and len(images) > 1:
            raise InputError(
                f"{image.path}: expected one modality per file, as there are {len(images)} files; "
                f"this one has {image.num_channels}"
            )
        if image is not first:
            _require_image_grid("modality", first, image, options)
    return tuple(images)


def read_scalar(
    path: Path, what: str, image: VolumeHeader, options: ReadingOptions
) -> VolumeHeader:
    """Read the header of a file with one value per voxel, with its axes turned to the image's."""
    header = placed_on(read_header(path, VOLUME_SUFFIXES), image)
    require_scalar(header, what)
    _require_image_grid(what, image, header, options)
    return header


def _read_network_header(
    files: CaseFiles, image: VolumeHeader, options: ReadingOptions
) -> tuple[NetworkHeader, VolumeHeader | None]:
    """Read the headers of a network's output, and tell a label map from channels.

    Logits are distinguished from probabilities later, by their values (`network_output`).
    """
    headers = []
    compared = None
    for path in files.network:
        if options.input_type == "labels":
            headers.append(read_header(path))
            continue
        header, compared = read_network_file(path, image, files.images)
        headers.append(header)
    first = headers[0]
    regions = options.regions
    # One value per voxel, which is no region: a label map, or the scores of label 1, whose
    # background is computed then, as on request.
    has_one_value = first.num_channels == 1 and not regions.declares(1)
    is_auto = options.type_of_scores == "auto"
    lacks_background = options.add_background
    if not lacks_background and has_one_value and len(headers) == 1:
        lacks_background = options.input_type != "labels"
        if is_auto and first.kind is None:
            lacks_background = not holds_labels(first, needs_foreground=True)
    others = [file for file in headers if file.num_channels > 1 or file.affine is None]
    is_label_map = not lacks_background and (len(headers) == 1 or bool(files.structures))
    if options.input_type != "labels":
        is_label_map = is_label_map and is_auto and has_one_value and not others
    if is_label_map and others:
        other = others[0]
        found = str(other.num_channels)
        if other.affine is None:
            found = "no geometry"
        raise InputError(
            f"{other.path}: expected a label map with one value per voxel, this file has "
            f"{found}; for logits or probabilities, leave --input-type labels out"
        )
    if is_label_map:
        placed = tuple(placed_on(header, image) for header in headers)
        return NetworkHeader(placed, options.num_declared, None, is_label_map=True), None
    fewest = 1 if lacks_background or regions.declares(1) else 2
    network = logits_header(headers, fewest=fewest, grid=image)
    if lacks_background:
        network = network._replace(num_labels=network.num_labels + 1, lacks_background=True)
    return network, compared


def _require_image_grid(
    what: str, image: VolumeHeader, other: VolumeHeader, options: ReadingOptions
) -> None:
    """Raise GridMismatchError unless a file is on the image's grid, or may be brought onto it."""
    grid = WorkGrid(image)
    if image.on_same_grid(other):
        return
    if what in _FILLED and grid.part(other, what) is not None:
        return
    if what == "strokes":
        hint = explain_difference(image, "image", other, what) or _STROKES_ELSEWHERE
    elif options.resample:
        grid.require_overlap(other, what)
        return
    else:
        page = see("docs/reference/formats.md#grids")
        hint = (
            f"Export the {what} on the image's grid, or resample label maps and masks with "
            f"nearest neighbors ({page})."
        )
        if what == "modality":
            hint = f"Bring the second file onto the grid of the first ({page})."
        hint = grid.advice(other, what, hint)
    raise GridMismatchError(
        f"{what} and image are on different grids\n{image.difference_from(other)}\n  {hint}"
    )
