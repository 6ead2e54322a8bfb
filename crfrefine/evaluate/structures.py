"""Folders with one binary file per structure: which there are, and the numbers of the structures.

Such a folder is a case, whose labels have the names of the files.
"""

from __future__ import annotations

from pathlib import Path

from crfrefine.errors import InputError
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.io import paths as io_paths
from crfrefine.runs.cases import discovery
from crfrefine.runs.cases.case_files import CaseFiles
from crfrefine.runs.cases.dataset_description import DatasetDescription, read_dataset_description
from crfrefine.runs.cases.reading_options import number_structures

_ONLY = ""  # The case of a path that does not name its case.


def has_structures(options: EvaluationOptions) -> bool:
    """Return whether the folders hold one binary file per structure: on request, or where it is clear."""
    # It is clear if a folder holds only folders of volumes, or if many files are measured for one
    # image.
    if options.structures is not None:
        return options.structures
    places = [options.labels, *options.methods.values()]
    files = {
        place: discovery.list_files(place, io_paths.VOLUME_SUFFIXES)
        for place in places
        if place.is_dir()
    }
    if any(not own and discovery.case_folders(folder) for folder, own in files.items()):
        return True
    is_single = options.images is not None and options.images.is_file()
    return (
        is_single and len(files) == len(set(places)) and all(len(own) > 1 for own in files.values())
    )


def find_structures(options: EvaluationOptions) -> tuple[dict[str, int], list[dict[str, Path]]]:
    """Return the number of each structure by its name, and by case the folder or label map of the reference and of each method."""
    if options.probabilities:
        raise InputError(
            f"{options.probabilities[0][1]}: structures have no probabilities; leave --probabilities out"
        )
    places = [_cases_of(path) for path in (options.labels, *options.methods.values())]
    paths = {path for cases in places for path in cases.values()}
    folders = [
        CaseFiles(
            path.name,
            (),
            tuple(discovery.list_files(path, io_paths.VOLUME_SUFFIXES)),
            are_structures=True,
        )
        for path in paths
        if path.is_dir()
    ]
    maps = {path.parent for path in paths if not path.is_dir()}
    names = sorted({*number_structures(folders).structures}.union(*map(names_of, maps)))
    known = sorted({case_id for cases in places for case_id in cases} - {_ONLY})
    nameless = [cases[_ONLY] for cases in places if _ONLY in cases]
    if nameless and len(known) > 1:
        taken = (
            f"{nameless[0]}: taken for the structures of one case, but there are {len(known)} cases"
        )
        raise InputError(
            f"{taken}; give a folder with a folder per case, or label maps beside a dataset.json that names their labels"
        )
    if options.images is not None and options.images.is_file():
        single = options.images
    else:
        single = options.labels
    if known:
        only = known[0]
    elif single.is_file():
        only = io_paths.stem_of(single)
    else:
        only = single.resolve().name
    numbers = {name: number for number, name in enumerate(names, start=1)}
    return numbers, [{case_id or only: path for case_id, path in cases.items()} for cases in places]


def _cases_of(path: Path) -> dict[str, Path]:
    """Return the folder of structures, or the label map, of each case."""
    if not path.is_dir():
        io_paths.require_file(path)
        return {_ONLY: path}
    files = discovery.list_files(path, io_paths.VOLUME_SUFFIXES)
    if (path / "dataset.json").exists() and files:
        beside = discovery.probabilities_beside(files, {io_paths.stem_of(file) for file in files})
        return {io_paths.stem_of(file): file for file in files if file not in beside}
    cases = {_ONLY: path} if files else discovery.case_folders(path)
    if not cases:
        raise InputError(
            f"{path}: no structures found; expected one binary file per structure, or a folder of such files per case"
        )
    return cases


def names_of(path: Path) -> dict[str, int]:
    """Return the number of each label of a label map by its name, background aside.

    Raise InputError if no `dataset.json` has any.
    """
    description = read_dataset_description(path) or DatasetDescription(path)
    names = {
        name: numbers[0]
        for name, numbers in description.labels.items()
        if len(numbers) == 1 and numbers != (0,)
    }
    if not names:
        expected = 'a dataset.json with {"labels": {"background": 0, "liver": 1}} beside it, as `crfrefine infer` writes it'
        raise InputError(
            f"{path}: a label map is compared with structures by the names of its labels; expected {expected}"
        )
    return names
