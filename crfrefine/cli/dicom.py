"""Advice for users who name DICOM where volumes are read: only `convert` reads DICOM."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crfrefine.errors import InputError

_DICOM = r"\.(dcm|dicom|ima)$"
_READ_VOLUMES = ("infer", "train-crf", "evaluate", "tune")
_OUTPUTS = ("output", "summary", "corrections")


def refuse_dicom(command: str | None, values: Mapping[str, Any]) -> None:
    """Raise InputError if an input of a command is a DICOM file, or a folder of them.

    `values` are those of its parameters, also in lists and pairs. The error names the commands to
    run.
    """
    if command not in _READ_VOLUMES:
        return
    pending = [value for name, value in values.items() if name not in _OUTPUTS]
    while pending:
        path = pending.pop(0)
        if isinstance(path, list | tuple):
            pending[:0] = path
        if not isinstance(path, Path):
            continue
        is_there = os.path.exists(path)  # noqa: PTH110 - no exception for names that are too long
        if not is_there and not is_named_dicom(path):
            continue
        from crfrefine.io.formats import STRUCTURES
        from crfrefine.io.paths import holds_volumes, is_dicom, recognize, suffix_of

        if suffix_of(path) and not path.is_dir():  # Reading this file shows its format.
            continue
        if recognize(path) is STRUCTURES:
            raise InputError(f"{path}: {STRUCTURES.hint('it')}")
        if not is_dicom(path) or holds_volumes(path):
            continue
        volume = re.sub(_DICOM, ".nii.gz", str(path), flags=re.IGNORECASE)
        if volume == str(path):
            volume += ".nii.gz"
        convert = ["crfrefine", "convert", str(path), volume]
        if not path.is_dir():
            convert += ["--like", "SERIES"]
        raise InputError(
            f"{path}: is DICOM; only `convert` reads and writes DICOM. Run\n"
            f"  {shlex.join(convert)}\n"
            "  and name its output here. `crfrefine convert REFINED.nii.gz REFINED.dcm "
            "--like SERIES` makes DICOM of a result."
        )


def is_named_dicom(path: str | Path) -> bool:
    """Return whether a name ends like that of a DICOM file."""
    return re.search(_DICOM, str(path), re.IGNORECASE) is not None
