"""A case: its modalities, logits, mask and labels, found by `crfrefine.cases.discovery`, read and checked here."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from crfrefine import io
from crfrefine.arrays.probabilities import identify, take_logarithms
from crfrefine.axes import StorageOrder, file_order
from crfrefine.cases.discovery import CaseFiles, CaseList, DatasetDescription, discover_cases, read_dataset_description
from crfrefine.errors import ConfigError, GridMismatchError, InputError
from crfrefine.io.parallel import run_all
from crfrefine.io.volume import Volume, VolumeHeader, same_shape
from crfrefine.io.volumes import allocate_shape
from crfrefine.threads import available_threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Case",
    "CaseFiles",
    "CaseHeaders",
    "CaseList",
    "DatasetDescription",
    "discover_cases",
    "load_case",
    "read_case_headers",
    "read_dataset_description",
]

MASK_MODES = ("none", "nonzero")


@dataclass(frozen=True)
class CaseHeaders:
    """What the files of a case say without their voxels; all on one grid.

    Attributes:
        files: the paths.
        images: one a file; several channels only in a lone one.
        logits: of all labels; None where no logits were asked for.
        mask: if there is one.
        labels: if there are some.
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
    def notes(self) -> list[str]:
        """What the user should know: about the geometry of the images, and files that are not what their names say."""
        others = (*(self.logits.files if self.logits is not None else ()), self.mask, self.labels)
        return [
            *(f"{header.path.name}: {text}" for header in self.images for text in header.remarks),
            *(f"{header.path.name}: {header.misnamed}" for header in others if header is not None and header.misnamed is not None),
        ]


