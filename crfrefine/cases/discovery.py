"""Assign files to cases: the naming of nnU-Net, single files, and the file names of other tools.

Only `dataset.json` and files without a known suffix are opened here; the contents of files are checked when a case is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from crfrefine.base.text import counted, listed
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.dataset_description import DatasetDescription, description_or_note
from crfrefine.errors import InputError
from crfrefine.io.paths import LABELS_SUFFIXES, LOGITS_SUFFIXES, SCORES_SUFFIXES, VOLUME_SUFFIXES, require_file, stem_of, suffix_of
from crfrefine.io.recognition import describe_others, format_to_read

LABEL_SUFFIXES = ("_segmentation", "_seg", "_dseg", "_label", "_labels")
MASK_SUFFIXES = ("_mask", "_brainmask")
LOGITS_NAMES = ("_logits", "_probabilities", "_probseg", "_softmax")
_IMAGES_OF_CASE_FOLDERS = ("ct", "mri")
"""Names of the image in TotalSegmentator's data sets, which have a folder per case."""

# File names may contain anything, including line breaks and digits of all scripts.
_MODALITY = re.compile(r"(?P<case>.+)_(?P<number>[0-9]{4})", re.DOTALL)
_LABEL_FILE = re.compile(r"(?P<case>.+)_(?:ProbMapClass|label|class)_?(?P<number>[0-9]{1,9})", re.DOTALL)

_MAX_MODALITIES = 16  # Most modalities that a message lists.


def discover_cases(
    images: Path | Sequence[Path],
    logits: Path | Sequence[Path] | None,
    masks: Path | None = None,
    labels: Path | None = None,
    *,
    include_imageless: bool = False,
    choose_logits: bool = True,
) -> CaseList:
    """Find the cases in folders, or the one case of single files.

    Args:
        images: a folder; or the file or files of one case, one per modality.
        logits: a folder; or one file with all labels, or one file per label in order; None if none are needed.
        masks: a folder, or a file for one case.
        labels: a folder, or a file for one case.
        include_imageless: for folders: labels or logits without an image count as incomplete cases instead of being ignored.
        choose_logits: whether cases get their logits; otherwise, they serve only to tell case names from numbers of modalities.

    Returns:
        The cases, sorted by name; incomplete ones have a `problem`.

    Raises:
        InputError: a path that does not exist, no case at all, or several cases where one is expected.
        UnsupportedFormatError: a single file of an unknown type.
    """
    image_paths = _as_paths(images)
    logits_paths = _as_paths(logits) if logits is not None else ()
    if not image_paths:
        raise InputError("no images given")
    folders = [path for path in image_paths if path.is_dir()]
    if len(folders) > 1 or (folders and len(image_paths) > 1):
        raise InputError(f"{folders[0]}: give one folder of images, or the files of one case")
    cases = _cases_of_folder(folders[0], logits_paths) if folders else _case_of_files(image_paths)
    if folders and include_imageless:
        cases = _with_imageless(cases, folders[0], labels, logits_paths)
    cases = with_logits(cases, logits_paths) if logits is not None and choose_logits else cases
    cases = _with_companions(cases, masks, "mask", MASK_SUFFIXES, lambda case, path: replace(case, mask=path))
    return _with_companions(cases, labels, "labels", LABEL_SUFFIXES, lambda case, path: replace(case, labels=path))


