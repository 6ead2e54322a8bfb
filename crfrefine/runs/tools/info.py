"""Describe files, folders with the problems of their cases, and the installation."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import crfrefine
from crfrefine import io
from crfrefine.arrays.probabilities import TOLD_SUM_TOLERANCE, look_at
from crfrefine.base.array_types import Float32
from crfrefine.base.failures import Causes, Failure, describe_failure, failing_alone
from crfrefine.base.geometry import describe_grid
from crfrefine.base.limits import available_threads, format_size
from crfrefine.base.text import TIMES, counted, listed
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.paths import SCORES_SUFFIXES
from crfrefine.io.stored import Scaling
from crfrefine.io.volume import VolumeHeader
from crfrefine.runs.cases.case_files import CaseFiles, CaseList
from crfrefine.runs.cases.case_headers import read_case_headers
from crfrefine.runs.cases.dataset_description import read_descriptions
from crfrefine.runs.cases.discovery import case_folders, discover_cases, list_files
from crfrefine.runs.cases.nnunet import find_cases_to_refine, is_of_nnunet
from crfrefine.runs.cases.reading_options import (
    NO_REGIONS,
    ReadingOptions,
    RegionReading,
    find_regions,
)
from crfrefine.runs.tools.content import is_label_map

_MAX_LISTED_VALUES = 32
_FOREGROUND = "one channel for label 1"
# Folders of a data set.
_NAMED = ("images", "imagesTr", "imagesTs", "labels", "labelsTr", "labelsTs", "logits", "masks")


# The cases of a folder: name and a line about it, with modalities, grid, labels and other files;
# notes on ignored files; and problems, of which only the first of each cause is in full.
FolderReport = tuple[dict[str, str], list[str], list[Failure]]


def describe_header(header: VolumeHeader, *, values: bool = False) -> list[tuple[str, str]]:
    """Describe a volume, as pairs of name and value for display.

    With `values`, also ranges of channels, or counts of labels.
    """
    lines = [
        ("format", header.format),
        ("shape", TIMES.join(str(size) for size in header.grid_shape)),
        ("channels", str(header.num_channels)),
        ("type", header.dtype),
        (
            "spacing",
            "none in this format"
            if header.spacing is None
            else TIMES.join(f"{step:.6g}" for step in header.spacing) + " mm",
        ),
    ]
    if header.affine is not None:
        first = ", ".join(f"{value:.6g}" for value in header.affine[:3, 3])
        lines += [
            ("orientation", f"{header.orientation}"),
            ("first voxel", f"({first}) mm in RAS+"),
        ]
    scaling = Scaling.of(header)
    if not scaling.is_none:
        lines.append(("scaling", f"values are {scaling}"))
    names = {segment.label: f"{segment.label} {segment.name}" for segment in header.segments}
    lines += [
        *header.details,
        *([("labels", listed(names.values(), _MAX_LISTED_VALUES))] if names else []),
    ]
    lines += [("note", note) for note in header.notes]
    if values:
        if header.num_channels == 1:
            content = "label map" if is_label_map(header) else "image"
            lines.append(("content", f"{content}, as convert takes it"))
        lines += _describe_values(header, names)
    return lines


def _describe_values(header: VolumeHeader, names: Mapping[int, str]) -> list[tuple[str, str]]:
    """Return the ranges of channels, and how often each value occurs: of a few whole numbers, or of labels with names."""
    # NaN is allowed in images, of which most have one channel, and not in logits, which have more.
    nan_files: list[Path] | None = [] if header.num_channels == 1 else None
    values = io.read_channels(header, nan_files=nan_files)
    if nan_files:
        return _describe_with_nan(values)
    lines = []
    for number, channel in enumerate(values):
        name = "values" if len(values) == 1 else f"values, channel {number}"
        lines.append((name, _describe_range(channel)))
    if len(values) > 1:
        total = look_at(values).scaled_sum
        if total is not None and total > 1 + TOLD_SUM_TOLERANCE:
            lines.append(
                (
                    "sum",
                    f"{total:.4g} at each voxel, as of probabilities in percent or from 0 to 255: not taken for logits",
                )
            )
        return lines
    numbers, counts = np.unique(values, return_counts=True)
    if (len(numbers) <= _MAX_LISTED_VALUES or names) and (numbers == np.rint(numbers)).all():
        pairs = zip(numbers.tolist(), counts.tolist(), strict=True)
        lines.append(
            (
                "voxels",
                ", ".join(
                    f"{names.get(int(number), int(number))}: {count}" for number, count in pairs
                ),
            )
        )
    return lines


def _describe_range(values: Float32) -> str:
    mean = float(values.mean(dtype="f8"))
    return f"{float(values.min()):.6g} to {float(values.max()):.6g}, mean {mean:.6g}"


def _describe_with_nan(values: Float32) -> list[tuple[str, str]]:
    """Return the range of an image's numbers, and how many of its voxels are NaN."""
    numbers = values[~np.isnan(values)]
    num_nan = values.size - numbers.size
    lines = [("NaN", f"{num_nan} of {values.size} voxels")]
    if numbers.size:
        lines.insert(0, ("values", _describe_range(numbers)))
    return lines


