"""Answers to what is no longer done: commands and options that are gone, and DICOM outside of `convert`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from crfrefine.errors import InputError

GONE = {
    "--allow-mismatched-dicom": "`--allow-mismatched-dicom` is gone: `crfrefine convert` reads DICOM, and no other command does",
    "describe": "`describe` is gone: `crfrefine COMMAND --help` lists the options of a command",
    "bids": "`bids` is gone: the script examples/bids.py refines a BIDS dataset with `crfrefine infer --manifest`",
    "doctor": "`doctor` is gone: `crfrefine info` without a file shows what is installed",
    "--continue": "`--continue` is gone from evaluate, which measures all cases again",
    "--resume": "`--resume` is gone from evaluate, which measures all cases again",
    "--max-minutes": "`--max-minutes` is gone: a training takes minutes; stop it with Ctrl-C, and --resume takes the finished folds",
    "--case-timeout": "`--case-timeout` is gone: a batch system, or `timeout`, limits the time of a run, and --continue does the rest",
    "--dask": "`--dask` is gone from this command, which runs on this machine; only infer takes it",
    "--workers": "`--workers` is gone: start a Dask scheduler and workers and give its address with --dask",
    "--summary FILE.jsonl": "a summary of JSON lines is gone: OUTPUT/.crfrefine/record.jsonl gets a line as each case ends",
    "cuda:all": "several GPUs are gone: run one `infer --device cuda:N` per GPU with --num-parts and --part-id",
}
"""Name of the command or option, such as "describe" or "--workers", to the sentence that its user gets."""

_COMMANDS = ("infer", "train-crf", "evaluate", "tune", "info")
_OUTPUTS = ("-o", "--output")


def refuse_dicom(arguments: Sequence[str]) -> None:
    """Raise InputError if one of the arguments of a command is a DICOM file, or a folder of them."""
    if not arguments or arguments[0] not in _COMMANDS:
        return
    from crfrefine.io.paths import VOLUME_SUFFIXES, is_dicom

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
