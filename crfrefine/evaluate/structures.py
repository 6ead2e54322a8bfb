"""Cases with one binary file per structure: tell them, pair them, and number the structures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from crfrefine import io
from crfrefine.arrays.label_maps import foreground_labels, map_labels
from crfrefine.base.notes import Note, NoteKind
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.conventions import IMAGE_WORDS
from crfrefine.cases.dataset_description import DatasetDescription, read_dataset_description
from crfrefine.cases.files_by_case import structures_by_case, structures_inside
from crfrefine.cases.label_names import names_of, normalized
from crfrefine.cases.listing import list_files
from crfrefine.cases.patterns import folder_of, names_part
from crfrefine.cases.plans import is_trained
from crfrefine.cases.reading_options import number_structures
from crfrefine.cases.structure_folders import (
    UNNAMED,
    are_cases_in_structures,
    are_structures,
    find_structures,
    note_on_names,
)
from crfrefine.errors import InputError
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.io import paths as io_paths
from crfrefine.io.formats import VOLUME_SUFFIXES
from crfrefine.io.paths import holds_many, is_pattern, suffix_of
from crfrefine.io.volume import Volume


def has_structures(options: EvaluationOptions, notes: list[Note]) -> bool:
    """Return whether the folders hold one binary file per structure: if asked for, or if clear.

    Clear are a folder of nothing but folders with structures, the folder of one case with its
    image, as in TotalSegmentator's data sets, many files for one image, and binary files of one
    grid with names of structures. `notes` gets one if it is not clear.
    """
    if options.structures is not None:
        return options.structures
    places = dict.fromkeys([options.labels, *options.methods.values()])
    are_folders = True
    for place in places:
        if is_pattern(place):
            are_folders = False
            if names_part(place, "label"):
                return True
        elif not holds_many(place) or is_trained(place):
            are_folders = False
        elif _is_clear(place):
            cases = structures_by_case(place)
            if are_cases_in_structures(cases):
                name, matches = next(iter(cases.items()))
                example = f"{name}/{matches[0].path.name}"
                pattern = place / f"{{label}}/{{case}}{suffix_of(matches[0].path)}"
                note = NoteKind.CASES_IN_STRUCTURES(str(place), first=example, pattern=str(pattern))
                _note_unless_compared(note, options, notes)
            return True
    if not are_folders:
        return False
    images = options.images
    if images is None or (not is_pattern(images) and not _holds_images(images, options.labels)):
        are_known = are_structures([*places])
        if are_known is None:
            _note_unless_compared(note_on_names(options.labels), options, notes)
        return bool(are_known)
    if is_pattern(images) or not images.is_file():
        return False
    return all(len(structures_inside(place)) > 1 for place in places)


def _holds_images(images: Path, labels: Path) -> bool:
    """Return whether a file is an image, or a folder has one for a file of the reference."""
    if not holds_many(images):
        return True
    names = tuple(io_paths.stem_of(path) for path in list_files(labels, VOLUME_SUFFIXES))
    shown = [io_paths.stem_of(path) for path in list_files(images, VOLUME_SUFFIXES)]
    return any(name.startswith(names) for name in shown)


def _note_unless_compared(note: Note, options: EvaluationOptions, notes: list[Note]) -> None:
    """Add a note; raise InputError if methods are compared: structures are no sample of cases."""
    if options.baselines:
        raise InputError(str(note))
    notes.append(note)


def _is_clear(folder: Path) -> bool:
    """Return whether a folder holds structures and no label maps beside them."""
    beside = list_files(folder, VOLUME_SUFFIXES)
    if not beside:
        return bool(structures_by_case(folder))
    are_images = {io_paths.stem_of(path).lower() for path in beside} <= {*IMAGE_WORDS}
    inside = structures_inside(folder)
    return are_images and bool(inside) and inside[0].path.parent != folder


def pair_structures(
    options: EvaluationOptions,
) -> tuple[dict[str, int], dict[str, CaseFiles], dict[str, dict[str, CaseFiles]]]:
    """Find the binary files of structures, or the label map with names of labels, of each case.

    The result is the number of each structure by its name, the references by case, and the files
    of the methods by method and case.
    Raise InputError without structures, for labels without names, and for a path that names no case
    although there are several.
    """
    if options.probabilities:
        _, path = options.probabilities[0]
        raise InputError(f"{path}: structures have no probabilities; leave --probabilities out")
    if options.mapped:
        raise InputError(
            f"{options.labels}: structures are compared by their names, and have no numbers that "
            "--map could change; leave --map out"
        )
    paths = (options.labels, *options.methods.values())
    # Names by a pattern with `{label}` are split with the cases of the other paths.
    clear = [{} if names_part(path, "label") else find_structures(path) for path in paths]
    known = set[str]().union(*clear) - {UNNAMED}
    sources = [
        cases or find_structures(path, known) for path, cases in zip(paths, clear, strict=True)
    ]
    files = [case for cases in sources for case in cases.values()]
    numbers = dict(number_structures([case for case in files if case.structures]).structures)
    # Names in label maps and in their folders count, too.
    described = [_names_of(case.labels) for case in files if case.labels is not None]
    names_of_all = set(numbers).union(*described)
    alike = _group_alike(names_of_all)
    if described or len(alike) < len(numbers):
        numbers = {}
        for number, names in enumerate(alike, start=1):
            numbers.update(dict.fromkeys(names, number))
    for case in files:
        for names in _group_alike(case.structures):
            if len(names) > 1:
                first = case.network[case.structures.index(names[0])]
                raise InputError(
                    f"{first.parent}: {names[0]} and {names[1]} are names of one structure, as "
                    "case, spaces, _ and - do not count; rename a file, or leave it out"
                )
    only_case = _name_of_only_case(options, sources)
    for cases in sources:
        if UNNAMED in cases:
            cases[only_case] = replace(cases.pop(UNNAMED), case_id=only_case)
    references, *methods = sources
    return numbers, references, dict(zip(options.methods, methods, strict=True))


def _group_alike(names: Collection[str]) -> list[list[str]]:
    """Return names, sorted; those that differ in case, spaces, `_` and `-` are of one structure."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(normalized(name), []).append(name)
    return [*groups.values()]


