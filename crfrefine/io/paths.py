"""The supported formats, and the kind of a file.

A file is of the kind that its name says, or of that of its first bytes if the name is unknown or
wrong.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from stat import S_ISDIR, S_ISREG

import numpy as np

from crfrefine.base.failures import expected_error
from crfrefine.base.inputs import add_inputs
from crfrefine.base.text import shorten, shorten_value
from crfrefine.errors import CrfRefineError, InputError, UnsupportedFormatError
from crfrefine.io.streams import GZIP_MAGIC, inflated, read_start
from crfrefine.io.volume import RareHeaderError, VolumeHeader

# Types of voxels, the smallest first; of one size, the type that most programs read.
ALL_TYPES = (
    *("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float32", "float64"),
)


@dataclass(frozen=True)
class Format:
    """A file format, and the module that reads and writes it.

    The module has these functions:

    - `recognizes(start)`: whether a file with these first bytes, compressed or not, is of the
      format.
    - `read_header(path)`: the `VolumeHeader`, by a `volume.FileHeader`, which checks that the file
      can hold its voxels. It raises UnsupportedFormatError for damage and for another format, and
      RareHeaderError for what only SimpleITK reads. `headers.read_header`, which calls it, adds
      `family`, `states` and the note on a wrong name.
    - `open_voxels(header)`, only for headers whose `source` is None: a context with a
      `streams.Decoder` at the first voxel.
    - `write(voxels, threads)`, unless the format is only read: writes `VoxelsToWrite`, whole
      or not at all. If `voxels.like` came from a file of this format, its geometry stays exactly.
    """

    name: str  # for people, and in `VolumeHeader.family`
    suffixes: tuple[str, ...]  # the default for writing first
    module: str  # its name
    # For each suffix of a header, the ending of the file with voxels that is written beside it.
    voxel_endings: Mapping[str, str] = field(default_factory=dict, hash=False)
    # Names of such files that readers take for something else: a pattern or list of files, another
    # folder, a line that ends. ITK and teem differ; what one of them misreads is not written. None
    # means that headers name no files.
    misread_names: re.Pattern[str] | None = None
    is_read_only: bool = False  # it is read through SimpleITK, and not written
    # Types of the voxels of images that are written; label maps and logits always find one.
    image_types: tuple[str, ...] = ALL_TYPES
    # the format has no geometry: it holds logits and probabilities, but no images, masks or label
    # maps
    holds_scores_alone: bool = False

    def hint(self, who: str) -> str:
        """Describe a file of this format, which is not read under its name, and the remedy."""
        if self.holds_scores_alone:
            return (
                f"{who} is a file of logits or probabilities ({self.name}), which has no geometry: "
                "no image, mask or label map."
            )
        return f"{who} is {self.name} by its content: name it {' or '.join(self.suffixes)}."


@dataclass(frozen=True)
class ForeignKind:
    """A kind of file that is not read."""

    description: str  # with the remedy
    beginning: bytes  # an expression for the first bytes of such files
    # People keep such files beside volumes; only one that is given as a volume is described.
    is_text: bool = False

    def hint(self, who: str) -> str:
        """Describe a file of this kind, and the remedy."""
        return f"{who} is {self.description}."


ITK = "ITK"  # name of the formats that SimpleITK reads, among them rare headers of others
FORMATS = (
    Format("NIfTI", (".nii.gz", ".nii", ".hdr"), "crfrefine.io.nifti", {".hdr": ".img"}),
    Format(
        "MetaImage",
        (".mhd", ".mha"),
        "crfrefine.io.metaimage",
        {".mhd": ".zraw"},
        misread_names=re.compile(r"\s|~|(?i:list)|(?s:.*[%\\\0-\x1f\x7f])"),
    ),
    Format(
        "NRRD",
        (".nrrd", ".nhdr", ".seg.nrrd"),
        "crfrefine.io.nrrd",
        {".nhdr": ".raw.gz"},
        misread_names=re.compile(r"\s|(?i:list)|(?s:.*[%:\0-\x1f\x7f])"),
    ),
    Format(
        "FreeSurfer MGH",
        (".mgz", ".mgh.gz", ".mgh"),
        "crfrefine.io.mgh",
        image_types=("uint8", "int16", "int32", "float32"),
    ),
    Format(ITK, (".gipl.gz", ".gipl", ".vtk", ".mrc"), "crfrefine.io.itk", is_read_only=True),
    Format("NumPy array", (".npz", ".npy"), "crfrefine.io.npz", holds_scores_alone=True),
)
FORMAT_OF_NAME = {known.name: known for known in FORMATS}
FORMAT_OF_SUFFIX = {suffix: known for known in FORMATS for suffix in known.suffixes}
SCORES_SUFFIXES = FORMAT_OF_NAME["NumPy array"].suffixes
VOLUME_SUFFIXES = tuple(suffix for suffix in FORMAT_OF_SUFFIX if suffix not in SCORES_SUFFIXES)
LOGITS_SUFFIXES = VOLUME_SUFFIXES + SCORES_SUFFIXES
# Suffixes of volumes that are written.
WRITTEN_SUFFIXES = tuple(
    suffix for suffix in VOLUME_SUFFIXES if not FORMAT_OF_SUFFIX[suffix].is_read_only
)
ALL_WRITTEN_SUFFIXES = WRITTEN_SUFFIXES + SCORES_SUFFIXES
# Suffixes of label maps that 3D Slicer saves beside an image of the same name.
LABELS_SUFFIXES = (".seg.nrrd",)


_ARRAY = (
    "save its array with numpy.savez_compressed('CASE.npz', logits=array), (label, z, y, x), "
    "or its image as NIfTI"
)
_DICOM = ForeignKind(
    "a DICOM file: `crfrefine convert` makes NIfTI of a segmentation, or of the folder of a series",
    rb".{128}DICM",
)
STRUCTURES_ADVICE = (
    "make a mask of each structure on its series, with\n"
    "  plastimatch convert --input RTSTRUCT.dcm --referenced-ct SERIES --output-prefix FOLDER "
    "--prefix-format nii.gz\n"
    "  or dcmrtstruct2nii convert -r RTSTRUCT.dcm -d SERIES -o FOLDER"
)
STRUCTURES = ForeignKind(
    f"a DICOM RTSTRUCT, which holds contours and no voxels: {STRUCTURES_ADVICE}",
    rb".{128}DICM.{0,200}1\.2\.840\.10008\.5\.1\.4\.1\.1\.481\.3\0",
)
# The first kind whose beginning matches counts.
_FOREIGN_KINDS: tuple[ForeignKind, ...] = (
    STRUCTURES,
    _DICOM,
    ForeignKind("a MINC volume: convert it with mnc2nii IN.mnc OUT.nii", rb"CDF\x01"),
    ForeignKind(f"an HDF5 file (MINC?): {_ARRAY}", rb"\x89HDF\r\n\x1a\n"),
    ForeignKind(f"a file of PyTorch or a pickle: {_ARRAY}", rb".{0,247}/data\.pkl"),
    ForeignKind(
        "a picture: it has no voxel size and no place in the world; export the volume as NIfTI",
        rb"\x89PNG\r|\xff\xd8\xff|II\*\0|MM\0\*|GIF8",
    ),
    ForeignKind(
        "an archive: unpack it",
        rb"PK\x03\x04|BZh|\xfd7zXZ\0|\x28\xb5\x2f\xfd|7z\xbc\xaf|.{257}ustar",
    ),
    ForeignKind(
        "a pointer of Git LFS in place of the data: fetch them with git lfs pull",
        rb"version https://git-lfs\.github\.com/",
        is_text=True,
    ),
    ForeignKind(
        "a pointer of git-annex in place of the data: fetch them with git annex get",
        rb"[./]*(?:\.git/)?annex/objects/",
        is_text=True,
    ),
    ForeignKind(
        "a web page, as failed downloads leave: download the file again, perhaps after logging in",
        rb"(?i)(?:\xef\xbb\xbf)?\s*(?:<!--.{0,2000}?-->\s*)?<(?:!doctype html|html|head|body)",
        is_text=True,
    ),
    ForeignKind(
        "XML, such as the error message of a server, or a surface: look at it with a text editor, "
        "and download the file again",
        rb"(?:\xef\xbb\xbf)?\s*<(?:\?xml|Error|[A-Za-z]+File\b)",
        is_text=True,
    ),
    ForeignKind(
        "JSON, such as the error message of a server: look at it with a text editor, and download "
        "the file again",
        rb"(?:\xef\xbb\xbf)?\s*[{\[]\s*[\"{}\[\]]",
        is_text=True,
    ),
)
# Those of the content of a file that is compressed with gzip.
_PACKED_KINDS = (
    ForeignKind("compressed twice: unpack it once (gunzip)", GZIP_MAGIC),
    *[kind for kind in _FOREIGN_KINDS if kind not in (STRUCTURES, _DICOM)],
)
# It has no header, or a compressed one, and is known by its name.
_HALF = ForeignKind(
    "half of an Analyze or NIfTI pair: put the header, NAME.hdr, beside the voxels, NAME.img",
    b"",
)
_VOXEL_ENDINGS = (".raw", ".zraw", ".raw.gz", ".img", ".img.gz")
_PACKED_HALF = r"\.(hdr|img)\.gz$"
_MAX_LOOKED_AT = 32


def suffix_of(path: Path) -> str:
    """Return the suffix that names the format, such as ".nii.gz"; "" if it is not known."""
    name = path.name.lower()
    suffixes = [suffix for suffix in LOGITS_SUFFIXES if name.endswith(suffix)]
    return max(suffixes, key=len, default="")


def is_folder(path: Path) -> bool:
    """Return whether an input is a folder of files, which no format takes for one volume."""
    return os.path.isdir(path)  # noqa: PTH112 - no exception for names that the system refuses


def holds_scores_alone(path: Path) -> bool:
    """Return whether the name of a file is that of logits or probabilities without geometry."""
    return suffix_of(path) in SCORES_SUFFIXES


def stem_of(path: Path) -> str:
    """Return the file's name without the suffix of its format, or else without its last ending."""
    suffix = suffix_of(path)
    if suffix:
        return path.name[: len(path.name) - len(suffix)]
    if re.search(_PACKED_HALF, path.name, re.IGNORECASE):
        return Path(path.stem).stem
    return path.stem