def _cases_of_folder(folder: Path, logits: Sequence[Path]) -> CaseList:
    paths = list_files(folder, VOLUME_SUFFIXES)
    nested = {} if paths else _images_of_case_folders(folder)
    if nested:
        example = next(iter(nested.values())).relative_to(folder)
        note = f"{folder}: a folder for each case, as in TotalSegmentator's data sets, with its image, such as {example}"
        return CaseList([CaseFiles(case_id, (path,)) for case_id, path in nested.items()], [note])
    stems = {stem_of(path) for path in paths}
    notes = []
    references = [
        path
        for path in paths
        if suffix_of(path) in LABELS_SUFFIXES
        or any(stem_of(path).removesuffix(suffix) in stems - {stem_of(path)} for suffix in LABEL_SUFFIXES)
    ]
    if references:
        notes.append(f"{folder}: not taken for images: {counted(len(references), 'label map')} beside them, such as {references[0].name}")
    # This tool's own outputs, or logits beside the images (-i FOLDER -p FOLDER), are not separate cases.
    names = stems | {stem.rpartition("_")[0] for stem in stems if _MODALITY.fullmatch(stem)}
    found = probabilities_beside(paths, names)
    if found:
        notes.append(f"{folder}: not taken for images: {counted(len(found), 'file')} of logits beside them, such as {found[0].name}")
        references += found
    groups: dict[str, dict[int, list[Path]]] = {}
    lone: dict[str, list[Path]] = {}
    is_numbered = any(stem.endswith("_0000") for stem in stems)
    logits_stems = set()
    if logits and logits[0].is_dir() and not logits[0].samefile(folder):
        logits_stems = {stem_of(path) for path in list_files(logits[0], LOGITS_SUFFIXES)}
    for path in paths:
        if path in references:
            continue
        stem = stem_of(path)
        match = _MODALITY.fullmatch(stem)
        # Four digits at the end may also belong to the name of a case, unless something shows that modalities are numbered.
        if match and stem not in logits_stems and (is_numbered or match["case"] in logits_stems):
            groups.setdefault(match["case"], {}).setdefault(int(match["number"]), []).append(path)
        else:
            lone.setdefault(stem, []).append(path)
    description = description_or_note(folder, notes)
    expected = _expected_modalities(groups, description)
    cases = [_numbered_case(case_id, groups[case_id], *expected) for case_id in groups if case_id not in lone]
    for case_id, candidates in lone.items():
        together = candidates + [path for same in groups.get(case_id, {}).values() for path in same]
        problem = None
        if len(together) > 1:
            problem = f"case {case_id!r}: expected one image or numbered modalities, found {file_names(together)} in {folder}"
        cases.append(CaseFiles(case_id, tuple(candidates[:1]), problem=problem))
    if not cases:
        reason = "it is empty" if not any(folder.iterdir()) else "it has no file with one of these suffixes"
        raise InputError(f"{folder}: no case found: {reason} ({', '.join(VOLUME_SUFFIXES)}){describe_others(folder)}")
    return CaseList(sorted(cases, key=lambda case: case.case_id), notes)


def _images_of_case_folders(folder: Path) -> dict[str, Path]:
    """Return the image of each case, by name, in the layout of TotalSegmentator's data sets: `s0001/ct.nii.gz`."""
    found: dict[str, Path] = {}
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        images = [path for path in list_files(inner, VOLUME_SUFFIXES) if stem_of(path) in _IMAGES_OF_CASE_FOLDERS]
        if len(images) == 1:
            found[inner.name] = images[0]
    return found


def _expected_modalities(groups: Mapping[str, Mapping[int, list[Path]]], description: DatasetDescription | None) -> tuple[int, str]:
    """Return the expected number of modalities of a case, and the source of that number."""
    if description is not None and description.channel_names:
        return len(description.channel_names), f"as {description.path.name} names"
    # The most frequent number; of two equally frequent ones the larger, so that missing files are found.
    counts = Counter(max(numbers) + 1 for numbers in groups.values())
    return max(counts, key=lambda number: (counts[number], number), default=0), "as in the other cases"


def _numbered_case(case_id: str, numbers: Mapping[int, list[Path]], num_expected: int, who_says_so: str) -> CaseFiles:
    images = tuple(numbers[number][0] for number in sorted(numbers))
    problem = None
    missing: tuple[str, ...] = ()
    twice = next((paths for paths in numbers.values() if len(paths) > 1), None)
    if twice:
        problem = f"case {case_id!r}: one modality in two files, {file_names(twice)} in {twice[0].parent}"
    elif sorted(numbers) != list(range(num_expected)):
        there, wanted = (
            listed([f"{number:04d}" for number in several], _MAX_MODALITIES) for several in (sorted(numbers), range(num_expected))
        )
        problem = f"case {case_id!r}: expected the modalities {wanted}, {who_says_so}; found {there} in {images[0].parent}"
        missing = tuple(f"no modality {number:04d} in {images[0].parent}" for number in range(num_expected) if number not in numbers)
    return CaseFiles(case_id, images, problem=problem, missing=missing)


