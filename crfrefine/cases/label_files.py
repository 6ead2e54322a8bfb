"""Which label map, or which files of single structures, belong to a case. How they are read is in label_input.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from crfrefine.base.text import counted, listed
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.discovery import (
    LABEL_SUFFIXES,
    LOGITS_NAMES,
    discover_cases,
    file_names,
    files_by_stem,
    list_files,
    require_of_one_case,
    segmentations_first,
)
from crfrefine.cases.structure_folders import structures_folder
from crfrefine.io.paths import VOLUME_SUFFIXES, stem_of


def discover_network_cases(
    images: Path | Sequence[Path],
    logits: Path | Sequence[Path],
    masks: Path | None = None,
    labels: Path | None = None,
    *,
    input_type: str = "auto",
    include_imageless: bool = False,
) -> CaseList:
    """Find cases as `discover_cases` does; with the input type "labels", label maps win over logits of the same case.

    Args:
        images: a folder; or the file or files of one case.
        logits: a folder; or the file or files of one case. With "labels": a folder of label maps, or of a folder per case with one file per
            structure; a label map; or the folder or the files of one case's structures.
        masks: a folder, or a file for one case.
        labels: the reference: a folder, or a file for one case.
        input_type: "auto", "logits", "probabilities" or "labels".
        include_imageless: see `discover_cases`.

    Raises:
        InputError: a path that does not exist, no case at all, or several cases where one is expected.
        UnsupportedFormatError: a single file of an unknown type.
    """
    as_labels = input_type == "labels"
    cases = discover_cases(images, logits, masks, labels, include_imageless=include_imageless, choose_logits=not as_labels)
    if not as_labels:
        return cases
    paths = [Path(logits)] if isinstance(logits, str | Path) else [Path(path) for path in logits]
    images = [Path(images)] if isinstance(images, str | Path) else [Path(path) for path in images]
    if len(paths) == 1 and paths[0].is_dir():
        return _of_folder(cases, paths[0], is_single=not images[0].is_dir())
    require_of_one_case(cases, paths, VOLUME_SUFFIXES, "labels", "give a folder of label maps, or the images of one case")
    return CaseList([_with_structures(cases[0], paths) if len(paths) > 1 else replace(cases[0], logits=tuple(paths))], cases.notes)


def _of_folder(cases: CaseList, folder: Path, *, is_single: bool) -> CaseList:
    by_stem = files_by_stem(folder, VOLUME_SUFFIXES)
    found = []
    taken: set[Path] = set()
    for case in cases:
        chosen = _choose(case, by_stem, folder, is_single=is_single)
        taken |= set(chosen.logits)
        found.append(chosen)
    # This tool's outputs, and other names for a case that is there, are not stray.
    known = {case.case_id + ending for case in cases for ending in ("", *LOGITS_NAMES, *LABEL_SUFFIXES)}
    stray = sorted(path.name for stem, paths in by_stem.items() for path in paths if path not in taken and stem not in known)
    notes = list(cases.notes)
    if stray and not is_single:
        notes.append(f"{folder}: ignored {counted(len(stray), 'label map')} without images, such as {stray[0]}")
    return CaseList(found, notes)


def _choose(case: CaseFiles, by_stem: Mapping[str, list[Path]], folder: Path, *, is_single: bool) -> CaseFiles:
    """Return the case with its label map, its structures, or its problem."""
    telling = [path for ending in LABEL_SUFFIXES for path in by_stem.get(case.case_id + ending, [])]
    candidates = telling or segmentations_first([path for path in by_stem.get(case.case_id, []) if path not in case.images])
    if len(candidates) == 1:
        return replace(case, logits=(candidates[0],))
    if candidates:
        names = file_names(candidates)
        return replace(case, problem=case.problem or f"case {case.case_id!r}: expected one label map, found {names} in {folder}")
    own = structures_folder(folder / case.case_id)
    structures = list_files(own, VOLUME_SUFFIXES) if own.is_dir() else []
    if not structures and is_single:
        structures = [path for paths in by_stem.values() for path in paths if path not in case.images]
    if structures:
        return _with_structures(case, structures)
    expected = f"expected {case.case_id}.nii.gz or the like, or a folder {case.case_id} with one file per structure"
    problem = f"case {case.case_id!r}: no label map in {folder}; {expected}"
    return replace(case, problem=case.problem or problem, missing=(*case.missing, f"no label map in {folder}"))


def _with_structures(case: CaseFiles, paths: Sequence[Path]) -> CaseFiles:
    """Return the case with its structures, sorted by name."""
    ordered = tuple(sorted(paths, key=lambda path: (stem_of(path), path)))
    twice = next((name for name, count in Counter(map(stem_of, ordered)).items() if count > 1), None)
    problem = None
    if twice is not None:
        names = listed([str(path) for path in ordered if stem_of(path) == twice])
        problem = f"case {case.case_id!r}: expected one file per structure, found {names}"
    return replace(case, logits=ordered, are_structures=True, problem=case.problem or problem)
