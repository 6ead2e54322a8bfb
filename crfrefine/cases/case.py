"""Read and check a case: its modalities, logits, mask and labels, as found by `crfrefine.cases.discovery`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine import io
from crfrefine.arrays.label_maps import argmax_labels
from crfrefine.arrays.padding import find_padding
from crfrefine.arrays.region_channels import find_undecided
from crfrefine.base.axes import StorageOrder, file_order
from crfrefine.base.memory import memory_limit
from crfrefine.base.text import see
from crfrefine.base.threads import available_threads
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.case_memory import require_case_fits
from crfrefine.cases.dataset_description import DatasetDescription, read_dataset_description
from crfrefine.cases.discovery import discover_cases
from crfrefine.cases.label_input import KIND
from crfrefine.cases.mistakes import label_maps_among, naming_exchanged_files
from crfrefine.cases.network_output import NetworkOutputReader, read_network_header
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.reading_options import DEFAULT_READING, ReadingOptions
from crfrefine.errors import GridMismatchError, InputError
from crfrefine.io.decode import allocate_array
from crfrefine.io.dicom_identity import require_same_identity
from crfrefine.io.labels import is_nonzero, read_where
from crfrefine.io.parallel import run_all
from crfrefine.io.volume import TIMES, Volume, VolumeHeader, same_shape

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crfrefine.arrays.region_scheme import RegionScheme

__all__ = [
    "Case",
    "CaseFiles",
    "CaseHeaders",
    "CaseList",
    "DatasetDescription",
    "ReadingOptions",
    "discover_cases",
    "load_case",
    "read_case_headers",
    "read_dataset_description",
]


@dataclass(frozen=True)
class CaseHeaders:
    """The headers of a case's files; all on one grid, unless the options allow to resample.

    Attributes:
        files: the paths.
        images: one per file; several channels only in a single file.
        logits: of all labels; None if no logits were requested.
        mask: the mask's header, if there is one.
        labels: the reference's header, if there is one.
    """

    files: CaseFiles
    images: tuple[VolumeHeader, ...]
    logits: io.LogitsHeader | None
    mask: VolumeHeader | None
    labels: VolumeHeader | None

    @property
    def num_modalities(self) -> int:
        """M."""
        return sum(image.num_channels for image in self.images)

    @property
    def spacing(self) -> tuple[float, ...]:
        """The spacing to compute with, mm, one per grid axis: the one that was given for the case, or the image's.

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
    def on_other_grids(self) -> tuple[VolumeHeader, ...]:
        """The files that are to be interpolated onto the image's grid."""
        companions = (self.logits.files[0] if self.logits is not None else None, self.mask, self.labels)
        return tuple(header for header in companions if header is not None and not self.images[0].on_same_grid(header))

    @property
    def notes(self) -> list[str]:
        """Facts that the user should know: about the images' geometry, and about files whose names are misleading."""
        others = (*(self.logits.files if self.logits is not None else ()), self.mask, self.labels)
        first = self.images[0]
        given = self.files.spacing
        replaced = given is not None and first.spacing is not None and given != first.spacing
        return [
            *([f"{first.path.name}: spacing {_mm(given)} as given, in place of {_mm(first.spacing)}"] if replaced else []),
            *(f"{header.path.name}: {text}" for header in self.images for text in header.remarks),
            *(f"{header.path.name}: {header.misnamed}" for header in others if header is not None and header.misnamed is not None),
            *require_same_identity((*self.images, *others), allow=True),
        ]


@dataclass(frozen=True)
class Case:
    """A case in memory. Arrays are views with x fastest in memory, as in the files.

    Attributes:
        case_id: its name.
        image: (M, *grid) float32, as stored, scaled.
        logits: (L, *grid) float32, higher is better; of regions: (R, *grid), log-odds.
        mask: (*grid), True where the model applies; None: everywhere.
        like: the first modality; its geometry is that of the output.
        spacing: mm, one per grid axis.
        num_labels: L of a label map, background included; the logits of a label map have channels only for the labels that occur.
        input_kind: "logits", "probabilities" or "labels", the type of the network's output.
        notes: facts that the user should know, one sentence each.
        labels: (*grid) the reference, if requested.
        regions: the regions of the channels; None: the channels are labels.
        channel_labels: the label of each channel of the logits; empty: 0, 1, 2 …
        absent_labels: labels that have a channel although the label map, if it is one, lacks them.
        times: seconds of parts of reading.
    """

    case_id: str
    image: NDArray[np.float32]
    logits: NDArray[np.float32]
    mask: NDArray[np.bool_] | None
    like: Volume
    spacing: tuple[float, ...]
    num_labels: int
    input_kind: str
    notes: list[str] = field(default_factory=list)
    labels: NDArray[np.unsignedinteger[Any]] | None = None
    regions: RegionScheme | None = None
    channel_labels: tuple[int, ...] = ()
    absent_labels: tuple[int, ...] = ()
    times: dict[str, float] = field(default_factory=dict)

    def decode(self, logits: NDArray[Any]) -> NDArray[np.unsignedinteger[Any]]:
        """Return the label map of channels like those of `logits`, (*grid) in the smallest unsigned type."""
        return argmax_labels(logits) if self.regions is None else self.regions.decode(logits)

    def find_padding(self) -> NDArray[np.bool_] | None:
        """Return (*grid), True where the logits say nothing, such as padding; None if they do everywhere."""
        order = file_order(self.logits)
        stored = order.to_storage(self.logits)
        padding = find_padding(stored) if self.regions is None else find_undecided(stored)
        return None if padding is None else order.to_user(padding)