def _with_imageless(cases: CaseList, images: Path, labels: Path | None, logits: Sequence[Path]) -> CaseList:
    """Add the cases that are known only from their labels or logits, each with its `problem`."""
    known = {case.case_id for case in cases}
    names: set[str] = set()
    for source, suffixes, endings in (
        *((path, VOLUME_SUFFIXES, LABEL_SUFFIXES) for path in (labels,) if path is not None),
        *((path, LOGITS_SUFFIXES, LOGITS_NAMES) for path in logits),
    ):
        if not source.is_dir() or source.samefile(images):
            continue
        for stem in map(stem_of, list_files(source, suffixes)):
            one_a_label, modality = _LABEL_FILE.fullmatch(stem), _MODALITY.fullmatch(stem)
            ending = next((ending for ending in endings if stem.endswith(ending)), "")
            name = one_a_label["case"] if one_a_label else stem.removesuffix(ending)
            # An image beside the labels is not a separate case.
            if not {stem, name, modality["case"] if modality else name} & known:
                names.add(name)
    lacking = f"no image in {images}"
    problem = f"{lacking}; expected CASE or CASE_0000 with one of {', '.join(VOLUME_SUFFIXES)}"
    added = [CaseFiles(name, (), problem=f"case {name!r}: {problem}", missing=(lacking,)) for name in names if name]
    return CaseList(sorted([*cases, *added], key=lambda case: case.case_id), cases.notes)


def _case_of_files(paths: Sequence[Path]) -> CaseList:
    for path in paths:
        format_to_read(path, VOLUME_SUFFIXES)
        require_file(path)
    stem = stem_of(paths[0])
    match = _MODALITY.fullmatch(stem)
    numbered = [name for path in paths if (name := _MODALITY.fullmatch(stem_of(path))) is not None]
    case_ids = {name["case"] for name in numbered if int(name["number"]) == 0}
    if len(case_ids) > 1:
        raise InputError(f"{paths[0]}: files of {len(case_ids)} cases, {listed(sorted(case_ids))}; give the folder of the images")
    # Without other files to compare with, only the first modality's number is certainly not part of the name.
    case_id = match["case"] if match and int(match["number"]) == 0 else stem
    return CaseList([CaseFiles(case_id, tuple(paths))])


def with_logits(cases: CaseList, logits: Sequence[Path]) -> CaseList:
    """Add the logits of each case, or its `problem`; given are a folder, or the files of one case."""
    if not logits:
        raise InputError("no logits given")
    if not logits[0].is_dir() or len(logits) > 1:
        require_of_one_case(cases, logits, LOGITS_SUFFIXES, "logits", "give a folder of logits, or the images of one case")
        return CaseList([replace(cases[0], logits=tuple(logits))], cases.notes)
    folder = logits[0]
    by_stem = files_by_stem(folder, LOGITS_SUFFIXES)
    by_label: dict[str, dict[int, list[Path]]] = {}
    for stem, paths in by_stem.items():
        if match := _LABEL_FILE.fullmatch(stem):
            by_label.setdefault(match["case"], {}).setdefault(int(match["number"]), []).extend(paths)
    found = []
    taken: set[Path] = set()
    for case in cases:
        candidates = [path for name in ("", *LOGITS_NAMES) for path in by_stem.get(case.case_id + name, [])]
        one_a_label = by_label.get(case.case_id, {})
        taken |= {*candidates, *(path for paths in one_a_label.values() for path in paths)}
        hint = ""
        if label_map := next((path for ending in LABEL_SUFFIXES for path in by_stem.get(case.case_id + ending, [])), None):
            hint = f"; for the label map {label_map.name}, give --input-type labels"
        elif (folder / case.case_id).is_dir() or (len(cases) == 1 and len(by_stem) > 1):
            hint = "; for one binary file per structure, give --input-type labels"
        chosen, problem = _choose_logits(case.case_id, candidates, one_a_label, folder, hint)
        missing = () if candidates or one_a_label else (f"no logits in {folder}",)
        found.append(replace(case, logits=chosen, problem=case.problem or problem, missing=case.missing + missing))
    stray = sorted(path.name for paths in by_stem.values() for path in paths if path not in taken)
    notes = list(cases.notes)
    if stray:
        notes.append(f"{folder}: ignored {counted(len(stray), 'file')} of logits without images, such as {stray[0]}")
    return CaseList(found, notes)


