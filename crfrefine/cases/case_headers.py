"""The headers of a case's files: read and checked against each other before any voxel is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crfrefine import io
from crfrefine.base.geometry import same_shape
from crfrefine.base.text import TIMES, listed, see
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.label_input import KIND, read_label_header
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.reading_options import DEFAULT_READING, ReadingOptions
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.io.pieces import require_scalar
from crfrefine.io.volume import VolumeHeader


@dataclass(frozen=True)
class CaseHeaders:
    """The headers of a case's files; all on one grid, unless the options allow to resample."""

    files: CaseFiles  # the paths
    images: tuple[VolumeHeader, ...]  # one per file; several channels only in a single file
    logits: io.LogitsHeader | None  # of all labels; None if no logits were requested
    mask: VolumeHeader | None  # the mask's header, if there is one
    labels: VolumeHeader | None  # the reference's header, if there is one

    @property
    def num_modalities(self) -> int:
        """M."""
        return sum(image.num_channels for image in self.images)

    @property
    def spacing(self) -> tuple[float, ...]:
        """The spacing to compute with, mm, one per grid axis: given for the case, or the image's.

        Raises:
            InputError: the image has no geometry, or another number of axes than the given one.
        """
        _, of_image = self.images[0].geometry()
        given = self.files.spacing
        if given is not None and len(given) != len(of_image):
            raise InputError(
                f"{self.images[0].path}: has {len(of_image)} axes; the spacing given for case {self.files.case_id!r} has {len(given)}"
            )
        return of_image if given is None else given

    @property
    def turnings(self) -> list[str]:
        """Notes on the files whose voxel axes are turned to those of the image."""
        names_by_turning: dict[str, list[str]] = {}
        for header in (*self.images, *(self.logits.files if self.logits is not None else ()), self.mask, self.labels):
            if header is not None and header.turned is not None:
                names_by_turning.setdefault(header.turning, []).append(header.path.name)
        return [f"{listed(names, 3)}: {turning}" for turning, names in names_by_turning.items()]

    @property
    def on_other_grids(self) -> tuple[VolumeHeader, ...]:
        """The files that are to be interpolated onto the image's grid."""
        companions = (self.logits.files[0] if self.logits is not None else None, self.mask, self.labels)
        return tuple(header for header in companions if header is not None and not self.images[0].on_same_grid(header))

    @property
    def notes(self) -> list[str]:
        """Facts that the user should know: about geometry, label names that cannot be read, and files whose names are misleading."""
        others = (*(self.logits.files if self.logits is not None else ()), self.mask, self.labels)
        first = self.images[0]
        given = self.files.spacing
        replaced = given is not None and first.spacing is not None and given != first.spacing
        return [
            *([f"{first.path.name}: spacing {_mm(given)} as given, in place of {_mm(first.spacing)}"] if replaced else []),
            *(f"{self._named(header)}{text}" for header in self.images for text in header.remarks),
            *(
                f"{self._named(header)}{text}"
                for header in others
                if header is not None
                for text in header.remarks
                if text not in first.notes
            ),
            *self.turnings,
        ]

    def _named(self, header: VolumeHeader) -> str:
        """Return the beginning of a note on a file; empty if the case, named before it, is called so."""
        return "" if header.path.name == self.files.case_id else f"{header.path.name}: "


def read_case_headers(files: CaseFiles, options: ReadingOptions = DEFAULT_READING) -> CaseHeaders:
    """Read the headers of a case's files and check their grids, without reading voxels.

    Args:
        files: result of `discover_cases`.
        options: how to read.

    Raises:
        InputError: a file is missing, or the number of modalities is wrong.
        GridMismatchError: two files are on different grids, both are named; with `options.resample` only modalities,
            files without geometry, and grids that do not overlap.
        UnsupportedFormatError: a file cannot be read as requested.
    """
    if files.problem:
        raise InputError(files.problem)
    images = tuple(io.read_header(path, io.VOLUME_SUFFIXES) for path in files.images)
    images = (images[0], *(io.placed_on(image, images[0]) for image in images[1:]))
    for image in images[1:]:
        if not images[0].on_same_grid(image):
            raise _mismatch(files, "two modalities", images[0], image, "Resample the modalities to one grid.")
    for image in images if len(images) > 1 else ():
        if image.num_channels > 1:
            raise InputError(
                f"{image.path}: expected one modality per file, as there are {len(images)} files; this one has {image.num_channels}"
            )
    logits = _read_network_header(files, options) if files.logits else None
    if logits is not None:
        logits = logits.placed_on(images[0])
        what = "structure" if files.are_structures else "label map" if logits.kind == KIND else "logits"
        for file in logits.files if files.are_structures else logits.files[:1]:
            _require_grid(files, what, images[0], file, options)
        # After the grids: a file with its channels first has a wrong number of channels.
        if logits.kind != KIND:
            options.regions.require_number(logits.num_labels, logits.path)
    mask, labels = (
        io.placed_on(io.read_header(path, io.VOLUME_SUFFIXES), images[0]) if path else None for path in (files.mask, files.labels)
    )
    for what, header in (("mask", mask), ("labels", labels)):
        if header is not None:
            require_scalar(header, what)
            _require_grid(files, what, images[0], header, options)
    return CaseHeaders(files, images, logits, mask, labels)


def _read_network_header(files: CaseFiles, options: ReadingOptions) -> io.LogitsHeader:
    """Read the headers of the network's output for a case; raises like `read_case_headers`."""
    fewest = options.regions.fewest_channels
    # The one channel of a single region is no label map, unless the user declares it.
    may_be_labels = fewest > 1 or options.input_type == KIND
    found = read_label_header(files.logits, files.are_structures, options) if may_be_labels else None
    if found is not None and options.regions.is_given:
        raise InputError(
            f"{files.logits[0]}: expected channels of the regions of {options.regions.source}, found one value per voxel; a label map is "
            f"refined as it is: leave {options.regions.source} out"
        )
    return found or io.read_logits_header(files.logits, fewest=fewest)


def _mm(spacing: Sequence[float] | None) -> str:
    return TIMES.join(f"{size:g}" for size in spacing or ()) + " mm"


def _require_grid(files: CaseFiles, what: str, image: VolumeHeader, other: VolumeHeader, options: ReadingOptions) -> None:
    """Raise GridMismatchError unless a file is on the image's grid, or on a grid that it may be interpolated from."""
    if image.on_same_grid(other):
        return
    if options.resample:
        try:
            WorkGrid(image).require_overlap(other, what)
        except GridMismatchError as error:
            raise GridMismatchError(f"case {files.case_id!r}: {error}") from None
        return
    hint = f"Resample the {what} to the image's grid with nearest neighbors."
    if what == "logits":
        hint = (
            "The logits may have been saved on the network's cropped grid; export them on the image's grid "
            f"({see('docs/reference/formats.md#grids')})."
        )
        if other.affine is None and same_shape(image.grid_shape, other.grid_shape[::-1]):
            hint = f"An .npz holds (label, z, y, x); this one seems to hold (label, x, y, z) ({see('docs/reference/formats.md#grids')})."
    names = f"image and {what}" if what in ("mask", "labels") else f"{what} and image"
    raise _mismatch(files, names, image, other, WorkGrid(image).way_out(other, hint))


def _mismatch(files: CaseFiles, what: str, image: VolumeHeader, other: VolumeHeader, hint: str) -> GridMismatchError:
    return GridMismatchError(f"case {files.case_id!r}: {what} are on different grids\n{image.difference_from(other)}\n  {hint}")
