"""The supported formats, and the kind of a file: by its name, or by its first bytes if the name is unknown or wrong."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from crfrefine.base.inputs import add_inputs
from crfrefine.base.text import shorten
from crfrefine.errors import CrfRefineError, InputError, UnsupportedFormatError
from crfrefine.io.streams import cannot_read, read_start

if TYPE_CHECKING:
    from crfrefine.io.volume import Volume, VolumeHeader, VoxelsToWrite


class FormatCode(Protocol):
    """The interface of a format's module."""

    def recognizes(self, start: bytes) -> bool:
        """Return whether a file with this beginning, compressed or not, has this format."""

    def read_header(self, path: Path) -> VolumeHeader:
        """Read the header of a file, and check that the file can hold its voxels."""

    def write(self, voxels: VoxelsToWrite, like: Volume, threads: int) -> None:
        """Write a file whole or not at all, with the geometry of `like`: bit for bit if it came from a file of the same format."""


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
        return code  # type: ignore[no-any-return]


FORMATS = (
    Format("NIfTI", (".nii.gz", ".nii"), "nifti"),
    Format("NIfTI pair", (".hdr",), "nifti_pair", {".hdr": ".img"}),
    Format("MetaImage", (".mhd", ".mha"), "metaimage", {".mhd": ".zraw"}),
    Format("NRRD", (".nrrd", ".nhdr", ".seg.nrrd"), "nrrd", {".nhdr": ".raw.gz"}),
    Format("FreeSurfer MGH", (".mgz", ".mgh.gz", ".mgh"), "mgh"),
    Format("ITK", (".gipl.gz", ".gipl", ".vtk", ".mrc"), "itk", is_read_only=True),
    Format("nnU-Net npz", (".npz",), "npz", holds_scores_alone=True),
    Format("NumPy array", (".npy",), "npy", holds_scores_alone=True),
)
FORMAT_OF_SUFFIX = {suffix: known for known in FORMATS for suffix in known.suffixes}
VOLUME_SUFFIXES = tuple(suffix for known in FORMATS if not known.holds_scores_alone for suffix in known.suffixes)
SCORES_SUFFIXES = tuple(suffix for known in FORMATS if known.holds_scores_alone for suffix in known.suffixes)
LOGITS_SUFFIXES = VOLUME_SUFFIXES + SCORES_SUFFIXES
# Suffixes of volumes that are written.
WRITTEN_SUFFIXES = tuple(suffix for known in FORMATS if not (known.holds_scores_alone or known.is_read_only) for suffix in known.suffixes)
# Suffixes of label maps that stand beside an image of the same name, as 3D Slicer saves them.
LABELS_SUFFIXES = (".seg.nrrd",)


@dataclass(frozen=True)
class ForeignKind:
    """A kind of file that is not supported."""

    name: str  # with its article, as in "it is a DICOM file"
    conversion_hint: str  # how to convert it
    suffixes: tuple[str, ...]  # suffixes of such files
    recognizes: Callable[[bytes], bool]  # returns whether a file with this beginning is of this kind