def inspect_folder(folder: Path, *, resample: str | None = None) -> FolderReport:
    """Describe the cases of a folder: images in nnU-Net's naming, with logits or labels, or a folder with `images` and more."""
    # Beside `images` (or `imagesTr`, `imagesTs`), `logits`, `masks` and `labels` (or `labelsTr`,
    # `labelsTs`) in it are read too. A folder of nnU-Net's predictions, or of a trained network,
    # has the cases that `infer --nnunet` would refine.
    try:
        of_nnunet = is_of_nnunet(folder)
        cases = CaseList()
        archives = list_files(folder, SCORES_SUFFIXES)
        if of_nnunet:
            try:
                cases = find_cases_to_refine(folder, (), None)
                archives = []
            except InputError as error:  # There is no image for its archives.
                if not archives:
                    raise
                cases = CaseList(notes=[str(error).partition("\n")[0]])
        elif list_files(folder, io.VOLUME_SUFFIXES):
            cases = _discover(folder)
            archives = []
        elif (structures := case_folders(folder)) and not structures.keys() & set(
            _NAMED
        ):  # nothing but folders of structures
            return _inspect_structures(folder, structures)
        elif not archives:
            cases = _discover(folder)
    except CrfRefineError as error:
        return {}, [], [describe_failure(error)]
    notes = list(cases.notes)
    if of_nnunet:
        places = [folder]
    else:
        places = [
            path.parent for files in cases[:1] for path in (*files.logits[:1], *files.images[:1])
        ]
    lines = dict[str, str]()
    problems = list[Failure]()
    causes = Causes()
    regions = NO_REGIONS
    with failing_alone(problems.append):
        regions = find_regions(None, list(read_descriptions(places or [folder])))
    if regions.problem:
        problems.append(describe_failure(InputError(regions.problem)))
    num_labels: dict[str, int] = {}
    remarks: dict[str, list[str]] = {}

    def fail(files: CaseFiles, failure: Failure) -> None:
        if failure.traceback:
            message = f"case {files.case_id!r}: {failure.message}"
        else:
            message = "; ".join([failure.message, *files.missing[1:]])
        is_new = causes.is_new(files.case_id, message)
        problems.append(replace(failure, message=message if is_new else message.partition("\n")[0]))

    for path in archives:  # logits without geometry
        with failing_alone(problems.append, path):
            header = io.read_header(path)
            name = io.stem_of(path)
            is_alone = header.num_channels == 1 and not regions.declares(1)
            regions.require_number(header.num_channels, path, lacks_background=is_alone)
            num_labels[name] = header.num_channels + is_alone
            what = _FOREGROUND if is_alone else _channels(header.num_channels, regions)
            lines[name] = f"{what}, {describe_grid(header.grid_shape, header.affine)}"
    for files in cases:
        with failing_alone(partial(fail, files), *files.images, *files.logits):
            headers = read_case_headers(files, ReadingOptions(regions=regions, resample=resample))
            image = headers.images[0]
            parts = [
                f"{headers.num_modalities} modalit{'y' if headers.num_modalities == 1 else 'ies'}"
            ]
            parts.append(describe_grid(image.grid_shape, image.affine))
            if headers.logits is not None:
                num_labels[files.case_id] = headers.logits.num_labels
                parts.append(_describe_network(headers.logits, regions))
            parts += [
                what
                for what, header in (("mask", headers.mask), ("reference", headers.labels))
                if header is not None
            ]
            if elsewhere := [
                header.path.name for header in headers.companions if not image.on_same_grid(header)
            ]:
                parts.append(f"{listed(elsewhere, 3)} on another grid")
            lines[files.case_id] = ", ".join([*parts, *headers.notes])
            for modality in headers.images:
                for remark in modality.notes:
                    remarks.setdefault(remark, []).append(modality.path.name)
    notes += [f"{listed(names, 3)}: {remark}" for remark, names in remarks.items()]
    usual = max(num_labels.values(), key=list(num_labels.values()).count, default=0)
    for case_id, number in num_labels.items():
        own, others = (
            f"logits of {counted(count, 'label')}" if count else "a label map"
            for count in (number, usual)
        )
        if number != usual:
            problems.append(
                describe_failure(
                    InputError(f"case {case_id!r}: has {own}, most cases have {others}")
                )
            )
    return lines, notes, problems