def require_suffix(path: Path, suffixes: tuple[str, ...] = ALL_WRITTEN_SUFFIXES) -> Format:
    """Return the format of a file to write; raise UnsupportedFormatError for another suffix.

    Raise InputError for a name that a header cannot give to a separate file of voxels.
    """
    suffix = suffix_of(path)
    if suffix not in suffixes:
        raise UnsupportedFormatError(
            f"{path}: unknown file type; expected one of {', '.join(suffixes)}"
        )
    known = FORMAT_OF_SUFFIX[suffix]
    for file in files_written(path)[1:]:
        if known.misread_names is not None and known.misread_names.match(file.name):
            whole = next(other for other in known.suffixes if other not in known.voxel_endings)
            raise InputError(
                f"{path}: cannot be written in two files: the header of {suffix} would not find "
                f"its voxels by the name {shorten_value(file.name)}, which means something else "
                f"there (such as a pattern of names by %); write one file, {whole}, or choose "
                "another name"
            )
    return known


def suffix_to_write(path: Path) -> str:
    """Return the suffix for files written like an image.

    It is the image's own, or the first one of its format, or NIfTI's if that is only read.
    """
    known = FORMAT_OF_SUFFIX.get(suffix_of(path))
    with suppress(CrfRefineError):
        path, known = file_to_read(path)
    suffix = suffix_of(path)
    if known is None or suffix in WRITTEN_SUFFIXES:
        return suffix
    if known.is_read_only:
        return FORMATS[0].suffixes[0]
    return known.suffixes[0]


