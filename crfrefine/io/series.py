"""Folders that are volumes: DICOM series, with one file per slice."""

from __future__ import annotations

import os
from pathlib import Path

from crfrefine.io.dicom_files import is_image
from crfrefine.io.paths import LABELS_SUFFIXES, LOGITS_SUFFIXES, suffix_of
from crfrefine.io.streams import START_BYTES, read_start

_MOST_LOOKED_AT = 32


def is_series(path: Path) -> bool:
    """Return whether a folder holds DICOM slices, and no volume of another format; a few files are looked into."""
    try:
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file())
    except (OSError, ValueError):
        return False
    if any(suffix_of(Path(name)) in set(LOGITS_SUFFIXES) - set(LABELS_SUFFIXES) for name in names):
        return False
    return any(is_image(read_start(path / name, START_BYTES)) for name in names[:_MOST_LOOKED_AT])


def list_series(folder: Path) -> list[Path]:
    """Return the folders of DICOM slices in a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
    return [folder / name for name in names if is_series(folder / name)]
