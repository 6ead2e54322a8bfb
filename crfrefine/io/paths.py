"""File names: which suffix means which format, and what is left of a name without it."""

from __future__ import annotations

from pathlib import Path

from crfrefine.errors import InputError, UnsupportedFormatError

NIFTI = (".nii.gz", ".nii")
METAIMAGE = (".mhd", ".mha")
NRRD = (".nrrd", ".nhdr")
NPZ = (".npz",)
VOLUME_SUFFIXES = NIFTI + METAIMAGE + NRRD
LOGITS_SUFFIXES = VOLUME_SUFFIXES + NPZ


def suffix_of(path: Path) -> str:
    """Return the suffix that names the format, such as ".nii.gz", or "" for a name that none of the formats has."""
    name = path.name.lower()
    return next((suffix for suffix in LOGITS_SUFFIXES if name.endswith(suffix)), "")


def stem_of(path: Path) -> str:
    """Return the file's name without the suffix of its format."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def written_voxel_file(path: Path) -> Path | None:
    """Return the file beside a text header that its voxels are written to; None for the formats of one file."""
    ending = {".mhd": ".zraw", ".nhdr": ".raw.gz"}.get(suffix_of(path))
    return None if ending is None else path.with_name(stem_of(path) + ending)


def require_suffix(path: Path, suffixes: tuple[str, ...] = LOGITS_SUFFIXES) -> str:
    """Return the suffix of the format, or raise UnsupportedFormatError where it is not one of `suffixes`."""
    suffix = suffix_of(path)
    if suffix not in suffixes:
        raise UnsupportedFormatError(f"{path}: unknown file type; expected one of {', '.join(suffixes)}")
    return suffix


def require_file(path: Path) -> None:
    """Raise InputError where there is no file to read, with the reason."""
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:
        raise cannot_read(path, error) from error
    if is_folder:
        raise InputError(f"{path}: expected a file, this is a folder")
    if not is_there:
        raise InputError(f"{path}: no such file")


def cannot_read(path: Path, error: OSError) -> InputError:
    """Return the error to raise where the operating system refuses to read a file."""
    return InputError(f"{path}: cannot be read: {error.strerror or error}")
