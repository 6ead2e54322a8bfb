"""The error for DICOM that is given to a command other than `convert`: it prints the commands that do the same."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from crfrefine.errors import InputError

_COMMANDS = ("infer", "train-crf", "evaluate", "tune", "info")
_OUTPUTS = ("-o", "--output")


def refuse_dicom(arguments: Sequence[str]) -> None:
    """Raise InputError if one of the arguments of a command is a DICOM file, or a folder of them."""
    if not arguments or arguments[0] not in _COMMANDS:
        return
    from crfrefine.io.paths import VOLUME_SUFFIXES
    from crfrefine.io.recognition import is_dicom

    command, *values = (value for text in arguments for value in (text.split("=", 1) if text.startswith("--") else [text]))
    dicom = [value for value in values if not value.startswith("-") and is_dicom(Path(value))]
    if not dicom:
        return
    output = next((value for option, value in pairwise(values) if option in _OUTPUTS), "")
    inputs = list(dict.fromkeys(value for value in dicom if value != output))
    series = next((value for value in inputs if Path(value).is_dir()), "SERIES")
    lines = []
    for value in inputs:
        like = ["--like", series] if command in ("infer", "evaluate") and not Path(value).is_dir() else []
        lines.append(["convert", value, _nifti(value), *like])
    lines.append([command, *(_nifti(value) if value in dicom else value for value in values)])
    if command == "infer" and output:
        name = Path(_nifti(inputs[0] if inputs else output)).name
        refined = _nifti(output) if output in dicom else output
        refined = refined if refined.endswith(VOLUME_SUFFIXES) else str(Path(refined) / name)
        segmentations = [value for value in inputs if not Path(value).is_dir()]
        described = ["--segments", segmentations[0]] if segmentations else []
        lines.append(["convert", refined, f"{_without_suffix(refined)}.dcm", "--like", series, *described])
    shown = "\n".join(f"  {shlex.join(['crfrefine', *line])}" for line in lines)
    raise InputError(f"{dicom[0]}: is DICOM, which only `convert` reads and writes; run\n{shown}")


def _nifti(path: str) -> str:
    return f"{_without_suffix(path)}.nii.gz"


def _without_suffix(path: str) -> str:
    path = path.rstrip("/")
    suffixes = (".dcm", ".dicom", ".ima", ".nii.gz", ".nii", ".mha", ".nrrd")
    return next((path[: -len(suffix)] for suffix in suffixes if path.lower().endswith(suffix)), path)