_ARRAY = "save its array with numpy.savez_compressed('CASE.npz', logits=array), (label, z, y, x), or its image as NIfTI"
_DICOM_HINT = "`crfrefine convert` makes NIfTI of a segmentation, or of the folder of a series"
_PAIR = "put the header, NAME.hdr, beside the voxels, NAME.img; a compressed header has to be unpacked"
_PICTURE = "it has no voxel size and no place in the world; export the volume as NIfTI"
_PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"GIF8")
_ARCHIVES = (b"PK\3\4", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c")
_DICOM = ForeignKind("a DICOM file", _DICOM_HINT, (".dcm", ".dicom", ".ima"), lambda start: start[128:132] == b"DICM")
# The first kind that recognizes a file wins.
FOREIGN_KINDS = (
    _DICOM,
    ForeignKind("half of an Analyze or NIfTI pair", _PAIR, (".img", ".hdr.gz", ".img.gz"), lambda start: False),
    ForeignKind("a MINC volume", "convert it with mnc2nii IN.mnc OUT.nii", (".mnc",), lambda start: start[:4] == b"CDF\1"),
    ForeignKind("an HDF5 file (MINC?)", _ARRAY, (".h5", ".hdf5"), lambda start: start.startswith(b"\x89HDF\r\n\x1a\n")),
    ForeignKind("a file of PyTorch or a pickle", _ARRAY, (".pt", ".pth", ".pkl", ".pickle"), lambda start: b"/data.pkl" in start[:256]),
    ForeignKind("a picture", _PICTURE, (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".gif"), lambda start: start.startswith(_PICTURES)),
    ForeignKind("an archive", "unpack it", (".zip", ".bz2", ".xz", ".zst", ".7z"), lambda start: start.startswith(_ARCHIVES)),
)
_MAX_LOOKED_AT = 32


# ---- By name


def suffix_of(path: Path) -> str:
    """Return the suffix that names the format, such as ".nii.gz", or "" for a name without a known suffix."""
    name = path.name.lower()
    return max((suffix for suffix in LOGITS_SUFFIXES if name.endswith(suffix)), key=len, default="")


def stem_of(path: Path) -> str:
    """Return the file's name without the suffix of its format, or without its last ending if that is not a known suffix."""
    suffix = suffix_of(path)
    return path.name[: len(path.name) - len(suffix)] if suffix else path.stem


def require_suffix(path: Path, suffixes: tuple[str, ...] = WRITTEN_SUFFIXES + SCORES_SUFFIXES) -> Format:
    """Return the format of a file to write, or raise UnsupportedFormatError if its suffix is not one of `suffixes`."""
    suffix = suffix_of(path)
    if suffix not in suffixes:
        raise UnsupportedFormatError(f"{path}: unknown file type; expected one of {', '.join(suffixes)}")
    return FORMAT_OF_SUFFIX[suffix]


def suffix_to_write(path: Path) -> str:
    """Return the suffix for files written like an image: its own, or its format's first, or NIfTI's if that is only read."""
    suffix = suffix_of(path)
    known = FORMAT_OF_SUFFIX.get(suffix)
    if known is None:
        with suppress(CrfRefineError):
            known = file_to_read(path)[1]
    if known is None or suffix in WRITTEN_SUFFIXES:
        return suffix
    return (FORMATS[0] if known.is_read_only else known).suffixes[0]


def header_beside(path: Path) -> Path | None:
    """Return the header beside a file with voxels, where the file is named so and there is one: `NAME.hdr` for `NAME.img`."""
    name = path.name.lower()
    endings = [(suffix, ending) for known in FORMATS for suffix, ending in known.voxel_endings.items()]
    for suffix, ending in endings if not name.endswith(LOGITS_SUFFIXES) else []:
        for own in (ending, f"{ending}.gz"):
            for written in (suffix, suffix.upper()):
                header = path.with_name(path.name[: -len(own)] + written)
                if name.endswith(own) and header.is_file():
                    return header
    return None


def files_written(path: Path) -> tuple[Path, ...]:
    """Return the file, and the file with its voxels if the format separates them."""
    suffix = suffix_of(path)
    ending = FORMAT_OF_SUFFIX[suffix].voxel_endings.get(suffix) if suffix else None
    return (path,) if ending is None else (path, path.with_name(stem_of(path) + ending))


def require_file(path: Path) -> None:
    """Raise InputError, with the reason, if there is no file to read."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise InputError(f"{path}: " + ("is a link to a file that is not there" if path.is_symlink() else "no such file")) from None
    except OSError as error:
        raise cannot_read(path, error) from error
    if S_ISDIR(mode):
        raise InputError(f"{path}: expected a file, this is a folder")
    if not S_ISREG(mode):
        # A pipe would keep the reader waiting for ever, a device may have no end.
        raise InputError(f"{path}: expected a regular file, this is a pipe, a device or a socket; save what it gives as a file")


def working_folder() -> str:
    """Return the current folder; empty if it was removed."""
    try:
        return str(Path.cwd())
    except OSError:
        return ""


# ---- By content


def recognize(path: Path) -> Format | ForeignKind | None:
    """Return the kind of a regular file by its first bytes, or of a folder of DICOM slices; None if it is unknown or unreadable."""
    if path.is_dir():
        return _DICOM if is_series(path) else None
    start = read_start(path)
    if not start:
        return None
    named = FORMAT_OF_SUFFIX.get(suffix_of(path))
    # Most files have the format of their name; the modules of the other formats are then not needed.
    for known in sorted(FORMATS, key=lambda known: known is not named):
        if known.load().recognizes(start):
            return known
    return next((kind for kind in FOREIGN_KINDS if kind.recognizes(start)), None)


def file_to_read(path: Path, suffixes: tuple[str, ...] = LOGITS_SUFFIXES) -> tuple[Path, Format]:
    """Return the file to read and its format, by its name or else its content; for voxels their header."""
    # Raises InputError if there is no such file, and UnsupportedFormatError, with advice on how to
    # convert it, if neither name nor content has one of these formats.
    suffix = suffix_of(path)
    named = FORMAT_OF_SUFFIX.get(suffix)
    if named is not None and suffix in suffixes:
        require_file(path)
        return path, named
    kind = recognize(path)
    if isinstance(kind, Format) and set(kind.suffixes) <= set(suffixes):
        return path, kind
    header = header_beside(path) if kind is None else None
    if header is not None:
        return file_to_read(header, suffixes)
    if not os.path.exists(path):  # noqa: PTH110 - no exception for names that the system refuses
        require_file(path)
    hint = conversion_hint(kind) or conversion_hint(named or _foreign_by_name(path), "By its name, it")
    message = f"{path}: unknown file type; expected one of {', '.join(suffixes)}"
    raise UnsupportedFormatError(f"{message}\n  {hint}" if hint else message)


def conversion_hint(kind: Format | ForeignKind | None, who: str = "It") -> str:
    """Describe an unreadable file and the remedy; "" if unknown."""
    if kind is None:
        return ""
    if not isinstance(kind, Format):
        return f"{who} is {kind.name}: {kind.conversion_hint}."
    if kind.holds_scores_alone:
        return f"{who} is a file of logits or probabilities ({kind.name}), which has no geometry: no image, mask or label map."
    return f"{who} is {kind.name} by its content: name it {' or '.join(kind.suffixes)}."


def describe_others(folder: Path) -> str:
    """Describe, on a separate line, the files of a folder if none has a known suffix; "" if unknown."""
    others = (path for path in folder.iterdir() if suffix_of(path) not in VOLUME_SUFFIXES and not path.name.startswith("."))
    paths = sorted(path for path in others if path.is_file())[:_MAX_LOOKED_AT]
    kinds = {path: kind for path in paths if (kind := recognize(path) or _foreign_by_name(path)) is not None}
    if not kinds:
        inner = next((path for path in sorted(folder.iterdir()) if path.is_dir() and is_series(path)), None)
        return "" if inner is None else f"\n  {shorten(inner.name)} holds DICOM files: crfrefine convert {inner} {inner}.nii.gz"
    usual = Counter(kinds.values()).most_common(1)[0][0]
    example = next(path for path, kind in kinds.items() if kind == usual)
    return f"\n  {conversion_hint(usual, f'There is {shorten(example.name)}, which')}"


def _foreign_by_name(path: Path) -> ForeignKind | None:
    return next((kind for kind in FOREIGN_KINDS if path.name.lower().endswith(kind.suffixes)), None)


def is_series(path: Path) -> bool:
    """Return whether a folder holds DICOM slices; a few files without a known suffix are looked into."""
    try:
        with os.scandir(path) as entries:
            files = [path / entry.name for entry in islice(entries, _MAX_LOOKED_AT) if entry.is_file()]
    except (OSError, ValueError):
        return False
    return any(_DICOM.recognizes(read_start(file)) for file in files if not suffix_of(file))


def is_dicom(path: Path) -> bool:
    """Return whether a path is a DICOM file, or a folder of them, by content, or by its name if it does not exist."""
    if not os.path.exists(path):  # noqa: PTH110 - no exception for names that the system refuses
        return path.name.lower().endswith(_DICOM.suffixes)
    return is_series(path) if path.is_dir() else not suffix_of(path) and recognize(path) is _DICOM


# ---- Files that are read together


def files_read(path: Path) -> tuple[Path, ...]:
    """Return the file, and the file with its voxels if its header names one."""
    # Reading the file later reports the error with its case; this function also looks at other cases.
    with suppress(Exception), np.errstate(all="ignore"):
        path, known = file_to_read(path)
        source = known.load().read_header(path).source if known.voxel_endings else None
        return (path,) if source is None or source.path == path else (path, source.path)
    return (path,)


def add_volumes(*paths: Path | None) -> None:
    """Protect the files of volumes that the command reads (`base.inputs`); of a folder, all volumes and `dataset.json`."""
    for path in dict.fromkeys(path for path in paths if path is not None):
        files = files_read(path)
        if len(files) == 1 and path.is_dir():
            with suppress(OSError):
                files = tuple(entry for entry in path.iterdir() if suffix_of(entry) or entry.name == "dataset.json")
        add_inputs(*files)
