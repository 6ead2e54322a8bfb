"""The files that a text header names for its voxels: one, a list, or a pattern with a running number."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from crfrefine.errors import InputError, UnsupportedFormatError
from crfrefine.io.text_header import Fields, shown, whole_number

MAX_FILES = 1 << 16
OUTSIDE_FILES = "CRFREFINE_OUTSIDE_FILES"

# One running number such as %d or %03d, then its first value, its last value and its step.
_PATTERN = re.compile(r"([^%]*)%(0?)(\d{0,2})d([^%\s]*)((?:\s+\S+){0,4})", re.ASCII)


def is_pattern(name: str) -> bool:
    """Return whether a name means several files, here or in other programs."""
    return "%" in name


def pattern_names(fields: Fields, key: str, sizes: tuple[int, ...], *, with_dims: bool) -> list[str]:
    """Return the names of a pattern such as `slice%03d.raw 1 40 1`; a fourth number is how many dimensions each has, in NRRD.

    Raises:
        UnsupportedFormatError: anything but one `%d` or `%0Nd`, or a wrong number of files.
    """
    expected = "one running number such as %03d, then its first value, last value and step" + (", and a dimension" if with_dims else "")
    match = _PATTERN.fullmatch(fields.text(key))
    words = match[5].split() if match else []
    numbers = [whole_number(word) for word in words]
    if match is None or None in numbers or len(words) > 3 + with_dims or (with_dims and len(words) < 3):
        raise fields.damaged(key, expected)
    given = [number for number in numbers if number is not None]
    dims = given[3] if len(given) > 3 else len(sizes) - 1
    num_files = number_of_files(fields, key, sizes, dims)
    first = given[0] if given else 1
    step = given[2] if len(given) > 2 else 1
    last = given[1] if len(given) > 1 else first + num_files - 1
    if first < 0 or step == 0 or (last - first) // step + 1 != num_files:
        raise fields.damaged(key, f"{num_files} files, as many as its sizes say; {expected}")
    width = int(match[3] or 0)
    return [f"{match[1]}{number:{match[2]}{width}d}{match[4]}" for number in range(first, first + num_files * step, step)]


def number_of_files(fields: Fields, key: str, sizes: tuple[int, ...], dims: int) -> int:
    """Return how many files of `dims` dimensions make up the volume; raise for no file, or absurdly many."""
    if not 1 <= dims <= len(sizes):
        raise fields.damaged(key, f"files of 1 to {len(sizes)} dimensions")
    num_files = math.prod(sizes[dims:])
    if num_files > MAX_FILES:
        raise fields.damaged(key, f"at most {MAX_FILES} files of voxels, its sizes ask for {num_files:.4g}")
    return num_files


def voxel_path(header_path: Path, name: str) -> Path:
    """Return the file that a header names, relative to its folder; InputError if CRFREFINE_OUTSIDE_FILES forbids a file outside."""
    path = header_path.parent / name
    rule = os.environ.get(OUTSIDE_FILES, "allow")
    if rule not in ("allow", "refuse"):
        raise InputError(f"environment variable {OUTSIDE_FILES}: expected allow or refuse, found {shown(rule)!r}")
    if rule == "refuse":
        folders = {header_path.parent.resolve(), header_path.resolve().parent}
        if not any(folder in _resolved(path, header_path).parents for folder in folders):
            raise InputError(
                f"{header_path}: its voxels are in {shown(str(path), 200)}, outside its folder, and {OUTSIDE_FILES} is set to refuse"
            )
    return path


def require_listed(header_path: Path, expected: int, found: int) -> None:
    """Raise UnsupportedFormatError if a header does not list as many files as its sizes require."""
    if found != expected:
        raise UnsupportedFormatError(
            f"{header_path}: its header promises {expected} files of voxels, it lists {found}; copy or export it again"
        )


def _resolved(path: Path, header_path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        raise InputError(f"{header_path}: its voxels are missing; expected them in {shown(str(path), 400)}") from None
