"""Folders of binary files: the structures of one case, or one label map per case.

TotalSegmentator writes the former, `liver.nii.gz` and others; cases have numbers in their names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from crfrefine import io
from crfrefine.cases.label_input import read_structure
from crfrefine.cases.patterns import list_files
from crfrefine.errors import CrfRefineError
from crfrefine.io.formats import VOLUME_SUFFIXES
from crfrefine.io.paths import stem_of
from crfrefine.io.volume import VolumeHeader

# Structures with a number in their name, as in TotalSegmentator; all others are words.
_NUMBERED = re.compile(
    r"(?:vertebrae?|rib|disc|tooth|phalanx|metacarpal|metatarsal|liver|couinaud|gtv|ctv|ptv)[_\W]"
    r"(?:[a-z]+[_\W])*[a-z]?[0-9]{1,2}"
)
_WORDS = re.compile(r"[^\W\d]{3,}(?:[_\W]+[^\W\d]+)*")
# Names that begin with these words are of cases.
_OF_CASES = re.compile(
    r"(?:case|sub|subj|subject|pat|patient|scan|study|volume|img|image)(?:[_\W]|$)"
)
_MOST_READ = 4  # binary files whose voxels are read to tell


def are_structures(folders: Sequence[Path]) -> bool | None:
    """Return whether folders hold binary files of the structures of one case.

    False means that files are cases: they are on several grids, or no binary files, or all have
    numbers in their names. None means that names do not tell.
    """
    files = []
    for folder in folders:
        if (folder / "dataset.json").exists():
            return False
        files.append({stem_of(path): path for path in list_files(folder, VOLUME_SUFFIXES)})
    names = sorted(set.intersection(*(set(one) for one in files)))
    are_named = [_is_name_of_structure(name) for name in names]
    if len(names) < 2 or not any(are_named):
        return False
    with suppress(CrfRefineError, OSError):
        headers = [io.read_header(one[name]) for one in files for name in names]
        if _are_binary(headers):
            return True if all(are_named) else None
    return False


def _is_name_of_structure(name: str) -> bool:
    lowered = name.lower()
    if _OF_CASES.match(lowered):
        return False
    return bool(_WORDS.fullmatch(lowered) or _NUMBERED.fullmatch(lowered))


def _are_binary(headers: Sequence[VolumeHeader]) -> bool:
    """Return whether files are on one grid, and those that are looked at have 0 and 1 alone."""
    first = headers[0]
    for header in headers:
        if header.num_channels != 1 or header.kind is not None or not first.on_same_grid(header):
            return False
    step = max(1, len(headers) // _MOST_READ)
    for header in headers[::step]:
        with suppress(CrfRefineError):
            read_structure(header)
            continue
        return False
    return True
