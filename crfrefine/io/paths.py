"""File names: the supported formats, their suffixes, and names without their suffix. No file is opened here.

The code of each format is a separate module, which is imported when a file needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.streams import cannot_read

if TYPE_CHECKING:
    from crfrefine.io.volume import Volume, VolumeHeader, VoxelsToWrite


class FormatCode(Protocol):
    """The interface of a format's module."""

    def recognizes(self, start: bytes) -> bool:
        """Return whether a file with this beginning, compressed or not, has this format."""
        ...

    def read_header(self, path: Path) -> VolumeHeader:
        """Read the header of a file, and check that the file can hold its voxels."""
        ...

    def write(self, voxels: VoxelsToWrite, like: Volume, threads: int) -> None:
        """Write a file whole or not at all.

        Args:
            voxels: labels, logits or probabilities; its path ends in one of the format's suffixes.
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
        code: Any = import_module(f"crfrefine.io.{self.module}")
        return cast("FormatCode", code)


FORMATS = (
    Format("NIfTI", (".nii.gz", ".nii"), "nifti"),
    Format("NIfTI pair", (".hdr",), "nifti_pair", {".hdr": ".img"}),
    Format("MetaImage", (".mhd", ".mha"), "metaimage", {".mhd": ".zraw"}),
    Format("NRRD", (".nrrd", ".nhdr", ".seg.nrrd"), "nrrd", {".nhdr": ".raw.gz"}),
    Format("FreeSurfer MGH", (".mgz", ".mgh.gz", ".mgh"), "mgh"),
    Format("ITK", (".gipl.gz", ".gipl", ".vtk", ".mrc"), "itk", is_read_only=True),
    Format("nnU-Net npz", (".npz",), "npz", holds_scores_alone=True),
)


VOLUME_SUFFIXES = tuple(suffix for known in FORMATS if not known.holds_scores_alone for suffix in known.suffixes)
SCORES_SUFFIXES = tuple(suffix for known in FORMATS if known.holds_scores_alone for suffix in known.suffixes)
LOGITS_SUFFIXES = VOLUME_SUFFIXES + SCORES_SUFFIXES
WRITTEN_SUFFIXES = tuple(suffix for known in FORMATS if not (known.holds_scores_alone or known.is_read_only) for suffix in known.suffixes)
"""Suffixes of volumes that are written."""
LABELS_SUFFIXES = (".seg.nrrd",)
"""Suffixes of label maps that stand beside an image of the same name, as 3D Slicer saves them."""


def suffix_of(path: Path) -> str:
    """Return the suffix that names the format, such as ".nii.gz", or "" for a name without a known suffix."""
    name = path.name.lower()
    return max((suffix for suffix in LOGITS_SUFFIXES if name.endswith(suffix)), key=len, default="")


def stem_of(path: Path) -> str:
    """Return the file's name without the suffix of its format, or without its last ending if that is not a known suffix."""
    suffix = suffix_of(path)
    return path.name[: len(path.name) - len(suffix)] if suffix else path.stem


def format_of(path: Path) -> Format | None:
    """Return the format that a file's name implies; None for an unknown suffix."""
    suffix = suffix_of(path)
    return next((known for known in FORMATS if suffix in known.suffixes), None)


def header_beside(path: Path) -> Path | None:
    """Return the header beside a file with voxels, where the file is named so and there is one: `NAME.hdr` for `NAME.img`."""
    for known in FORMATS:
        for suffix, ending in known.voxel_endings.items():
            for name in (ending, f"{ending}.gz"):
                if path.name.lower().endswith(name) and not path.name.lower().endswith(LOGITS_SUFFIXES):
                    stem = path.name[: -len(name)]
                    header = next(
                        (beside for written in (suffix, suffix.upper()) if (beside := path.with_name(stem + written)).is_file()), None
                    )
                    if header is not None:
                        return header
    return None


def require_suffix(path: Path, suffixes: tuple[str, ...] = WRITTEN_SUFFIXES + SCORES_SUFFIXES) -> Format:
    """Return the format of a file to write, or raise UnsupportedFormatError if its suffix is not one of `suffixes`."""
    known = format_of(path)
    if known is None or suffix_of(path) not in suffixes:
        raise UnsupportedFormatError(f"{path}: unknown file type; expected one of {', '.join(suffixes)}")
    return known


def is_there(path: Path) -> bool:
    """Return whether a path exists; no path exists under a name that the system does not accept."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def working_folder() -> str:
    """Return the current folder; empty if it was removed."""
    try:
        return str(Path.cwd())
    except OSError:
        return ""


def require_file(path: Path) -> None:
    """Raise InputError, with the reason, if there is no file to read."""
    try:
        is_folder, is_there, is_file = path.is_dir(), path.exists(), path.is_file()
    except OSError as error:
        raise cannot_read(path, error) from error
    if is_folder:
        raise InputError(f"{path}: expected a file, this is a folder")
    if not is_there:
        raise InputError(f"{path}: " + ("is a link to a file that is not there" if path.is_symlink() else "no such file"))
    if not is_file:
        # A pipe would keep the reader waiting for ever, a device may have no end.
        raise InputError(f"{path}: expected a regular file, this is a pipe, a device or a socket; save what it gives as a file")