def files_written(path: Path) -> tuple[Path, ...]:
    """Return the file, and the file with its voxels if the format separates them."""
    suffix = suffix_of(path)
    known = FORMAT_OF_SUFFIX.get(suffix)
    if known is None or suffix not in known.voxel_endings:
        return (path,)
    return (path, path.with_name(stem_of(path) + known.voxel_endings[suffix]))


def voxels_beside(path: Path) -> list[Path]:
    """Return the files with the usual names of the voxels of a header, which are there."""
    known = FORMAT_OF_SUFFIX.get(suffix_of(path))
    if known is None or suffix_of(path) not in known.voxel_endings:
        return []
    beside = [path.with_name(stem_of(path) + ending) for ending in _VOXEL_ENDINGS]
    return [voxels for voxels in beside if voxels.is_file()]


def require_file(path: Path) -> None:
    """Raise InputError, with the reason, if there is no file to read."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        if path.is_symlink():
            raise InputError(f"{path}: is a link to a file that is not there") from None
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise expected_error(error, path) from error
    if S_ISDIR(mode):
        raise InputError(f"{path}: expected a file, this is a folder")
    if not S_ISREG(mode):
        # A pipe would keep the reader waiting for ever, a device may have no end.
        raise InputError(
            f"{path}: expected a regular file, this is a pipe, a device or a socket; "
            "save what it gives as a file"
        )


def recognize(path: Path) -> Format | ForeignKind | None:
    """Return the kind of a file by its first bytes, or of a folder of DICOM; None if unknown."""
    if is_folder(path):
        # The first files, by name, that have no known suffix, tell whether it is DICOM.
        with suppress(OSError):
            files = (
                file for file in sorted(path.iterdir()) if not suffix_of(file) and file.is_file()
            )
            if any(read_start(file)[128:132] == b"DICM" for file in islice(files, _MAX_LOOKED_AT)):
                return _DICOM
        return None
    start = read_start(path)
    if not start:
        return None
    named = FORMAT_OF_SUFFIX.get(suffix_of(path))
    # Most files have the format of their name; the modules of the other formats are then not
    # needed.
    for known in sorted(FORMATS, key=lambda known: known is not named):
        if import_module(known.module).recognizes(start):
            return known
    kinds = _FOREIGN_KINDS
    if start.startswith(GZIP_MAGIC):
        inner = inflated(start)
        if inner is start:
            return None
        start = inner
        kinds = _PACKED_KINDS
    for kind in kinds:
        if re.match(kind.beginning, start, re.DOTALL):
            return kind
    return None


def file_to_read(path: Path, suffixes: tuple[str, ...] = LOGITS_SUFFIXES) -> tuple[Path, Format]:
    """Return the file to read and its format, by its name or else its content.

    It is `NAME.hdr` for `NAME.img`. Raise InputError for a missing file, or
    UnsupportedFormatError with advice on how to convert it.
    """
    suffix = suffix_of(path)
    named = FORMAT_OF_SUFFIX.get(suffix)
    if named is not None and suffix in suffixes:
        require_file(path)
        return path, named

    kind = recognize(path)
    if isinstance(kind, Format) and set(kind.suffixes) <= set(suffixes):
        return path, kind
    if kind is None:
        if path.name.lower().endswith((".img", ".img.gz")):
            for ending in (".hdr", ".HDR", ".hdr.gz"):
                header = path.with_name(stem_of(path) + ending)
                if header.is_file():
                    return file_to_read(header, suffixes)
        require_file(path)
        is_half = path.name.lower().endswith((".img", ".img.gz", ".hdr.gz"))
        kind = _HALF if is_half else named
    message = f"{path}: unknown file type; expected one of {', '.join(suffixes)}"
    if kind is not None:
        message += f"\n  {kind.hint('It')}"
    raise UnsupportedFormatError(message)


def describe_others(folder: Path) -> str:
    """Describe, in a line, the first file with a known kind but no known suffix; "" for none."""
    others = []
    for path in sorted(folder.iterdir()):
        if suffix_of(path) not in VOLUME_SUFFIXES and not path.name.startswith("."):
            others.append(path)
    for path in others[:_MAX_LOOKED_AT]:
        kind = recognize(path)
        if kind is None or (isinstance(kind, ForeignKind) and kind.is_text):
            continue
        name = shorten(path.name)
        if is_folder(path):
            return f"\n  {name} holds DICOM files: crfrefine convert {path} {path}.nii.gz"
        return f"\n  {kind.hint(f'There is {name}, which')}"
    return ""


def is_dicom(path: Path) -> bool:
    """Return whether a file or a folder is DICOM, by its content; a missing one by its name."""
    if not os.path.exists(path):  # noqa: PTH110 - no exception for names that the system refuses
        return path.name.lower().endswith((".dcm", ".dicom", ".ima"))
    return (is_folder(path) or not suffix_of(path)) and recognize(path) == _DICOM


def holds_volumes(folder: Path) -> bool:
    """Return whether a path is a folder with volumes, whatever else lies beside them."""
    with suppress(OSError):
        return any(suffix_of(path) in VOLUME_SUFFIXES for path in folder.iterdir())
    return False


def files_read(path: Path) -> tuple[Path, ...]:
    """Return the file, and the files with its voxels if its header names some."""
    # Reading the file later reports the error with its case; this function also looks at other
    # cases.
    suffix = suffix_of(path)
    if suffix:
        known = FORMAT_OF_SUFFIX[suffix]
        if suffix not in known.voxel_endings and known.misread_names is None:
            return (path,)
    with suppress(Exception), np.errstate(all="ignore"):
        path, known = file_to_read(path)
        try:
            header: VolumeHeader = import_module(known.module).read_header(path)
        except RareHeaderError as rare:  # SimpleITK would convert all voxels.
            return (path, *rare.voxel_files)
        return (path, *header.voxel_files)
    return (path,)


def add_volumes(*paths: Path | None) -> None:
    """Protect input files (`base.inputs`), of a folder all volumes and `dataset.json`."""
    for path in dict.fromkeys(paths):
        if path is None:
            continue
        if not is_folder(path):
            add_inputs(*files_read(path))
            continue
        with suppress(OSError):
            for file in path.iterdir():
                if suffix_of(file) or file.name == "dataset.json":
                    add_inputs(file)