@dataclass(frozen=True)
class Case:
    """A case in memory. Arrays are views with x fastest in memory, as in the files.

    Attributes:
        case_id: its name.
        image: (M, *grid) float32, as stored, scaled.
        logits: (L, *grid) float32, higher is better.
        mask: (*grid), True where the model applies; None: everywhere.
        like: the first modality; its geometry is that of the output.
        spacing: mm, one a grid axis.
        num_labels: L, background included.
        input_kind: "logits" or "probabilities", what the network's file held.
        notes: what the user should know, a sentence each.
        labels: (*grid) the reference, where asked for.
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


def read_case_headers(files: CaseFiles) -> CaseHeaders:
    """Read the headers of a case's files and check that all are on one grid, without reading voxels.

    Raises:
        InputError: a file is missing, or the number of modalities is wrong.
        GridMismatchError: two files are on different grids; both are named.
        UnsupportedFormatError: a file cannot be read as asked.
    """
    if files.problem:
        raise InputError(files.problem)
    images = tuple(io.read_header(path, io.VOLUME_SUFFIXES) for path in files.images)
    for image in images[1:]:
        _require_same_grid(files, "two modalities", images[0], image, "Resample the modalities to one grid.")
    for image in images if len(images) > 1 else ():
        if image.num_channels > 1:
            raise InputError(
                f"{image.path}: expected one modality a file, as there are {len(images)} files; this one has {image.num_channels}"
            )
    logits = io.read_logits_header(files.logits) if files.logits else None
    if logits is not None:
        _require_logits_grid(files, images[0], logits.files[0])
    mask = io.read_header(files.mask, io.VOLUME_SUFFIXES) if files.mask else None
    labels = io.read_header(files.labels, io.VOLUME_SUFFIXES) if files.labels else None
    for what, header in (("mask", mask), ("labels", labels)):
        if header is not None:
            if header.num_channels > 1:
                raise InputError(f"{header.path}: expected {what} with one value a voxel, this file has {header.num_channels}")
            _require_same_grid(files, f"image and {what}", images[0], header, f"Resample the {what} to the image's grid.")
    return CaseHeaders(files, images, logits, mask, labels)


def load_case(
    files: CaseFiles,
    *,
    input_type: str = "auto",
    mask_mode: str = "none",
    threads: int | None = None,
    with_labels: bool = False,
) -> Case:
    """Read a case, several files at a time, and check it.

    Args:
        files: of `discover_cases`.
        input_type: "auto", "logits" or "probabilities"; "auto" looks at the values and says in the notes what it took.
        mask_mode: "none" or "nonzero" (any modality is not 0), where there is no mask file.
        threads: None: the cores this process may use.
        with_labels: also read the reference.

    Raises:
        InputError: files that are missing or hold values that cannot be used; an empty mask.
        GridMismatchError: two files on different grids.
        UnsupportedFormatError: a file that is damaged, cut off, or of a kind that is not read.
        CapacityError: the case does not fit into memory.
    """
    if mask_mode not in MASK_MODES:
        raise ConfigError(f"intensity.mask = {mask_mode!r}: expected one of {', '.join(MASK_MODES)}")
    headers = read_case_headers(files)
    if headers.logits is None:
        raise InputError(f"case {files.case_id!r}: no logits")
    threads = threads or available_threads()
    first = headers.images[0]
    affine, spacing = first.geometry()
    storage_shape = first.grid_shape[::-1]
    image_values = allocate_shape((headers.num_modalities, *storage_shape), first.path)
    logits_values = headers.logits.allocate()
    mask_values = io.allocate(headers.mask) if headers.mask else None

    # The longest job first: the logits; each file inflates on one thread.
    jobs = headers.logits.reading(logits_values)
    if len(headers.images) == 1:
        jobs.append(lambda: io.read_into(first, image_values.reshape(-1, *first.grid_shape[::-1])))
    else:
        for i, header in enumerate(headers.images):
            jobs.append(lambda i=i, header=header: io.read_into(header, image_values[i].reshape(1, *header.grid_shape[::-1])))  # type: ignore[misc]
    if headers.mask is not None and mask_values is not None:
        jobs.append(lambda: io.read_into(headers.mask, mask_values))  # type: ignore[arg-type]
    run_all(jobs, threads)

    input_kind, note = identify(logits_values, input_type, headers.logits.kind, headers.logits.path)
    if input_kind == "probabilities":
        run_all([partial(take_logarithms, label) for label in logits_values], threads)
    image = file_order(image_values).to_user(image_values)
    logits_values = logits_values.reshape(headers.logits.num_labels, *storage_shape)
    mask = _mask(headers, mask_values, image_values, mask_mode)
    return Case(
        case_id=files.case_id,
        image=image,
        logits=file_order(logits_values).to_user(logits_values),
        mask=mask,
        like=Volume(image[0], affine, spacing, first.path, first),
        spacing=spacing,
        num_labels=headers.logits.num_labels,
        input_kind=input_kind,
        notes=[note, *headers.notes],
        labels=io.read_labels(files.labels).data.reshape(first.grid_shape) if with_labels and files.labels else None,
    )


def _mask(
    headers: CaseHeaders, mask_values: NDArray[np.float32] | None, image_values: NDArray[np.float32], mask_mode: str
) -> NDArray[np.bool_] | None:
    if mask_values is not None and headers.mask is not None:
        mask: NDArray[np.bool_] = (mask_values != 0).reshape(image_values.shape[1:])
        if not mask.any():
            raise InputError(f"{headers.mask.path}: the mask is empty: it has no voxel that is not zero")
    elif mask_mode == "nonzero":
        mask = image_values[0] != 0
        for modality in image_values[1:]:
            mask |= modality != 0
        if not mask.any():
            raise InputError(f"{headers.images[0].path}: the mask `nonzero` is empty: the image is zero everywhere")
    else:
        return None
    return StorageOrder.of_files(mask.ndim).to_user(mask)


def _require_logits_grid(files: CaseFiles, image: VolumeHeader, logits: VolumeHeader) -> None:
    if image.on_same_grid(logits):
        return
    hint = (
        "The logits may have been saved on the network's cropped grid; export them on the image's grid (docs/reference/formats.md#grids)."
    )
    if logits.affine is None and same_shape(image.grid_shape, logits.grid_shape[::-1]):
        hint = "An .npz holds (label, z, y, x); this one seems to hold (label, x, y, z) (docs/reference/formats.md#grids)."
    raise _mismatch(files, "logits and image", image, logits, hint)


def _require_same_grid(files: CaseFiles, what: str, image: VolumeHeader, other: VolumeHeader, hint: str) -> None:
    if not image.on_same_grid(other):
        raise _mismatch(files, what, image, other, hint)


def _mismatch(files: CaseFiles, what: str, image: VolumeHeader, other: VolumeHeader, hint: str) -> GridMismatchError:
    return GridMismatchError(f"case {files.case_id!r}: {what} are on different grids\n{image.difference_from(other)}\n  {hint}")
