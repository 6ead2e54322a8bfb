"""The supported file formats: one entry each, in one table.

An entry has the facts that are known without opening a file. The code of each format is a separate module, imported when a file needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from crfrefine.io.content import Content
    from crfrefine.io.decode import VoxelStream
    from crfrefine.io.volume import Volume, VolumeHeader


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

    def write(self, content: Content, like: Volume, threads: int) -> None:
        """Write a file whole or not at all.

        Args:
            content: labels, logits or probabilities; its path ends in one of the format's suffixes.
            like: its geometry is kept, bit for bit if it came from a file of the same format.
            threads: for compression; the bytes written do not depend on it.

        Raises:
            UnsupportedFormatError: the format cannot hold the grid or the voxels.
        """
        ...


@dataclass(frozen=True)
class Format:
    """A file format."""

    name: str  # for people, and in `VolumeHeader.family`
    suffixes: tuple[str, ...]  # the default for writing first
    module: str  # its name in this package
    # For each suffix of a header, the ending of the file with voxels that is written beside it.
    voxel_endings: Mapping[str, str] = field(default_factory=dict, hash=False)
    is_read_only: bool = False  # it is read through SimpleITK, and not written
    holds_scores_alone: bool = False  # the format has no geometry: it holds logits and probabilities, but no images, masks or label maps

    def load(self) -> FormatCode:
        """Return the module."""
        found: Any = import_module(f"crfrefine.io.{self.module}")
        return cast("FormatCode", found)

    def voxel_files(self, path: Path) -> tuple[Path, ...]:
        """Return the other files that a header names for its voxels; none if it names none or cannot be read."""
        of_format: Callable[[Path], tuple[Path, ...]] | None = getattr(self.load(), "voxel_files", None)
        return () if of_format is None else of_format(path)


FORMATS = (
    Format("NIfTI", (".nii.gz", ".nii"), "nifti"),
    Format("NIfTI pair", (".hdr",), "nifti_pair", {".hdr": ".img"}),
    Format("MetaImage", (".mhd", ".mha"), "metaimage", {".mhd": ".zraw"}),
    Format("NRRD", (".nrrd", ".nhdr", ".seg.nrrd"), "nrrd", {".nhdr": ".raw.gz"}),
    Format("FreeSurfer MGH", (".mgz", ".mgh.gz", ".mgh"), "mgh"),
    Format("ITK", (".gipl.gz", ".gipl", ".vtk", ".mrc"), "itk", is_read_only=True),
    Format("nnU-Net npz", (".npz",), "npz", holds_scores_alone=True),
)
