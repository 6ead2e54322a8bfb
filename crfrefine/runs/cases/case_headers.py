"""The headers of a case's files: read and checked against each other before any voxel is read."""

from __future__ import annotations

from dataclasses import dataclass, replace

from crfrefine import io
from crfrefine.base.text import TIMES, listed, see
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.io.reading import require_scalar, with_channel_axis
from crfrefine.io.volume import VolumeHeader
from crfrefine.runs.cases.case_files import CaseFiles
from crfrefine.runs.cases.foreground import lacks_background
from crfrefine.runs.cases.grid_differences import explain_difference
from crfrefine.runs.cases.label_input import KIND, label_map_header
from crfrefine.runs.cases.other_grid import WorkGrid
from crfrefine.runs.cases.reading_options import DEFAULT_READING, GIVEN, ReadingOptions

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
    companions: tuple[VolumeHeader, ...]  # all these headers, without those of the images
    # mm to compute with, one per grid axis: given for the case, or the image's
    spacing: tuple[float, ...]
    num_modalities: int  # M

    @property
    def notes(self) -> list[str]:
        """Facts that the user should know: another spacing than the image's, what the headers note, and turned voxel axes."""
        first = self.images[0]
        notes = list[str]()
        turned = dict[str, list[str]]()
        if first.spacing not in (None, self.spacing):
            given, own = (
                TIMES.join(f"{size:g}" for size in spacing or ())
                for spacing in (self.spacing, first.spacing)
            )
            notes.append(f"{first.path.name}: spacing {given} mm as given, in place of {own} mm")
        for header in (*self.images, *self.companions):
            # The case, named before a note, may be called as its file.
            name = "" if header.path.name == self.files.case_id else f"{header.path.name}: "
            known = () if header is first else first.notes
            notes += [
                f"{name}{text}"
                for text in header.notes
                if text not in known or text == header.misnamed
            ]
            if header.turned is not None and header.turning:
                turned.setdefault(header.turning, []).append(header.path.name)
        return [*notes, *(f"{listed(names, 3)}: {turning}" for turning, names in turned.items())]


def read_case_headers(files: CaseFiles, options: ReadingOptions = DEFAULT_READING) -> CaseHeaders:
    """Read the headers of a case's files and check their grids, without reading voxels."""
    # Raises InputError, UnsupportedFormatError, or GridMismatchError.
    if files.problem:
        raise InputError(files.problem)
    regions = options.regions
    image, *more = (io.read_header(path, io.VOLUME_SUFFIXES) for path in files.images)
    images = (image, *(io.placed_on(header, image) for header in more))
    spacing = image.geometry()[1]
    if files.spacing is not None and len(files.spacing) != len(spacing):
        raise InputError(
            f"{image.path}: has {len(spacing)} axes; the spacing given for case {files.case_id!r} has {len(files.spacing)}"
        )
    several = next((header for header in images if header.num_channels > 1), None)
    if several is not None and len(images) > 1:
        found = f"as there are {len(images)} files; this one has {several.num_channels}"
        raise InputError(f"{several.path}: expected one modality per file, {found}")
    logits = None
    checked = {"modality": images[1:]}
    if files.logits:
        logits = _read_network_header(files, image, options)
        if files.are_structures:
            what = "structure"
        elif logits.kind == KIND:
            what = "label map"
        else:
            what = "logits"
        checked[what] = logits.files if files.are_structures else logits.files[:1]
    others = {"mask": (files.mask,), "labels": (files.labels,), "strokes": files.strokes}
    for what, paths in others.items():
        checked[what] = tuple(
            io.placed_on(io.read_header(path, io.VOLUME_SUFFIXES), image)
            for path in paths
            if path is not None
        )
        for header in checked[what]:
            require_scalar(header, what)
    for what, header in ((what, header) for what, headers in checked.items() for header in headers):
        if not image.on_same_grid(header):
            _require_overlap(files, what, image, header, resample=options.resample)
    # After the grids: a file with its channels first has a wrong number of channels.
    if logits is not None and logits.kind != KIND:
        regions.require_number(
            logits.num_channels, logits.path, lacks_background=logits.lacks_background
        )
    mask, labels = (next(iter(checked[what]), None) for what in ("mask", "labels"))
    companions = (
        *(() if logits is None else logits.files),
        *(header for what in others for header in checked[what]),
    )
    num_modalities = sum(header.num_channels for header in images)
    return CaseHeaders(
        files,
        images,
        logits,
        mask,
        labels,
        checked["strokes"],
        companions,
        files.spacing or spacing,
        num_modalities,
    )


def _read_network_header(
    files: CaseFiles, image: VolumeHeader, options: ReadingOptions
) -> io.LogitsHeader:
    """Read the headers of logits, probabilities, with or without background, or a label map."""
    regions = options.regions
    headers = [io.read_header(path) for path in files.logits]
    if options.input_type != KIND:
        headers = [with_channel_axis(header, image) for header in headers]
    fewest = 1 if regions.scheme and regions.declares(1) else 2
    if options.add_background or (fewest > 1 and lacks_background(headers, options)):
        return _foreground_header(headers, image, options)

    # The one channel of a single region is no label map, unless the user declares it.
    may_be_map = fewest > 1 and headers[0].num_channels == 1 and options.input_type == "auto"
    is_together = len(headers) == 1 or files.are_structures
    logits = None
    if is_together and (may_be_map or options.input_type == KIND):
        logits = label_map_header([io.placed_on(file, image) for file in headers], options)
    if logits is not None and regions.source == GIVEN:
        raise InputError(
            f"{files.logits[0]}: expected channels of the regions of {regions.source}, found one value per voxel; a label map is "
            f"refined as it is: leave {regions.source} out"
        )
    return logits or io.logits_header(headers, fewest=fewest, grid=image)


def _foreground_header(
    headers: list[VolumeHeader], image: VolumeHeader, options: ReadingOptions
) -> io.LogitsHeader:
    """Put the headers of an output without its background together."""
    first = headers[0]
    if options.add_background and options.input_type in (KIND, "logits"):
        raise InputError(
            f"{first.path}: --add-background: the background is computed from probabilities; leave "
            f"--input-type {options.input_type} out"
        )
    if options.add_background and options.regions.source == GIVEN:
        raise InputError(
            f"{first.path}: --add-background: regions have no background; leave {GIVEN} or "
            "--add-background out"
        )
    found = io.logits_header(headers, fewest=1, grid=image)
    return replace(found, num_labels=found.num_labels + 1, lacks_background=True)


def _require_overlap(
    files: CaseFiles, what: str, image: VolumeHeader, other: VolumeHeader, *, resample: str | None
) -> None:
    """Raise GridMismatchError unless a file on another grid than the image's may be interpolated, and covers the image."""
    hint = _NEVER_RESAMPLED.get(what)
    if hint is None and resample:
        try:
            WorkGrid(image).require_overlap(other, what)
        except GridMismatchError as error:
            raise GridMismatchError(f"case {files.case_id!r}: {error}") from None
        return
    if hint is None:
        page = see("docs/reference/formats.md#grids")
        hint = f"Export the {what} on the image's grid, or resample label maps and masks with nearest neighbors ({page})."
        hint = WorkGrid(image).advice(other, what, hint)
    else:
        hint = explain_difference(image, "image", other, what) or hint
    raise GridMismatchError(
        f"case {files.case_id!r}: {what} and image are on different grids\n{image.difference_from(other)}\n  {hint}"
    )
