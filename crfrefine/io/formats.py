"""The supported file formats: one entry each, in one table.

An entry says what is known without opening a file. The code of each format is a separate module, imported when a file needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from crfrefine.io.content import Content
    from crfrefine.io.volume import Volume, VolumeHeader
    from crfrefine.io.voxel_stream import VoxelStream


class FormatCode(Protocol):
    """The interface of a format's module."""

    def recognizes(self, start: bytes) -> bool:
        """Return whether a file with this beginning, compressed or not, has this format."""
        ...

    def read_header(self, path: Path) -> VolumeHeader:
        """Read the header of a file, and check that the file can hold its voxels."""
        ...

    def open_voxels(self, header: VolumeHeader) -> AbstractContextManager[VoxelStream]:
        """Open the file at its first voxel."""
        ...

    def voxel_files(self, path: Path) -> tuple[Path, ...]:
        """Return the other files that a header names for its voxels; none if it names none or cannot be read."""
        ...

    def write(self, path: Path, content: Content, like: Volume, *, kind: str, voxels: Path | None, threads: int) -> None:
        """Write a file whole or not at all.

        Args:
            path: ends in one of the format's suffixes.
            content: labels, logits or probabilities.
            like: its geometry is kept, bit for bit if it came from a file of the same format.
            kind: "labels", "logits" or "probabilities".
            voxels: the file beside it for the voxels, by `voxel_endings`; None: they are in the file.
            threads: for compression; the bytes written do not depend on it.
        """
        ...


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        name: for people, and in `VolumeHeader.family`.
        suffixes: the default for writing first; longer ones before those that they end in.
        load: returns the module.
        voxel_endings: for each suffix of a header, the ending of the file with voxels that is written beside it.
        holds_scores_alone: the format has no geometry: it holds logits and probabilities, but no images, masks or label maps.
        is_folder: a folder of files is one volume.
        check_image: raises InputError, before anything is computed, if a label map of an image (both by their paths) cannot be written.
        check_header: the same of one image, by its header: of what only its files tell.
        written_as: the suffix of label maps of images in this format; by default the first one.
        holds_labels_alone: the format is one of segmentations, with names for labels: it holds label maps and masks, and nothing else.
    """

    name: str
    suffixes: tuple[str, ...]
    load: Callable[[], FormatCode]
    voxel_endings: Mapping[str, str] = field(default_factory=dict, hash=False)
    holds_scores_alone: bool = False
    holds_labels_alone: bool = False
    is_folder: bool = False
    check_image: Callable[[Path, Path], None] | None = None
    check_header: Callable[[Path, VolumeHeader], None] | None = None
    written_as: str = ""


def _nifti() -> FormatCode:
    from crfrefine.io import nifti

    return nifti


def _nifti_pair() -> FormatCode:
    from crfrefine.io import nifti_pair

    return nifti_pair


def _metaimage() -> FormatCode:
    from crfrefine.io import metaimage

    return metaimage


def _nrrd() -> FormatCode:
    from crfrefine.io import nrrd

    return nrrd


def _mgh() -> FormatCode:
    from crfrefine.io import mgh

    return mgh


def _itk() -> FormatCode:
    from crfrefine.io import itk

    return itk


def _slicer() -> FormatCode:
    from crfrefine.io import slicer

    return slicer


def _dicom_series() -> FormatCode:
    from crfrefine.io import dicom_series

    return dicom_series


def _dicom_segmentation() -> FormatCode:
    from crfrefine.io import dicom_segmentation

    return dicom_segmentation


def _check_dicom_image(path: Path, image: Path) -> None:
    from crfrefine.io.dicom_segmentation_writing import check_image

    check_image(path, image)


def _check_dicom_header(path: Path, image: VolumeHeader) -> None:
    from crfrefine.io.dicom_segmentation_writing import check_header

    check_header(path, image)


def _npz() -> FormatCode:
    from crfrefine.io import npz

    return npz


FORMATS = (
    Format("NIfTI", (".nii.gz", ".nii"), _nifti),
    Format("NIfTI pair", (".hdr",), _nifti_pair, {".hdr": ".img"}),
    Format("MetaImage", (".mhd", ".mha"), _metaimage, {".mhd": ".zraw"}),
    Format("3D Slicer segmentation", (".seg.nrrd",), _slicer, holds_labels_alone=True),  # Before the suffix that it ends in.
    Format("NRRD", (".nrrd", ".nhdr"), _nrrd, {".nhdr": ".raw.gz"}),
    Format("FreeSurfer MGH", (".mgz", ".mgh.gz", ".mgh"), _mgh),
    Format("ITK", (".gipl.gz", ".gipl", ".vtk", ".mrc"), _itk),
    Format(
        *("DICOM segmentation", (".dcm",), _dicom_segmentation),
        holds_labels_alone=True,
        check_image=_check_dicom_image,
        check_header=_check_dicom_header,
    ),
    Format("DICOM series", (), _dicom_series, is_folder=True, written_as=".dcm"),
    Format("nnU-Net npz", (".npz",), _npz, holds_scores_alone=True),
)
