"""Tell folders that hold one binary file per structure from folders of cases."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crfrefine import io
from crfrefine.cases.discovery import list_files
from crfrefine.errors import CrfRefineError
from crfrefine.io.paths import VOLUME_SUFFIXES, stem_of

_FEWEST = 3
"""Fewer files on one grid are rather label maps of cases."""

_MAX_READ = 8
"""Most files whose voxels are looked at to tell structures from cases."""

_MAX_OVERLAP = 0.2
"""Structures share fewer of their voxels; masks of one organ in several registered cases share more."""


def is_nested(folder: Path) -> bool:
    """Return whether a folder holds no volumes, but folders of them."""
    return not list_files(folder, VOLUME_SUFFIXES) and bool(case_folders(folder))


def case_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of volumes in a folder, by the name of the case."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    folders = {name: structures_folder(folder / name) for name in names}
    return {name: path for name, path in folders.items() if list_files(path, VOLUME_SUFFIXES)}


def structures_folder(own: Path) -> Path:
    """Return where the structures of a case are: its folder, or `segmentations` in it, as in TotalSegmentator's data sets."""
    inner = own / "segmentations"
    return inner if inner.is_dir() else own


def looks_like_structures(folder: Path) -> bool:
    """Return whether the files of a folder are most likely the structures of one case.

    They are binary, on one grid, hardly overlap, and their names are not one name with different numbers. All headers are read, and the
    voxels of a few files.
    """
    files = list_files(folder, VOLUME_SUFFIXES)
    patterns = {re.sub(r"[0-9]+", "#", stem_of(file)) for file in files}
    if len(files) < _FEWEST or (folder / "dataset.json").exists() or len(patterns) < max(2, len(files) / 3):
        return False
    try:
        headers = [io.read_header(file) for file in files]
        first = headers[0]
        if any(header.num_channels > 1 or not first.on_same_grid(header) for header in headers):
            return False
        steps = range(0, len(headers), -(-len(headers) // _MAX_READ))
        return _hardly_overlap([headers[number].path for number in steps])
    except CrfRefineError:
        return False  # Measuring it reports the error.


def _hardly_overlap(paths: Sequence[Path]) -> bool:
    """Return whether files are binary and share few voxels, if any."""
    seen: NDArray[np.bool_] | None = None
    shared = total = 0
    for path in paths:
        values = io.read_volume(path).data
        inside = values == 1
        if not ((values == 0) | inside).all():
            return False
        seen = np.zeros_like(inside) if seen is None else seen
        shared += int(np.count_nonzero(inside & seen))
        total += int(np.count_nonzero(inside))
        seen |= inside
    return total > 0 and shared <= _MAX_OVERLAP * total
