"""Pair folders that hold one binary file per structure, and read them: each is one case, whose labels have the names of the files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from crfrefine import io
from crfrefine.arrays.label_maps import foreground_labels
from crfrefine.base.text import counted
from crfrefine.errors import InputError
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.evaluate.pairing import CasePair, MethodFiles, Pairing, find_images, incomplete_cases
from crfrefine.io.paths import VOLUME_SUFFIXES, require_file, stem_of
from crfrefine.io.reading import require_scalar
from crfrefine.io.volume import Volume, VolumeHeader
from crfrefine.runs.cases.case_files import CaseFiles, require_all_complete, too_few_complete
from crfrefine.runs.cases.dataset_description import read_dataset_description
from crfrefine.runs.cases.discovery import case_folders, list_files, probabilities_beside
from crfrefine.runs.cases.label_input import merge_structures
from crfrefine.runs.cases.reading_options import number_structures


@dataclass(frozen=True)
class _Place:
    """The structures at a path of the command line."""

    path: Path
    cases: Mapping[str | None, Path]  # The folder of structures, or the label map, of each case; the name None is the only case.
    names: Iterable[str]  # Names of all structures.


def has_structures(options: EvaluationOptions) -> bool:
    """Return whether the folders hold one binary file per structure: on request, or where it is clear."""
    # It is clear if a folder holds only folders of volumes, or if many files are measured for one
    # image.
    if options.structures is not None:
        return options.structures
    places = [options.labels, *options.methods.values()]
    files = {place: list_files(place, VOLUME_SUFFIXES) for place in places if place.is_dir()}
    if any(not own and case_folders(folder) for folder, own in files.items()):
        return True
    is_single = options.images is not None and options.images.is_file()
    return is_single and len(files) == len(set(places)) and all(len(own) > 1 for own in files.values())


def pair_structures(options: EvaluationOptions) -> Pairing:
    """Find the structures of each method for each case; raises as `pair_cases`, and for label maps without names."""
    if options.probabilities:
        raise InputError(f"{options.probabilities[0][1]}: structures have no probabilities; leave --probabilities out")
    places = [_place_of(path) for path in (options.labels, *options.methods.values())]
    numbers = {name: number for number, name in enumerate(sorted({name for place in places for name in place.names}), start=1)}
    by_case = [_by_case(place, places, options) for place in places]
    everything = sorted(set().union(*by_case))
    lacking: dict[str, list[str]] = {}
    for number, (place, cases) in enumerate(zip(places, by_case, strict=True)):
        for case_id in everything:
            if case_id not in cases:
                lacking.setdefault(case_id, []).append(f"no {'prediction' if number else 'label map'} in {place.path}")
    left_out = incomplete_cases(lacking)
    if options.strict:
        require_all_complete(left_out, len(everything))
    complete = [case_id for case_id in everything if case_id not in lacking]
    if not complete:
        raise too_few_complete(left_out, len(everything), "cases with structures in the labels and in every method", "Name other folders.")
    about = f"{counted(len(numbers), 'structure')} in {counted(len(complete), 'case')}"
    notes = [f"{about}: one binary file per structure, numbered in the order of names; --no-structures takes each file for a case"]
    images = find_images(options.images, complete, complete, notes)
    pairs = []
    for case_id in complete:
        files = {name: MethodFiles(cases[case_id]) for name, cases in zip(options.methods, by_case[1:], strict=True)}
        pairs.append(CasePair(case_id, by_case[0][case_id], files, images.get(case_id, ()), structures=numbers))
    return Pairing(tuple(pairs), tuple(notes), left_out, numbers)


def _place_of(path: Path) -> _Place:
    if not path.is_dir():
        require_file(path)
        return _Place(path, {None: path}, names_of(path))
    files = list_files(path, VOLUME_SUFFIXES)
    if not files:
        folders = case_folders(path)
        if not folders:
            raise InputError(f"{path}: no structures found; expected one binary file per structure, or a folder of such files per case")
        return _Place(path, dict(folders.items()), _structure_names(folders.values()))
    description = read_dataset_description(path) if (path / "dataset.json").exists() else None
    if description is not None and description.path.parent == path and description.labels:
        beside = set(probabilities_beside(files, {stem_of(file) for file in files}))
        return _Place(path, {stem_of(file): file for file in files if file not in beside}, names_of(path))
    return _Place(path, {None: path}, _structure_names([path]))


def _structure_names(folders: Iterable[Path]) -> Iterable[str]:
    """Return the names of the structures of some folders; raise InputError for a name that none may have."""
    cases = [CaseFiles(folder.name, (), tuple(list_files(folder, VOLUME_SUFFIXES)), are_structures=True) for folder in folders]
    return number_structures(cases).structures


def _by_case(place: _Place, places: Sequence[_Place], options: EvaluationOptions) -> dict[str, Path]:
    """Return the files of each case; a place without names of cases has the one case of the others."""
    if None not in place.cases:
        return {name: path for name, path in place.cases.items() if name is not None}
    names = sorted({name for other in places for name in other.cases if name is not None})
    if len(names) > 1:
        raise InputError(
            f"{place.path}: taken for the structures of one case, but there are {len(names)} cases; give a folder with a folder per case, "
            "or label maps beside a dataset.json that names their labels"
        )
    if names:
        return {names[0]: place.cases[None]}
    single = options.images if options.images is not None and options.images.is_file() else options.labels
    return {stem_of(single) if single.is_file() else single.resolve().name: place.cases[None]}


def read_structures(path: Path, numbers: Mapping[str, int], warnings: list[str], *, grid: VolumeHeader | None = None) -> Volume:
    """Read a folder of structures, or a label map whose labels have names in a `dataset.json`, with the numbers of a run."""
    # `warnings` gets a sentence about structures that lose most of their voxels to smaller ones, as
    # a union of others does. Axes are turned to those of `grid`; None means those of the first
    # file.
    if not path.is_dir():
        return _renumbered(io.read_labels(path, grid=grid), path, numbers)
    headers = [io.read_header(file, io.VOLUME_SUFFIXES) for file in list_files(path, io.VOLUME_SUFFIXES)]
    headers = [io.placed_on(header, grid or headers[0]) for header in headers]
    for header in headers:
        require_scalar(header, "a binary file of one structure")
    labels, overlap = merge_structures(headers, numbers)
    if overlap.lost:
        warnings.append(f"{overlap.lost}; to measure a union of others, leave its file out and give its parts with --regions")
    return Volume(labels.T, *headers[0].geometry(), headers[0].path, headers[0])


def names_of(path: Path) -> dict[str, int]:
    """Return the number of each label of a label map by its name, background aside; raise InputError if no `dataset.json` has any."""
    description = read_dataset_description(path if path.is_dir() else path.parent)
    labels = description.labels if description is not None else {}
    names = {name: numbers[0] for name, numbers in labels.items() if len(numbers) == 1 and numbers != (0,)}
    if not names:
        raise InputError(
            f"{path}: a label map is compared with structures by the names of its labels, but no dataset.json beside it has them; expected "
            '{"labels": {"background": 0, "liver": 1}}, as `crfrefine infer` writes it'
        )
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
