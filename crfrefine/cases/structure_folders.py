"""Tell folders that hold one binary file per structure from folders of cases."""

from __future__ import annotations

import os
from pathlib import Path

from crfrefine.cases.discovery import list_files
from crfrefine.io.paths import VOLUME_SUFFIXES


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
