"""Describe files and folders, with or without reading voxels, and list the problems of a folder's cases."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from crfrefine import io
from crfrefine.arrays.probabilities import TOLD_SUM_TOLERANCE, look_at
from crfrefine.base.failures import Causes, Failure, failing_alone
from crfrefine.base.geometry import describe_grid
from crfrefine.base.text import TIMES, counted, listed
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.discovery import discover_cases, list_files
from crfrefine.cases.nnunet import find_cases_to_refine, is_of_nnunet
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.cases.region_reading import RegionReading, find_regions
from crfrefine.cases.structure_folders import case_folders, structures_folder
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.paths import SCORES_SUFFIXES
from crfrefine.io.volume import VolumeHeader

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from crfrefine.base.array_types import Float32

_MAX_LISTED_VALUES = 32


@dataclass(frozen=True)
class FolderReport:
    """The cases of a folder."""

    path: Path  # The folder.
    cases: dict[str, str] = field(default_factory=dict)  # Case name and a line about it: modalities, grid, labels, other files.
    notes: list[str] = field(default_factory=list)  # Notes on ignored files.
    problems: list[str] = field(default_factory=list)  # One message per problem.
    tracebacks: list[str] = field(default_factory=list)  # Tracebacks of unexpected errors.
    causes: Causes = field(default_factory=Causes, repr=False, compare=False)  # Of the problems; only the first of each is printed in full.

    def fail(self, failure: Failure) -> None:
        """Record the problem of a case."""
        self.problems.append(failure.message)
        if failure.traceback is not None:
            self.tracebacks.append(failure.traceback)


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
        lines.append(("orientation", f"{header.orientation}"))
        lines.append(("first voxel", "(" + ", ".join(f"{value:.6g}" for value in header.affine[:3, 3]) + ") mm in RAS+"))
    lines += header.details
    names = {segment.label: f"{segment.label} {segment.name}" for segment in header.segments}
    if names:
        lines.append(("labels", listed(names.values(), _MAX_LISTED_VALUES)))
    lines += [("note", note) for note in header.remarks]
    if values:
        lines += _describe_values(header, names)
    return lines


def inspect_folder(folder: str | Path, *, resample: bool = False) -> FolderReport:
    """Describe the cases of a folder: images in nnU-Net's naming, with logits or labels, or a folder with `images` and more.

    Beside `images` (or `imagesTr`, `imagesTs`), `logits`, `masks` and `labels` (or `labelsTr`,
    `labelsTs`) in it are read too. A folder of nnU-Net's predictions, or of a trained network, has the
    cases that `infer --nnunet` would refine.
    """
    from crfrefine.cases.case import read_case_headers

    folder = Path(folder)
    try:
        archives = list_files(folder, SCORES_SUFFIXES)
        of_nnunet = is_of_nnunet(folder)
        structures = {} if of_nnunet else _structures(folder)
        if structures:
            return _inspect_structures(folder, structures)
        if of_nnunet:
            cases = _of_nnunet(folder, archives)
            archives = [] if cases else archives
        else:
            # Logits without geometry (.npz), if the folder has no other files.
            archives = [] if list_files(folder, io.VOLUME_SUFFIXES) else archives
            cases = _discover(folder) if not archives else CaseList()
    except CrfRefineError as error:
        return FolderReport(folder, problems=[str(error)])
    notes = list(cases.notes)
    places = [folder] if of_nnunet else [path.parent for files in cases[:1] for path in (*files.logits[:1], *files.images[:1])]
    regions = find_regions(None, places or [folder], notes)
    report = FolderReport(folder, notes=notes, problems=[regions.problem] if regions.problem else [])
    num_labels: dict[int, list[str]] = {}
    told: dict[str, list[str]] = {}
    for path in archives:
        with failing_alone(report.fail, path):
            header = io.read_header(path)
            regions.require_number(header.num_channels, path)
            report.cases[io.stem_of(path)] = f"{_channels(header.num_channels, regions)}, {describe_grid(header.grid_shape, header.affine)}"
            num_labels.setdefault(header.num_channels, []).append(io.stem_of(path))
    for files in cases:
        with failing_alone(partial(_fail_case, report, files), *files.images, *files.logits):
            reading = ReadingOptions(regions=regions, resample=resample)
            headers = read_case_headers(files, reading)
            image = headers.images[0]
            parts = [f"{headers.num_modalities} modalit{'y' if headers.num_modalities == 1 else 'ies'}"]
            parts.append(describe_grid(image.grid_shape, image.affine))
            if headers.logits is not None:
                count = headers.logits.num_labels
                parts.append(_channels(count, regions) if count else "label map for logits")
                num_labels.setdefault(count, []).append(files.case_id)
            parts += [what for what, header in (("mask", headers.mask), ("reference", headers.labels)) if header is not None]
            parts += [f"{header.path.name} on another grid" for header in headers.on_other_grids]
            parts += headers.turnings
            report.cases[files.case_id] = ", ".join(parts)
            for one in headers.images:
                for remark in one.remarks:
                    told.setdefault(remark, []).append(one.path.name)
    report.notes.extend(f"{listed(names, 3)}: {remark}" for remark, names in told.items())
    if len(num_labels) > 1:
        usual = max(num_labels, key=lambda number: len(num_labels[number]))
        report.problems.extend(
            f"case {case_id!r}: logits have {number} labels, those of most cases have {usual}"
            if number and usual
            else f"case {case_id!r}: has {'logits' if number else 'a label map'}, most cases have {'logits' if usual else 'label maps'}"
            for number, case_ids in num_labels.items()
            for case_id in case_ids
            if number != usual
        )
    return report


def _channels(number: int, regions: RegionReading) -> str:
    is_regions = regions.declares(number) and number != regions.num_labels
    return counted(number, "region" if is_regions else "label")


def _of_nnunet(folder: Path, archives: Sequence[Path]) -> CaseList:
    """Return the cases of a folder of nnU-Net; none, with a note, if there is no image for its archives."""
    try:
        return find_cases_to_refine(folder, (), None)
    except InputError as error:
        if not archives:
            raise
        return CaseList(notes=[str(error).partition("\n")[0]])


def _structures(folder: Path) -> dict[str, Path]:
    """Return the folders of structures by case, if the folder holds nothing but such folders."""
    known = {"images", "imagesTr", "imagesTs", "labels", "labelsTr", "logits", "masks"}
    found = {} if list_files(folder, io.VOLUME_SUFFIXES) else case_folders(folder)
    return {} if known & set(found) else found


def _inspect_structures(folder: Path, structures: dict[str, Path]) -> FolderReport:
    of_images = f" and -i {folder}" if any(structures_folder(folder / case_id) != folder / case_id for case_id in structures) else ""
    notes = [f"{folder}: one binary file per structure; refine them with -p {folder}{of_images} and --input-type labels"]
    report = FolderReport(folder, notes=notes)
    for case_id, path in structures.items():
        files = list_files(path, io.VOLUME_SUFFIXES)
        with failing_alone(report.fail, *files):
            header = io.read_header(files[0])
            report.cases[case_id] = f"{counted(len(files), 'structure')}, {describe_grid(header.grid_shape, header.affine)}"
    return report


def _fail_case(report: FolderReport, files: CaseFiles, failure: Failure) -> None:
    message = f"case {files.case_id!r}: {failure.message}" if failure.traceback else "; ".join([failure.message, *files.missing[1:]])
    if not report.causes.is_new(files.case_id, message):
        message = message.partition("\n")[0]
    report.fail(replace(failure, message=message))


def _discover(folder: Path) -> CaseList:
    def inside(*names: str) -> Path | None:
        return next((folder / name for name in names if (folder / name).is_dir()), None)

    images = inside("images", "imagesTr", "imagesTs")
    if images is None:
        try:
            return discover_cases(folder, None)
        except InputError as error:
            raise InputError(
                f"{error}\n  Looked for images in it, and in images, imagesTr and imagesTs; name the folder of the images."
            ) from None
    logits = inside("logits")
    labels = inside("labels", "labelsTs" if images.name == "imagesTs" else "labelsTr")
    cases = discover_cases(images, logits, inside("masks"), labels, include_imageless=True)
    if logits is None:
        cases.notes.append(f"{folder}: no case has logits: there is no folder {folder / 'logits'}, which train-crf needs")
    return cases


def _describe_values(header: VolumeHeader, names: Mapping[int, str]) -> list[tuple[str, str]]:
    values = io.allocate(header)
    io.read_into(header, values)
    lines = []
    for number, channel in enumerate(values):
        name = "values" if len(values) == 1 else f"values, channel {number}"
        lines.append((name, f"{float(channel.min()):.6g} to {float(channel.max()):.6g}, mean {float(channel.mean(dtype='f8')):.6g}"))
    total = look_at(values).scaled_sum if len(values) > 1 else None
    if total is not None and total > 1 + TOLD_SUM_TOLERANCE:
        lines.append(("sum", f"{total:.4g} at each voxel, as of probabilities in percent or from 0 to 255: not taken for logits"))
    if len(values) == 1:
        lines += _count_whole_values(values[0], names)
    return lines


def _count_whole_values(values: Float32, names: Mapping[int, str]) -> list[tuple[str, str]]:
    """Return how often each value occurs, of a few whole numbers or of labels with names."""
    import numpy as np

    found, counts = np.unique(values, return_counts=True)
    if (len(found) > _MAX_LISTED_VALUES and not names) or (found != np.rint(found)).any():
        return []
    return [("voxels", ", ".join(f"{names.get(int(value), int(value))}: {count}" for value, count in zip(found, counts, strict=True)))]