def _name_of_only_case(
    options: EvaluationOptions, sources: Sequence[Mapping[str, CaseFiles]]
) -> str:
    """Return the name in another source, or that of image or labels; InputError for several."""
    names = sorted(set().union(*sources) - {UNNAMED})
    nameless = [cases[UNNAMED] for cases in sources if UNNAMED in cases]
    if nameless and len(names) > 1:
        raise InputError(
            f"{nameless[0].paths[0]}: taken for the structures of one case, "
            f"but there are {len(names)} cases; give a folder with a folder per case, "
            "or label maps beside a dataset.json that names their labels"
        )
    if names:
        return names[0]
    path = options.labels
    images = options.images
    if images is not None and not is_pattern(images) and images.is_file():
        path = images
    if path.is_file():
        return io_paths.stem_of(path)
    return folder_of(path).resolve().name


def _names_of(path: Path) -> dict[str, int]:
    """Return the number of each label of a label map by its name, background aside."""
    names = {name: label for label, name in names_of(io.read_header(path).segments).items()}
    if not names:
        description = read_dataset_description(path) or DatasetDescription(path)
        names = description.numbers_by_name
    if not names:
        raise InputError(
            f"{path}: a label map is compared with structures by the names of its labels; "
            'expected a dataset.json with {"labels": {"background": 0, "liver": 1}} beside it, '
            "as `crfrefine infer` writes it, or segments with names"
        )
    return names


def with_numbers_of_run(volume: Volume, path: Path, numbers: Mapping[str, int]) -> Volume:
    """Return a label map whose labels have the numbers of the run."""
    number_of = {0: 0}
    for name, label in _names_of(path).items():
        number_of[label] = numbers[name]
    for label in foreground_labels(volume.data):
        if label not in number_of:
            raise InputError(
                f"{path}: label {label} has no name, nor in a dataset.json beside it; "
                "labels are compared with structures by their names"
            )
    labels, _ = map_labels(volume.data, number_of)
    return volume._replace(data=labels)