def _describe_network(network: io.LogitsHeader, regions: RegionReading) -> str:
    if network.lacks_background:
        return _FOREGROUND
    if network.num_labels:
        return _channels(network.num_labels, regions)
    return "label map for logits"


def _channels(number: int, regions: RegionReading) -> str:
    is_regions = regions.declares(number) and number != regions.num_labels
    return counted(number, "region" if is_regions else "label")


def _inspect_structures(folder: Path, structures: dict[str, Path]) -> FolderReport:
    if any(path != folder / case_id for case_id, path in structures.items()):
        of_images = f" and -i {folder}"
    else:
        of_images = ""
    notes = [
        f"{folder}: one binary file per structure; refine them with -p {folder}{of_images} and --input-type labels"
    ]
    lines = dict[str, str]()
    problems = list[Failure]()
    for case_id, path in structures.items():
        files = list_files(path, io.VOLUME_SUFFIXES)
        with failing_alone(problems.append, *files):
            header = io.read_header(files[0])
            lines[case_id] = (
                f"{counted(len(files), 'structure')}, {describe_grid(header.grid_shape, header.affine)}"
            )
    return lines, notes, problems


def _discover(folder: Path) -> CaseList:
    inside = {name: folder / name for name in _NAMED if (folder / name).is_dir()}
    images = next((inside[name] for name in _NAMED[:3] if name in inside), None)
    if images is None:
        try:
            return discover_cases(folder, None)
        except InputError as error:
            raise InputError(
                f"{error}\n  Looked for images in it, and in {listed(_NAMED[:3])}; name the folder of the images."
            ) from None
    labels = inside.get(
        "labels", inside.get("labelsTs" if images.name == "imagesTs" else "labelsTr")
    )
    cases = discover_cases(
        images, inside.get("logits"), inside.get("masks"), labels, include_imageless=True
    )
    if "logits" not in inside:
        cases.notes.append(
            f"{folder}: no case has logits: there is no folder {folder / 'logits'}, which train-crf needs"
        )
    return cases


def installation() -> dict[str, str]:
    """Return names and texts, in the order of display.

    Nothing is raised: an engine that does not run says why.
    """
    from crfrefine.engines import get_backend
    from crfrefine.engines.compiled import find_levels

    shown = {
        "version": f"crfrefine {crfrefine.__version__}, Python {platform.python_version()}, {platform.platform()}"
    }
    try:
        cpu: Any = get_backend("cpu")
        levels = find_levels()
        shown["engine"] = (
            f"{cpu.level}; compiled for {', '.join(levels.built)}; this processor runs {levels.processor}"
        )
    except CrfRefineError as error:
        shown["engine"] = str(error)
    try:
        gpu: Any = get_backend("cuda")
        properties = gpu.device.properties()
        shown["GPU"] = f"{properties['name']}, {format_size(properties['memory'])}"
    except CrfRefineError as error:
        shown["GPU"] = str(error)
    shown["threads"] = f"{available_threads()}: the machine has {os.cpu_count()} cores"
    try:
        lines = metadata.requires("crfrefine") or []
    except metadata.PackageNotFoundError:
        return {**shown, "extras": "not known, as crfrefine is not installed: pip install it"}
    extras: dict[str, list[str]] = {}
    for match in filter(
        None, (re.match(r"([\w.-]+).*\bextra == ['\"]([\w-]+)['\"]", line) for line in lines)
    ):
        if match[1] != "crfrefine":
            extras.setdefault(match[2], []).append(match[1])
    for extra, packages in extras.items():
        try:
            shown[extra] = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
        except metadata.PackageNotFoundError as error:
            shown[extra] = f"{error.name} is not installed: pip install 'crfrefine[{extra}]'"
    return shown