def _choose_logits(
    case_id: str, candidates: Sequence[Path], one_a_label: Mapping[int, list[Path]], folder: Path, hint: str
) -> tuple[tuple[Path, ...], str | None]:
    """Return the files to read, or none and the error, with a hint at what else the folder has."""
    # nnU-Net puts its label map CASE.nii.gz beside CASE.npz, and so does this tool beside CASE_logits: explicit names win.
    telling = [path for path in candidates if suffix_of(path) in SCORES_SUFFIXES or stem_of(path) != case_id] or candidates
    if len(telling) == 1:
        return (telling[0],), None
    if telling:
        return (), f"case {case_id!r}: expected one file of logits, found {file_names(telling)} in {folder}"
    if not one_a_label:
        return (), f"case {case_id!r}: no logits in {folder}; expected {logits_named(case_id)}{hint}"
    if sorted(one_a_label) != list(range(len(one_a_label))) or any(len(paths) > 1 for paths in one_a_label.values()):
        there = file_names([path for paths in one_a_label.values() for path in paths])
        return (), f"case {case_id!r}: expected one file for each label from 0, found {there} in {folder}"
    return tuple(one_a_label[label][0] for label in sorted(one_a_label)), None


def logits_named(case_id: str) -> str:
    """Return which files may have the logits of a case, for messages: the most usual two of many formats."""
    return f"{case_id}.nii.gz, {case_id}.npz or the like"


def _with_companions(
    cases: CaseList, source: Path | None, what: str, suffixes: Sequence[str], attach: Callable[[CaseFiles, Path], CaseFiles]
) -> CaseList:
    """Add the mask or the labels of each case."""
    if source is None:
        return cases
    if not source.is_dir():
        require_of_one_case(cases, [source], VOLUME_SUFFIXES, what, "give a folder")
        return CaseList([attach(cases[0], source)], cases.notes)
    by_stem = files_by_stem(source, VOLUME_SUFFIXES)
    found = []
    for case in cases:
        telling = [path for suffix in suffixes for path in by_stem.get(case.case_id + suffix, [])]
        candidates = telling or segmentations_first(by_stem.get(case.case_id, []))
        if len(candidates) == 1:
            found.append(attach(case, candidates[0]))
        else:
            there = f"found {file_names(candidates)}" if candidates else "found none"
            problem = f"case {case.case_id!r}: expected one file of {what} in {source}, {there}"
            missing = () if candidates else (f"no {what} in {source}",)
            found.append(replace(case, problem=case.problem or problem, missing=case.missing + missing))
    return CaseList(found, cases.notes)


def labels_of(cases: CaseList, labels: Path) -> dict[str, Path]:
    """Return the label map of each case that has one."""
    plain = CaseList([replace(case, labels=None, problem=None) for case in cases], cases.notes)
    found = _with_companions(plain, labels, "labels", LABEL_SUFFIXES, lambda case, path: replace(case, labels=path))
    return {case.case_id: case.labels for case in found if case.labels is not None}


def segmentations_first(paths: Sequence[Path]) -> Sequence[Path]:
    """Return the files in a format of segmentations, which beside an image of the same name are its label map; all files without one."""
    return [path for path in paths if suffix_of(path) in LABELS_SUFFIXES] or paths


def list_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the folder's files of the given formats, sorted by name; hidden ones, such as files being written, are skipped.

    A link to nothing, as to data that were not fetched, counts as a file: its case must fail.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if suffix_of(path) in suffixes and not path.name.startswith("."))
        return [path for path in paths if path.is_file() or (path.is_symlink() and not path.exists())]
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror or error}") from error


def require_of_one_case(cases: CaseList, paths: Sequence[Path], suffixes: tuple[str, ...], what: str, advice: str) -> None:
    """Raise InputError unless files that were named themselves are there, can be read by their names, and are of the only case."""
    for path in paths:
        require_file(path)
        format_to_read(path, suffixes)
    if len(cases) != 1:
        raise InputError(f"{paths[0]}: a file of {what} for {len(cases)} cases; {advice}")


def files_by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """Return the folder's files of the given formats by their names without suffix."""
    found: dict[str, list[Path]] = {}
    for path in list_files(folder, suffixes):
        found.setdefault(stem_of(path), []).append(path)
    return found


def probabilities_beside(paths: Iterable[Path], names: Collection[str]) -> list[Path]:
    """Return the files of probabilities, such as `CASE_probabilities`, of cases with one of the names: they are not separate cases."""
    of_probabilities = {name + ending for name in names for ending in LOGITS_NAMES}
    return [path for path in paths if stem_of(path) in of_probabilities]


def _as_paths(paths: Path | str | Sequence[Path | str]) -> tuple[Path, ...]:
    several = (paths,) if isinstance(paths, (str, Path)) else paths
    for path in map(Path, several):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    return tuple(map(Path, several))


def file_names(paths: Sequence[Path]) -> str:
    """Return the names of some files, for messages."""
    return listed([path.name for path in sorted(paths)])
