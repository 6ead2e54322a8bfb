"""File names: the format of each suffix, and names without their suffix. No file is opened here."""

from __future__ import annotations

from pathlib import Path

from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.formats import FORMATS, Format
from crfrefine.io.streams import cannot_read

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
                    found = next((beside for one in (suffix, suffix.upper()) if (beside := path.with_name(stem + one)).is_file()), None)
                    if found is not None:
                        return found
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
