"""Folders of binary files: the structures of one case, or one label map per case.

TotalSegmentator writes the former, `liver.nii.gz` and others; cases have numbers in their names.
`find_structures` finds them by case.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np

from crfrefine.arrays.label_maps import present_labels
from crfrefine.base.array_types import Labels
from crfrefine.base.notes import Note, NoteKind
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.conventions import IMAGE_WORDS, LABEL_MAP
from crfrefine.cases.files_by_case import Files, structures_inside
from crfrefine.cases.label_names import normalized
from crfrefine.cases.listing import find_matches, list_files
from crfrefine.cases.other_grid import WorkGrid
from crfrefine.cases.pattern_advice import advise_on_splits
from crfrefine.cases.patterns import Match
from crfrefine.cases.proposals import advise
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.formats import VOLUME_SUFFIXES
from crfrefine.io.headers import read_header
from crfrefine.io.paths import holds_many, is_pattern, require_file, stem_of, suffix_of
from crfrefine.io.reading import read_whole_numbers
from crfrefine.io.volume import VolumeHeader

UNNAMED = ""  # The name of a case whose path does not tell it.
# The patterns below are of names as they are compared, with spaces instead of `_` and `-`.
# Structures with a number in their name, as in TotalSegmentator; all others are words.
_NUMBERED = re.compile(
    r"(?:vertebrae?|rib|disc|tooth|phalanx|metacarpal|metatarsal|liver|couinaud|gtv|ctv|ptv)\W"
    r"(?:[a-z]+\W)*[a-z]?[0-9]{1,2}"
)
_WORDS = re.compile(r"[^\W\d]{3,}(?:\W+[^\W\d]+)*")
# Names that begin with these words are of cases.
_OF_CASES = re.compile(
    r"(?:case|sub|subj|subject|pat|patient|scan|study|volume|img|image)(?:[\W\d]|$)"
)
# A part of a case's name, as in BIDS, that is no structure.
_OF_SCAN = re.compile(r"(?:ses|run|acq|dir|task|time|visit|week|scan)\b")
# The name of a case and that of a structure, such as "patient7 liver" and "03 liver".
_CASE_AND_STRUCTURE = re.compile(r"(.*[0-9][^\W_]*)\W+([^\W\d]{3,}(?:\W+[^\W\d]+)*)")
_RAW = re.compile(r"(?P<case>.*[0-9][^\W_]*)(?P<between>[\W_]+)(?P<structure>[^\W\d_]{3,}[^\d]*)")
# Any words and a number that counts few things, such as "kidney 2" and "T 12", but not "case 007".
_COUNTED = re.compile(r"(.*?[^\W\d])\W*(?:0|[1-9][0-9]?)")
_THINGS = re.compile(
    r"(?:segment|segmentation|label|class|region|structure|roi|organ|mask|object|component"
    r"|lesion|nodule|tumou?r|met|metastasis|node|cyst|aneurysm)"
)
_MAX_READ = 4  # binary files whose voxels are read to tell
# So many files that do not overlap are rather structures than cases, whatever their names.
_MANY_APART = 6
_OVERLAP = 0.01  # share of a file's voxels that others may have


def are_structures(folders: Sequence[Path]) -> bool | None:
    """Return whether folders, that of the reference first, hold the structures of one case.

    False means that files are cases: those of the reference have other voxel grids, are no binary
    files, or have names of cases. None means that names do not tell, or contradict the voxels, an
    image, or a `dataset.json` beside them.
    """
    files = []
    are_alone = True
    for folder in folders:
        paths = {normalized(stem_of(path)): path for path in list_files(folder, VOLUME_SUFFIXES)}
        if paths.keys() & {*IMAGE_WORDS} or (folder / "dataset.json").exists():
            are_alone = False
        files.append(paths)
    names = sorted(set.intersection(*(set(one) for one in files)) - {*IMAGE_WORDS})
    if len(names) < 2:
        return False
    told = _told_by_names(names)
    if any((folder / "dataset.json").exists() for folder in folders) and not told:
        return False
    if told is False and (len(names) < _MANY_APART or any(map(_OF_CASES.match, names))):
        return False
    with suppress(CrfRefineError, OSError):
        reference, *others = files
        told = _told_by_files(reference, names, told)
        for of_method in others:
            if told and not _told_by_files(of_method, names, told):
                told = None
        if told and not are_alone:
            return None
        return told
    return False


def are_cases_in_structures(cases: Mapping[str, Sequence[Match]]) -> bool:
    """Return whether folders are named as structures and their files as cases, as liver/case_1."""
    names = {normalized(match.label) for matches in cases.values() for match in matches}
    if not all(_is_name_of_structure(normalized(folder)) for folder in cases):
        return False
    return len(cases) > 1 and _told_by_names(sorted(names)) is False


def note_on_names(folder: Path) -> Note:
    """Return the note on a folder whose names do not tell structures from cases.

    For structures of several cases it has the pattern of them.
    """
    paths = list_files(folder, VOLUME_SUFFIXES)
    cases = cases_of_structures([normalized(stem_of(path)) for path in paths])
    if not cases:
        return NoteKind.CASES_OR_STRUCTURES(str(folder))
    matches = [match for match in map(_RAW.fullmatch, map(stem_of, paths)) if match]
    structures = sorted({match["structure"] for match in matches})
    label = "{label}"
    between = matches[0]["between"]
    if any(between in structure for structure in structures):
        label = f"{{label:{','.join(structures)}}}"
    pattern = folder / f"{{case}}{between}{label}{suffix_of(paths[0])}"
    advice = "--structures needs a folder per case"
    if len(find_matches(pattern, VOLUME_SUFFIXES)) == len(paths):
        advice = f"'{pattern}' in place of the folder says so, and likewise for the others"
    return NoteKind.CASES_OF_STRUCTURES(
        str(folder), first=paths[0].name, cases=len(cases), advice=advice
    )


def _told_by_names(names: Sequence[str]) -> bool | None:
    """Return what names say: True for structures of one case, False for cases, None for neither."""
    are_named = [_is_name_of_structure(name) for name in names]
    if all(are_named):
        return True
    if any(are_named):
        return None
    if cases_of_structures(names):
        return None
    # A case or a number may stand before the word of a structure, such as "case7 liver".
    matches = [match for match in map(_CASE_AND_STRUCTURE.fullmatch, names) if match]
    structures = {match[2] for match in matches}
    if len(structures) == len(names) and not any(map(_OF_SCAN.match, structures)):
        prefixes = {match[1] for match in matches}
        if len(prefixes) == 1 and _OF_CASES.match(names[0]):
            return True
        if len(prefixes) == 1 or all(map(str.isdecimal, prefixes)):
            return None
    stems = set()
    for name in names:
        match = _COUNTED.fullmatch(name)
        if not match or _OF_CASES.match(name):
            return False
        stems.add(match[1])
    # Several kinds of things are counted, or a thing that is no case.
    if 1 < len(stems) < len(names) or any(map(_THINGS.fullmatch, stems)):
        return None
    return False


def cases_of_structures(names: Sequence[str]) -> list[list[str]]:
    """Return the names of each case, if all are of several cases with several structures each.

    They are such as "pat1 liver" and "pat2 liver"; the result is empty for others.
    """
    of_case: dict[str, list[str]] = {}
    structures = set()
    for name in names:
        match = _CASE_AND_STRUCTURE.fullmatch(name)
        if match is None or _OF_SCAN.match(match[2]):
            return []
        of_case.setdefault(match[1], []).append(name)
        structures.add(match[2])
    if len(of_case) < 2 or min(map(len, of_case.values())) < 2 or len(structures) == len(names):
        return []
    return [*of_case.values()]


def _is_name_of_structure(name: str) -> bool:
    if _OF_CASES.match(name):
        return False
    return bool(_WORDS.fullmatch(name) or _NUMBERED.fullmatch(name))


def _told_by_files(
    files: Mapping[str, Path], names: Sequence[str], told: bool | None
) -> bool | None:
    """Return what names have `told`, after a look at the files of a folder with these names."""
    is_certain = told is True
    for names_of_case in cases_of_structures(names) or [[*names]]:
        headers = [read_header(files[name]) for name in names_of_case]
        first = headers[0]
        are_on_one_grid = all(map(first.on_same_grid, headers))
        if told is False:
            if not are_on_one_grid or not _are_apart(headers):
                return False
            continue
        if not all(_is_part(first, header) for header in headers):
            return False
        is_certain = is_certain and are_on_one_grid
        for header in headers[:: max(1, len(headers) // _MAX_READ)]:
            values = _read_binary(header)
            if values is None:
                return False
            is_certain = is_certain and {*present_labels(values)} <= {0, 1}
    if is_certain:
        return True
    return None


def _is_part(first: VolumeHeader, header: VolumeHeader) -> bool:
    """Return whether the voxels of a file are at those of another one, or continue its grid."""
    if header.num_channels != 1 or header.kind is not None:
        return False
    if first.affine is None or header.affine is None:
        return first.on_same_grid(header)
    return WorkGrid(first).map_to(header).in_whole_voxels is not None


def _read_binary(header: VolumeHeader) -> Labels | None:
    """Return the values of a file, ([z,] y, x); None unless it has one besides 0 at most."""
    with suppress(CrfRefineError):
        values = read_whole_numbers(header)
        if len({*present_labels(values)} - {0}) <= 1:
            return values
    return None


def _are_apart(headers: Sequence[VolumeHeader]) -> bool:
    """Return whether many files are binary and hardly overlap, as structures of one case do."""
    covered = np.zeros(headers[0].stored_grid, bool)
    num_apart = 0
    for header in headers:
        values = None if header.num_channels != 1 else _read_binary(header)
        if values is None:
            return False
        mask = values.reshape(covered.shape) != 0
        size = int(np.count_nonzero(mask))
        if np.count_nonzero(mask & covered) > _OVERLAP * size:
            return False
        covered |= mask
        if size:
            num_apart += 1
    return num_apart >= _MANY_APART


def find_structures(path: Path, known: Collection[str] = ()) -> dict[str, CaseFiles]:
    """Find the structures of each case, or its label map with names of labels, by its name.

    A case whose path does not name it is UNNAMED. `known` are cases that other paths name. Raises
    InputError: neither is found, or it is not clear which part of the names is the case.
    """
    if not holds_many(path):
        require_file(path)
        return {UNNAMED: CaseFiles(UNNAMED, (), labels=path)}
    inside = [] if is_pattern(path) else structures_inside(path)
    # Names of labels show that files are label maps. A pattern may be too long for a path.
    has_names = bool(inside) and (path / "dataset.json").exists()
    if inside and not has_names and len(read_header(inside[0].path).segments) <= 1:
        return {UNNAMED: CaseFiles(UNNAMED, ()).with_structures(inside)}
    files = Files(LABEL_MAP, path, cases=known)
    found = {name: files.of(name) for name in files.by_case()}
    hint = advise_on_splits(path, [*chain(*found.values())], "label")
    if hint and not known:
        raise InputError(f"{path}: the cases are not clear{hint}")
    cases = {}
    label_maps = {}
    for name, matches in found.items():
        if matches[0].label:
            cases[name] = CaseFiles(name, ()).with_structures(matches)
        else:
            label_maps[name] = CaseFiles(name, (), labels=matches[0].path)
    if inside or not cases:  # Label maps with names, with any folders beside them.
        cases = label_maps
    if not cases:
        raise InputError(
            f"{path}: no structures found; expected one binary file per structure, "
            f"or a folder of such files per case{advise(path, holds_images=False)}"
        )
    return cases
