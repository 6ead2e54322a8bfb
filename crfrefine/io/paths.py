"""The meaning of a path: a file of a format, a folder, or a pattern; and the files it belongs with.

A file is of the kind that its name says, or of that of its first bytes if the name is unknown or
wrong.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from importlib import import_module
from itertools import islice
from pathlib import Path
from stat import S_ISDIR, S_ISREG

import numpy as np

from crfrefine.base.failures import expected_error
from crfrefine.base.inputs import add_inputs
from crfrefine.base.text import shorten, shorten_value
from crfrefine.errors import CrfRefineError, InputError, UnsupportedFormatError
from crfrefine.io.formats import (
    ALL_WRITTEN_SUFFIXES,
    DICOM,
    FOREIGN_KINDS,
    FORMAT_OF_SUFFIX,
    FORMATS,
    HALF,
    LOGITS_SUFFIXES,
    PACKED_HALF,
    PACKED_KINDS,
    SCORES_SUFFIXES,
    VOLUME_SUFFIXES,
    VOXEL_ENDINGS,
    WRITTEN_SUFFIXES,
    ForeignKind,
    Format,
)
from crfrefine.io.streams import GZIP_MAGIC, inflated, read_start
from crfrefine.io.volume import RareHeaderError, VolumeHeader

_MAX_LOOKED_AT = 32


def suffix_of(path: Path) -> str:
    """Return the suffix that names the format, such as ".nii.gz"; "" if it is not known."""
    name = path.name.lower()
    suffixes = [suffix for suffix in LOGITS_SUFFIXES if name.endswith(suffix)]
    return max(suffixes, key=len, default="")


def is_folder(path: Path) -> bool:
    """Return whether an input is a folder of files, which no format takes for one volume."""
    return os.path.isdir(path)  # noqa: PTH112 - no exception for names that the system refuses


def is_pattern(path: Path) -> bool:
    """Return whether a path is a pattern: it has `{` or `*`, and nothing has this very name."""
    text = str(path)
    # os.path.lexists raises no exception for odd names.
    return ("{" in text or "*" in text) and not os.path.lexists(text)


def holds_many(path: Path) -> bool:
    """Return whether an argument names the files of many cases: a folder, or a pattern."""
    return is_folder(path) or is_pattern(path)


def holds_scores_alone(path: Path) -> bool:
    """Return whether the name of a file is that of logits or probabilities without geometry."""
    return suffix_of(path) in SCORES_SUFFIXES


def stem_of(path: Path) -> str:
    """Return the file's name without the suffix of its format, or else without its last ending."""
    suffix = suffix_of(path)
    if suffix:
        return path.name[: len(path.name) - len(suffix)]
    if re.search(PACKED_HALF, path.name, re.IGNORECASE):
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
    beside = [path.with_name(stem_of(path) + ending) for ending in VOXEL_ENDINGS]
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
                return DICOM
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
    kinds = FOREIGN_KINDS
    if start.startswith(GZIP_MAGIC):
        inner = inflated(start)
        if inner is start:
            return None
        start = inner
        kinds = PACKED_KINDS
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
        kind = HALF if is_half else named
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
    return (is_folder(path) or not suffix_of(path)) and recognize(path) == DICOM


def holds_volumes(folder: Path) -> bool:
    """Return whether a path is a folder with volumes, among other files or not."""
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
