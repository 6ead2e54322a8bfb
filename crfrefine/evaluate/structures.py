"""Find and read folders that hold one binary file per structure: each is one case, whose labels have the names of the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from crfrefine import io
from crfrefine.arrays.label_maps import foreground_labels
from crfrefine.errors import InputError
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.io.paths import VOLUME_SUFFIXES, require_file, stem_of
from crfrefine.io.reading import require_scalar
from crfrefine.io.volume import Volume, VolumeHeader
from crfrefine.runs.cases.case_files import CaseFiles
from crfrefine.runs.cases.dataset_description import DatasetDescription, read_dataset_description
from crfrefine.runs.cases.discovery import case_folders, list_files, probabilities_beside
from crfrefine.runs.cases.label_input import merge_structures
from crfrefine.runs.cases.reading_options import number_structures

_ONLY = ""  # The case of a path that does not name its case.


def has_structures(options: EvaluationOptions) -> bool:
    """Return whether the folders hold one binary file per structure: on request, or where it is clear."""
    # It is clear if a folder holds only folders of volumes, or if many files are measured for one image.
    if options.structures is not None:
        return options.structures
    places = [options.labels, *options.methods.values()]
    files = {place: list_files(place, VOLUME_SUFFIXES) for place in places if place.is_dir()}
    if any(not own and case_folders(folder) for folder, own in files.items()):
        return True
    is_single = options.images is not None and options.images.is_file()
    return is_single and len(files) == len(set(places)) and all(len(own) > 1 for own in files.values())


def find_structures(options: EvaluationOptions) -> tuple[dict[str, int], list[dict[str, Path]]]:
    """Return the number of each structure by its name, and by case the folder or label map of the reference and of each method."""
    if options.probabilities:
        raise InputError(f"{options.probabilities[0][1]}: structures have no probabilities; leave --probabilities out")
    places = [_cases_of(path) for path in (options.labels, *options.methods.values())]
    paths = {path for cases in places for path in cases.values()}
    folders = [CaseFiles(path.name, (), tuple(list_files(path, VOLUME_SUFFIXES)), are_structures=True) for path in paths if path.is_dir()]
    maps = {path.parent for path in paths if not path.is_dir()}
    names = sorted({*number_structures(folders).structures}.union(*map(names_of, maps)))
    known = sorted({case_id for cases in places for case_id in cases} - {_ONLY})
    nameless = [cases[_ONLY] for cases in places if _ONLY in cases]
    if nameless and len(known) > 1:
        taken = f"{nameless[0]}: taken for the structures of one case, but there are {len(known)} cases"
        raise InputError(f"{taken}; give a folder with a folder per case, or label maps beside a dataset.json that names their labels")
    single = options.images if options.images is not None and options.images.is_file() else options.labels
    only = known[0] if known else stem_of(single) if single.is_file() else single.resolve().name
    numbers = {name: number for number, name in enumerate(names, start=1)}
    return numbers, [{case_id or only: path for case_id, path in cases.items()} for cases in places]


def _cases_of(path: Path) -> dict[str, Path]:
    """Return the folder of structures, or the label map, of each case."""
    if not path.is_dir():
        require_file(path)
        return {_ONLY: path}
    files = list_files(path, VOLUME_SUFFIXES)
    if (path / "dataset.json").exists() and files:
        beside = probabilities_beside(files, {stem_of(file) for file in files})
        return {stem_of(file): file for file in files if file not in beside}
    cases = {_ONLY: path} if files else case_folders(path)
    if not cases:
        raise InputError(f"{path}: no structures found; expected one binary file per structure, or a folder of such files per case")
    return cases


def read_structures(path: Path, numbers: Mapping[str, int], warnings: list[str], *, grid: VolumeHeader | None = None) -> Volume:
    """Read a folder of structures, or a label map whose labels have names in a `dataset.json`, with the numbers of a run."""
    # `warnings` gets a sentence about covered structures; axes are turned to those of `grid`.
    if not path.is_dir():
        return _renumbered(io.read_labels(path, grid=grid), path, numbers)
    headers = [io.read_header(file, io.VOLUME_SUFFIXES) for file in list_files(path, io.VOLUME_SUFFIXES)]
    headers = [io.placed_on(header, grid or headers[0]) for header in headers]
    for header in headers:
        require_scalar(header, "a binary file of one structure")
    merged = merge_structures(headers, numbers)
    if merged.lost:
        warnings.append(f"{merged.lost}; to measure a union of others, leave its file out and give its parts with --regions")
    return Volume(merged.labels.T, *headers[0].geometry(), headers[0].path, headers[0])


def names_of(path: Path) -> dict[str, int]:
    """Return the number of each label of a label map by its name, background aside; raise InputError if no `dataset.json` has any."""
    description = read_dataset_description(path) or DatasetDescription(path)
    names = {name: numbers[0] for name, numbers in description.labels.items() if len(numbers) == 1 and numbers != (0,)}
    if not names:
        expected = 'a dataset.json with {"labels": {"background": 0, "liver": 1}} beside it, as `crfrefine infer` writes it'
        raise InputError(f"{path}: a label map is compared with structures by the names of its labels; expected {expected}")
    return names


def _renumbered(volume: Volume, path: Path, numbers: Mapping[str, int]) -> Volume:
    """Return a label map whose labels have the numbers of the run."""
    known = {0: 0} | {own: numbers[name] for name, own in names_of(path).items()}
    nameless = [label for label in foreground_labels(volume.data) if label not in known]
    if nameless:
        raise InputError(f"{path}: label {nameless[0]} has no name in dataset.json; labels are compared with structures by their names")
    table = np.zeros(max(known) + 1, np.min_scalar_type(max(numbers.values())))
    table[list(known)] = list(known.values())
    return replace(volume, data=table[volume.data])
