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
        holds_labels_alone: the format is one of segmentations, with names for labels: it holds label maps and masks, and nothing else.
    """

    name: str
    suffixes: tuple[str, ...]
    load: Callable[[], FormatCode]
    voxel_endings: Mapping[str, str] = field(default_factory=dict, hash=False)
    holds_scores_alone: bool = False
    holds_labels_alone: bool = False


def _nifti() -> FormatCode:
    from crfrefine.io import nifti

    return nifti


def _metaimage() -> FormatCode:
    from crfrefine.io import metaimage

    return metaimage


def _nrrd() -> FormatCode:
    from crfrefine.io import nrrd

    return nrrd


def _mgh() -> FormatCode:
    from crfrefine.io import mgh

    return mgh


def _slicer() -> FormatCode:
    from crfrefine.io import slicer

    return slicer


def _npz() -> FormatCode:
    from crfrefine.io import npz

    return npz


FORMATS = (
    Format("NIfTI", (".nii.gz", ".nii"), _nifti),
    Format("MetaImage", (".mhd", ".mha"), _metaimage, {".mhd": ".zraw"}),
    Format("3D Slicer segmentation", (".seg.nrrd",), _slicer, holds_labels_alone=True),  # Before the suffix that it ends in.
    Format("NRRD", (".nrrd", ".nhdr"), _nrrd, {".nhdr": ".raw.gz"}),
    Format("FreeSurfer MGH", (".mgz", ".mgh.gz", ".mgh"), _mgh),
    Format("nnU-Net npz", (".npz",), _npz, holds_scores_alone=True),
)