def read_case_headers(files: CaseFiles, options: ReadingOptions = DEFAULT_READING) -> CaseHeaders:
    """Read the headers of a case's files and check their grids, without reading voxels.

    Args:
        files: result of `discover_cases`.
        options: how to read.

    Raises:
        InputError: a file is missing, the number of modalities is wrong, or DICOM files are of different patients, studies or frames
            of reference; with `options.allow_mismatched_dicom` only of different patients.
        GridMismatchError: two files are on different grids, both are named; with `options.resample` only modalities,
            files without geometry, and grids that do not overlap.
        UnsupportedFormatError: a file cannot be read as requested.
    """
    if files.problem:
        raise InputError(files.problem)
    images = tuple(io.read_header(path, io.VOLUME_SUFFIXES) for path in files.images)
    # Before the grids are checked, which usually differ as well: the advice to resample would be wrong here.
    _require_same_identity(files, options, *images)
    for image in images[1:]:
        if not images[0].on_same_grid(image):
            raise _mismatch(files, "two modalities", images[0], image, "Resample the modalities to one grid.")
    for image in images if len(images) > 1 else ():
        if image.num_channels > 1:
            raise InputError(
                f"{image.path}: expected one modality per file, as there are {len(images)} files; this one has {image.num_channels}"
            )
    logits = read_network_header(files, options) if files.logits else None
    if logits is not None:
        _require_same_identity(files, options, *images, *logits.files)
    if logits is not None and logits.kind == KIND:
        placed = tuple(io.placed_on(file, images[0]) for file in logits.files)
        logits = replace(logits, files=placed, grid_shape=placed[0].grid_shape, affine=placed[0].affine)
    if logits is not None:
        what = "structure" if files.are_structures else "label map" if logits.kind == KIND else "logits"
        for file in logits.files if files.are_structures else logits.files[:1]:
            _require_grid(files, what, images[0], file, options)
    mask, labels = (
        io.placed_on(io.read_header(path, io.VOLUME_SUFFIXES), images[0]) if path else None for path in (files.mask, files.labels)
    )
    _require_same_identity(files, options, *images, *(logits.files if logits is not None else ()), mask, labels)
    for what, header in (("mask", mask), ("labels", labels)):
        if header is not None:
            if header.num_channels > 1:
                raise InputError(f"{header.path}: expected {what} with one value per voxel, this file has {header.num_channels}")
            _require_grid(files, what, images[0], header, options)
    return CaseHeaders(files, images, logits, mask, labels)


