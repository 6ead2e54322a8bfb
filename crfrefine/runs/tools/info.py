"""Describe files, folders with the problems of their cases, and the installation."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import crfrefine
from crfrefine import io
from crfrefine.base.failures import Causes, Failure, describe_failure, failing_alone
from crfrefine.base.geometry import describe_grid
from crfrefine.base.limits import available_threads, format_size
from crfrefine.base.text import TIMES, counted, listed
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.volume import VolumeHeader
from crfrefine.runs.cases.case_files import CaseFiles, CaseList
from crfrefine.runs.cases.case_headers import read_case_headers
from crfrefine.runs.cases.dataset_description import read_descriptions
from crfrefine.runs.cases.discovery import case_folders, discover_cases, list_files
from crfrefine.runs.cases.nnunet import find_cases_to_refine, is_of_nnunet
from crfrefine.runs.cases.reading_options import ReadingOptions, find_regions

_MAX_LISTED_VALUES = 32
# Folders of a data set.
_NAMED = ("images", "imagesTr", "imagesTs", "labels", "labelsTr", "labelsTs", "logits", "masks")


@dataclass(frozen=True)
class FolderReport:
    """The cases of a folder."""

    path: Path
    cases: dict[str, str] = field(default_factory=dict)  # name and a line about it: modalities, grid, labels, other files
    notes: list[str] = field(default_factory=list)  # on ignored files
    problems: list[Failure] = field(default_factory=list)  # only the first of each cause is in full


def describe_header(header: VolumeHeader, *, values: bool = False) -> list[tuple[str, str]]:
    """Describe a volume, as pairs of name and value for display; with `values`, also ranges of channels, or counts of labels."""
    lines = [
        ("format", header.format),
        ("shape", TIMES.join(str(size) for size in header.grid_shape)),
        ("channels", str(header.num_channels)),
        ("type", header.dtype),
        ("spacing", "none in this format" if header.spacing is None else TIMES.join(f"{step:.6g}" for step in header.spacing) + " mm"),
    ]
    if header.affine is not None:
        first = ", ".join(f"{value:.6g}" for value in header.affine[:3, 3])
        lines += [("orientation", f"{header.orientation}"), ("first voxel", f"({first}) mm in RAS+")]
    names = {segment.label: f"{segment.label} {segment.name}" for segment in header.segments}
    lines += [*header.details, *([("labels", listed(names.values(), _MAX_LISTED_VALUES))] if names else [])]
    lines += [("note", note) for note in header.notes]
    return [*lines, *(_describe_values(header, names) if values else [])]


def _describe_values(header: VolumeHeader, names: Mapping[int, str]) -> list[tuple[str, str]]:
    """Return the ranges of channels, and how often each value occurs: of a few whole numbers, or of labels with names."""
    values = io.read_channels(header)
    lines = []
    for number, channel in enumerate(values):
        name = "values" if len(values) == 1 else f"values, channel {number}"
        lines.append((name, f"{float(channel.min()):.6g} to {float(channel.max()):.6g}, mean {float(channel.mean(dtype='f8')):.6g}"))
    if len(values) > 1:
        return lines
    numbers, counts = np.unique(values, return_counts=True)
    if (len(numbers) <= _MAX_LISTED_VALUES or names) and (numbers == np.rint(numbers)).all():
        pairs = zip(numbers.tolist(), counts.tolist(), strict=True)
        lines.append(("voxels", ", ".join(f"{names.get(int(number), int(number))}: {count}" for number, count in pairs)))
    return lines


def inspect_folder(folder: str | Path, *, resample: str | None = None) -> FolderReport:
    """Describe the cases of a folder: images in nnU-Net's naming, with logits or labels, or a folder with `images` and more.

    Beside `images` (or `imagesTr`, `imagesTs`), `logits`, `masks` and `labels` (or `labelsTr`, `labelsTs`) in it are read too. A folder of
    nnU-Net's predictions, or of a trained network, has the cases that `infer --nnunet` would refine.
    """
    folder = Path(folder)
    report = FolderReport(folder)
    try:
        of_nnunet = is_of_nnunet(folder)
        structures = {} if of_nnunet or list_files(folder, io.VOLUME_SUFFIXES) else case_folders(folder)
        if structures and not structures.keys() & set(_NAMED):
            _describe_structures(report, structures)
            return report
        cases = find_cases_to_refine(folder, (), None) if of_nnunet else _discover(folder)
    except CrfRefineError as error:
        return FolderReport(folder, problems=[describe_failure(error)])
    report.notes.extend(cases.notes)
    places = [folder] if of_nnunet else [path.parent for files in cases[:1] for path in (*files.logits[:1], *files.images[:1])]
    regions, causes = find_regions(None, read_descriptions(places or [folder], report.notes)), Causes()
    if regions.problem:
        report.problems.append(describe_failure(InputError(regions.problem)))
    by_number: dict[int, list[str]] = {}

    def fail(files: CaseFiles, failure: Failure) -> None:
        message = f"case {files.case_id!r}: {failure.message}" if failure.traceback else "; ".join([failure.message, *files.missing[1:]])
        is_new = causes.is_new(files.case_id, message)
        report.problems.append(replace(failure, message=message if is_new else message.partition("\n")[0]))

    for files in cases:
        with failing_alone(partial(fail, files), *files.images, *files.logits):
            headers = read_case_headers(files, ReadingOptions(regions=regions, resample=resample))
            image = headers.images[0]
            parts = [f"{headers.num_modalities} modalit{'y' if headers.num_modalities == 1 else 'ies'}"]
            parts.append(describe_grid(image.grid_shape, image.affine))
            if headers.logits is not None:
                number = headers.logits.num_labels
                by_number.setdefault(number, []).append(files.case_id)
                is_regions = regions.declares(number) and number != regions.num_labels
                parts.append(counted(number, "region" if is_regions else "label") if number else "label map for logits")
            parts += [what for what, header in (("mask", headers.mask), ("reference", headers.labels)) if header is not None]
            if elsewhere := [header.path.name for header in headers.companions if not image.on_same_grid(header)]:
                parts.append(f"{listed(elsewhere, 3)} on another grid")
            report.cases[files.case_id] = ", ".join([*parts, *headers.notes])
    if len(by_number) > 1:
        groups = "; ".join(f"{number or 'a label map'} of {listed(names)}" for number, names in sorted(by_number.items()))
        report.problems.append(describe_failure(InputError(f"cases have different numbers of labels: {groups}")))
    return report


def _describe_structures(report: FolderReport, structures: dict[str, Path]) -> None:
    """Describe a folder that holds nothing but folders of binary files."""
    folder = report.path
    of_images = f" and -i {folder}" if any(path != folder / case_id for case_id, path in structures.items()) else ""
    report.notes.append(f"{folder}: one binary file per structure; refine them with -p {folder}{of_images} and --input-type labels")
    for case_id, path in structures.items():
        files = list_files(path, io.VOLUME_SUFFIXES)
        with failing_alone(report.problems.append, *files):
            header = io.read_header(files[0])
            report.cases[case_id] = f"{counted(len(files), 'structure')}, {describe_grid(header.grid_shape, header.affine)}"


def _discover(folder: Path) -> CaseList:
    """Find the cases of a folder of images, or of one with `images` and more."""
    inside = {name: folder / name for name in _NAMED if (folder / name).is_dir()}
    images = next((inside[name] for name in _NAMED[:3] if name in inside), None)
    if images is None:
        return discover_cases(folder, None)
    labels = inside.get("labels", inside.get("labelsTs" if images.name == "imagesTs" else "labelsTr"))
    return discover_cases(images, inside.get("logits"), inside.get("masks"), labels, include_imageless=True)


def installation() -> dict[str, str]:
    """Return names and texts, in the order of display. Nothing is raised: an engine that does not run says why."""
    from crfrefine.engines import get_backend
    from crfrefine.engines.compiled import find_levels

    shown = {"version": f"crfrefine {crfrefine.__version__}, Python {platform.python_version()}, {platform.platform()}"}
    try:
        cpu: Any = get_backend("cpu")
        levels = find_levels()
        shown["engine"] = f"{cpu.level}; compiled for {', '.join(levels.built)}; this processor runs {levels.processor}"
    except CrfRefineError as error:
        shown["engine"] = str(error)
    try:
        gpu: Any = get_backend("cuda")
        properties = gpu.device.properties()
        shown["GPU"] = f"{properties['name']}, {format_size(properties['memory'])}"
    except CrfRefineError as error:
        shown["GPU"] = str(error)
    shown["threads"] = f"{available_threads()}, of {os.cpu_count()} cores"
    try:
        lines = metadata.requires("crfrefine") or []
    except metadata.PackageNotFoundError:
        return {**shown, "extras": "not known, as crfrefine is not installed: pip install it"}
    extras: dict[str, list[str]] = {}
    for match in filter(None, (re.match(r"([\w.-]+).*\bextra == ['\"]([\w-]+)['\"]", line) for line in lines)):
        if match[1] != "crfrefine":
            extras.setdefault(match[2], []).append(match[1])
    for extra, packages in extras.items():
        try:
            shown[extra] = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
        except metadata.PackageNotFoundError as error:
            shown[extra] = f"{error.name} is not installed: pip install 'crfrefine[{extra}]'"
    return shown