def load_case(
    files: CaseFiles,
    options: ReadingOptions = DEFAULT_READING,
    *,
    threads: int | None = None,
    with_labels: bool = False,
    headers: CaseHeaders | None = None,
) -> Case:
    """Read and check a case, several files at a time.

    Args:
        files: result of `discover_cases`.
        options: how to read.
        threads: None: the cores this process may use.
        with_labels: whether to read the reference too.
        headers: result of `read_case_headers` for these files and options; None: they are read.

    Raises:
        InputError: files that are missing or hold unusable values; an empty mask.
        GridMismatchError: two files on different grids.
        UnsupportedFormatError: a file that is damaged, cut off, or of an unsupported kind.
        CapacityError: the case does not fit into the memory that `options.max_memory` and the system allow; nothing is allocated then.
    """
    headers = headers or read_case_headers(files, options)
    if headers.logits is None:
        raise InputError(f"case {files.case_id!r}: no logits")
    limit = memory_limit(options.max_memory)
    require_case_fits(files.case_id, headers.images, headers.logits, headers.mask, headers.labels if with_labels else None, limit)
    threads = threads or available_threads()
    first = headers.images[0]
    affine, spacing = first.geometry()
    storage_shape = first.grid_shape[::-1]
    image_values = allocate_array((headers.num_modalities, *storage_shape), first.path)
    network = NetworkOutputReader(headers.logits, first, options, are_structures=files.are_structures)
    masks: list[NDArray[np.bool_]] = []

    # The longest job first: the logits; each file inflates on one thread.
    jobs = network.jobs()
    if len(headers.images) == 1:
        jobs.append(lambda: io.read_into(first, image_values.reshape(-1, *first.grid_shape[::-1])))
    else:
        for i, header in enumerate(headers.images):
            jobs.append(lambda i=i, header=header: io.read_into(header, image_values[i].reshape(1, *header.grid_shape[::-1])))  # type: ignore[misc]
    if headers.mask is not None:
        jobs.append(lambda: masks.append(read_where(headers.mask, is_nonzero)))  # type: ignore[arg-type]
    run_all(jobs, threads)

    with naming_exchanged_files(headers.images, headers.logits.files[0]):
        output = network.finish(threads)
    image = file_order(image_values).to_user(image_values)
    notes = label_maps_among(headers.images, image_values)
    mask = _mask(headers, masks, image_values, options.mask_mode, notes)
    labels = read_reference(headers, notes) if with_labels else None
    return Case(
        case_id=files.case_id,
        image=image,
        logits=file_order(output.logits).to_user(output.logits),
        mask=mask,
        like=Volume(image[0], affine, spacing, first.path, first),
        spacing=headers.spacing,
        num_labels=output.num_labels,
        input_kind=output.kind,
        notes=[*output.notes, *notes, *headers.notes],
        labels=labels,
        regions=output.regions,
        channel_labels=output.channel_labels,
        absent_labels=output.absent_labels,
        times=output.times,
    )


def read_mask(headers: CaseHeaders, image: NDArray[Any], mask_mode: str, notes: list[str]) -> NDArray[np.bool_] | None:
    """Return the mask of a case, (*grid); None: the model applies everywhere.

    Args:
        headers: of the case.
        image: (M, [z,] y, x) as stored.
        mask_mode: "none" or "nonzero", what counts if there is no mask file.
        notes: gets what the user should know.

    Raises:
        InputError: the mask is empty, or cannot be read.
    """
    return _mask(headers, [read_where(headers.mask, is_nonzero)] if headers.mask is not None else [], image, mask_mode, notes)


def _mask(
    headers: CaseHeaders,
    masks: Sequence[NDArray[np.bool_]],
    image_values: NDArray[Any],
    mask_mode: str,
    notes: list[str],
) -> NDArray[np.bool_] | None:
    if headers.mask is not None:
        (found,) = masks
        if not found.any():
            raise InputError(f"{headers.mask.path}: the mask is empty: it has no voxel that is not zero")
        mask = WorkGrid(headers.images[0]).nearest(headers.mask, found, "mask", notes, outside="are outside the mask")
        if not mask.any():
            raise InputError(f"{headers.mask.path}: the mask is empty on the image's grid: no voxel of the image lies in it")
    elif mask_mode == "nonzero":
        mask = image_values[0] != 0
        for modality in image_values[1:]:
            mask |= modality != 0
        if not mask.any():
            raise InputError(f"{headers.images[0].path}: the mask `nonzero` is empty: the image is zero everywhere")
    else:
        return None
    return StorageOrder.of_files(mask.ndim).to_user(mask)


def read_reference(headers: CaseHeaders, notes: list[str]) -> NDArray[np.unsignedinteger[Any]] | None:
    """Return the reference of a case, (*grid), on the image's grid; None: it has none. `notes` gets what the user should know."""
    if headers.labels is None:
        return None
    values = io.read_labels(headers.labels.path, grid=headers.images[0]).data
    order = StorageOrder.of_files(values.ndim)
    grid = WorkGrid(headers.images[0])
    stored = grid.nearest(headers.labels, order.to_storage(values), "labels", notes, outside="are background")
    return StorageOrder.of_files(stored.ndim).to_user(stored)


def _mm(spacing: Sequence[float] | None) -> str:
    return TIMES.join(f"{size:g}" for size in spacing or ()) + " mm"


def _require_same_identity(files: CaseFiles, options: ReadingOptions, *headers: VolumeHeader | None) -> None:
    require_same_identity(headers, allow=options.allow_mismatched_dicom, case_id=files.case_id)


def _require_grid(files: CaseFiles, what: str, image: VolumeHeader, other: VolumeHeader, options: ReadingOptions) -> None:
    """Raise GridMismatchError unless a file is on the image's grid, or on one that it may be interpolated from."""
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
    raise _mismatch(files, names, image, other, hint + WorkGrid(image).way_out(other))


def _mismatch(files: CaseFiles, what: str, image: VolumeHeader, other: VolumeHeader, hint: str) -> GridMismatchError:
    return GridMismatchError(f"case {files.case_id!r}: {what} are on different grids\n{image.difference_from(other)}\n  {hint}")
