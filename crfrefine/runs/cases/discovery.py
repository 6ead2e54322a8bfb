"""Assign files to cases: the naming of nnU-Net, single files, and the file names of other tools.

Contents are read later.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import multimode
from typing import Any

from crfrefine.base.text import counted, listed
from crfrefine.errors import InputError
from crfrefine.io.paths import (
    LABELS_SUFFIXES,
    LOGITS_SUFFIXES,
    SCORES_SUFFIXES,
    VOLUME_SUFFIXES,
    describe_others,
    file_to_read,
    stem_of,
    suffix_of,
)
from crfrefine.runs.cases.case_files import CaseFiles, CaseList
from crfrefine.runs.cases.dataset_description import read_descriptions

LABEL_SUFFIXES = ("_segmentation", "_seg", "_dseg", "_label", "_labels")
MASK_SUFFIXES = ("_mask", "_brainmask")
STROKES_SUFFIXES = ("_strokes", "_scribbles")
LOGITS_NAMES = ("_logits", "_probabilities", "_probseg", "_softmax")
# Names of the image in TotalSegmentator's data sets, which have a folder per case.
_IMAGES_OF_CASE_FOLDERS = ("ct", "mri")
# File names may contain anything, including line breaks and digits of all scripts.
MODALITY = re.compile(r"(?P<case>.+)_(?P<number>[0-9]{4})", re.DOTALL)
_LABEL_FILE = re.compile(
    r"(?P<case>.+)_(?:ProbMapClass|label|class)_?(?P<number>[0-9]{1,9})", re.DOTALL
)

_MAX_MODALITIES = 16  # Most modalities that a message lists.


def discover_cases(
    images: Path | Sequence[Path],
    logits: Path | Sequence[Path] | None,
    masks: Path | None = None,
    labels: Path | None = None,
    *,
    input_type: str = "auto",
    add_background: bool = False,
    include_imageless: bool = False,
) -> CaseList:
    """Find the cases in folders, or the one case of single files, sorted by name.

    Incomplete ones have a `problem`.

    The images are a folder, or the files of one case, one per modality; logits a folder, one file
    with all labels, or one per label in order. With the input type "labels" they are label maps, or
    one file per structure, in a folder per case. With `include_imageless`, labels or logits without
    an image count as incomplete cases. With `add_background`, files per label begin with label 1.
    Raises InputError: a path that does not exist, no case, or several where one is expected.
    """
    image_paths = _paths_of(images)
    logits_paths = _paths_of(logits or ())
    if (
        absent := next((path for path in (*image_paths, *logits_paths) if not path.exists()), None)
    ) is not None:
        raise InputError(f"{absent}: no such file or folder")
    folder = next((path for path in image_paths if path.is_dir()), None)
    if folder is not None and len(image_paths) > 1:
        raise InputError(f"{folder}: give one folder of images, or the files of one case")
    if folder is None:
        for path in image_paths:
            file_to_read(path, VOLUME_SUFFIXES)
        # Without other files to compare with, only the first modality's number is certainly not
        # part of the name.
        matches = [MODALITY.fullmatch(stem_of(path)) for path in image_paths]
        names = [
            match["case"] if match and int(match["number"]) == 0 else None for match in matches
        ]
        case_ids = sorted({name for name in names if name is not None})
        if len(case_ids) > 1:
            raise InputError(
                f"{image_paths[0]}: files of {len(case_ids)} cases, {listed(case_ids)}; give the folder of the images"
            )
        cases = CaseList([CaseFiles(names[0] or stem_of(image_paths[0]), image_paths)])
    else:
        cases = _cases_of_folder(folder, logits_paths)
        if include_imageless:
            cases = _with_imageless(cases, folder, labels, logits_paths)
    if logits_paths:
        cases = with_logits(
            cases,
            logits_paths,
            are_labels=input_type == "labels",
            is_single=folder is None,
            first_label=int(add_background),
        )
    if masks is not None:
        cases = _with_companions(cases, masks, "mask", MASK_SUFFIXES)
    if labels is None:
        return cases
    return _with_companions(cases, labels, "labels", LABEL_SUFFIXES)


def _paths_of(paths: str | Path | Sequence[Path]) -> tuple[Path, ...]:
    """Return one path or several as a tuple."""
    if isinstance(paths, str | Path):
        return (Path(paths),)
    return tuple(Path(path) for path in paths)


def _cases_of_folder(folder: Path, logits: Sequence[Path]) -> CaseList:
    paths = list_files(folder, VOLUME_SUFFIXES)
    if not paths:  # TotalSegmentator's data sets have a folder for each case: `s0001/ct.nii.gz`.
        inner = sorted(
            path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        own = [
            [
                path
                for path in list_files(place, VOLUME_SUFFIXES)
                if stem_of(path) in _IMAGES_OF_CASE_FOLDERS
            ]
            for place in inner
        ]
        if nested := [
            CaseFiles(images[0].parent.name, tuple(images)) for images in own if len(images) == 1
        ]:
            example = nested[0].images[0].relative_to(folder)
            note = f"{folder}: a folder for each case, as in TotalSegmentator's data sets, with its image, such as {example}"
            return CaseList(nested, [note])
    stems = {stem_of(path) for path in paths}
    # Label maps, this tool's own outputs, or logits beside the images (-i FOLDER -p FOLDER) are not
    # separate cases.
    known = stems | {match["case"] for stem in stems if (match := MODALITY.fullmatch(stem))}
    beside = [path for path in paths if suffix_of(path) in LABELS_SUFFIXES]
    beside += [
        path
        for path in paths
        if without_ending(stem_of(path), LABEL_SUFFIXES) in stems - {stem_of(path)}
    ]
    beside += probabilities_beside(paths, known)
    is_numbered = any(stem.endswith("_0000") for stem in stems)
    logits_stems = set()
    if logits and logits[0].is_dir() and not logits[0].samefile(folder):
        logits_stems = {stem_of(path) for path in list_files(logits[0], LOGITS_SUFFIXES)}
    # files by the number of the modality; -1 is that of a file without one
    by_case: dict[str, dict[int, list[Path]]] = {}
    for path in (path for path in paths if path not in beside):
        stem = stem_of(path)
        match = MODALITY.fullmatch(stem)
        # Four digits at the end may also belong to the name of a case, unless something shows that
        # modalities are numbered.
        if match and stem not in logits_stems and (is_numbered or match["case"] in logits_stems):
            by_case.setdefault(match["case"], {}).setdefault(int(match["number"]), []).append(path)
        else:
            by_case.setdefault(stem, {}).setdefault(-1, []).append(path)
    if not by_case:
        if not any(folder.iterdir()):
            reason = "it is empty"
        else:
            reason = "it has no file with one of these suffixes"
        raise InputError(
            f"{folder}: no case found: {reason} ({', '.join(VOLUME_SUFFIXES)}){describe_others(folder)}"
        )
    if beside:
        notes = [
            f"{folder}: not taken for images: {counted(len(beside), 'file')} beside them, such as {beside[0].name}"
        ]
    else:
        notes = []
    counts = [max(numbers) + 1 for numbers in by_case.values() if max(numbers) >= 0]
    description = next(read_descriptions([folder]), None) if counts else None
    if description is not None and description.channel_names:
        expected = len(description.channel_names), f"as {description.path.name} names"
    else:  # The most frequent number; of two equally frequent ones the larger, so that missing files are found.
        expected = max(multimode(counts), default=0), "as in the other cases"
    return CaseList(
        [
            _case_of_images(case_id, by_case[case_id], folder, *expected)
            for case_id in sorted(by_case)
        ],
        notes,
    )


def _case_of_images(
    case_id: str,
    by_number: Mapping[int, list[Path]],
    folder: Path,
    num_expected: int,
    who_says_so: str,
) -> CaseFiles:
    """Return a case of one file, or of one per modality, or with a problem."""
    numbers = sorted(by_number)
    together = [path for _, paths in sorted(by_number.items()) for path in paths]
    images = by_number[-1][:1] if -1 in by_number else [by_number[number][0] for number in numbers]
    case = CaseFiles(case_id, tuple(images))
    if len(together) > len(images):
        return case.lacking(
            f"expected one image, or one file per numbered modality, found {file_names(together)} in {folder}"
        )
    if numbers in ([-1], list(range(num_expected))):
        return case
    there, wanted = (
        listed([f"{each:04d}" for each in several], _MAX_MODALITIES)
        for several in (numbers, range(num_expected))
    )
    missing = [
        f"no modality {number:04d} in {folder}"
        for number in range(num_expected)
        if number not in by_number
    ]
    return case.lacking(
        f"expected the modalities {wanted}, {who_says_so}; found {there} in {folder}", *missing
    )


def _with_imageless(
    cases: CaseList, images: Path, labels: Path | None, logits: Sequence[Path]
) -> CaseList:
    """Add the cases that are known only from their labels or logits, each with its `problem`."""
    known = {case.case_id for case in cases}
    names = set[str]()
    sources: list[tuple[Path, tuple[str, ...], tuple[str, ...]]] = [
        (path, LOGITS_SUFFIXES, LOGITS_NAMES) for path in logits
    ]
    sources += [(labels, VOLUME_SUFFIXES, LABEL_SUFFIXES)] if labels is not None else []
    for source, suffixes, endings in sources:
        if source.is_dir() and not source.samefile(images):
            names.update(case_of(stem, known, endings) for stem in files_by_stem(source, suffixes))
    lacking = f"no image in {images}"
    problem = f"{lacking}; expected CASE or CASE_0000 with one of {', '.join(VOLUME_SUFFIXES)}"
    added = [CaseFiles(name, ()).lacking(problem, lacking) for name in names - known]
    return CaseList(sorted([*cases, *added], key=lambda case: case.case_id), cases.notes)


def case_of(stem: str, known: Collection[str], endings: Sequence[str]) -> str:
    """Return the case of a file name: without an ending, the number of a label, or that of a modality of a known case."""
    if stem in known:
        return stem
    if match := _LABEL_FILE.fullmatch(stem):
        return match["case"]
    name = without_ending(stem, endings)
    modality = MODALITY.fullmatch(name)
    if modality and modality["case"] in known:
        return modality["case"]
    return name


def without_ending(name: str, endings: Sequence[str]) -> str:
    """Return a name without the first of the endings that it has."""
    return next(
        (
            name.removesuffix(ending)
            for ending in endings
            if name.endswith(ending) and name != ending
        ),
        name,
    )


def with_logits(
    cases: CaseList,
    logits: Sequence[Path],
    *,
    are_labels: bool = False,
    is_single: bool = False,
    first_label: int = 0,
) -> CaseList:
    """Add the logits of each case, or its `problem`; given are a folder, or the files of one case.

    With `are_labels`, add its label map or its structures; `is_single`: the images are files of one
    case. Files per label begin with `first_label`, which is 1 without a background.
    """
    folder = logits[0]
    suffixes = VOLUME_SUFFIXES if are_labels else LOGITS_SUFFIXES
    if not folder.is_dir() or len(logits) > 1:
        case = _only_case(cases, logits, suffixes, "labels" if are_labels else "logits")
        if are_labels and len(logits) > 1:
            case = _with_structures(case, logits)
        else:
            case = replace(case, logits=tuple(logits))
        return CaseList([case], cases.notes)
    by_stem = files_by_stem(folder, suffixes)
    if are_labels:
        add = partial(_with_own_labels, folders=case_folders(folder), is_single=is_single)
    else:
        add = partial(_with_own_logits, first_label=first_label)
    added = [add(case, by_stem, folder) for case in cases]
    taken = {path for case in added for path in case.logits}
    known = {case.case_id for case in cases}
    stray = [
        path.name
        for stem, paths in by_stem.items()
        for path in paths
        if path not in taken and case_of(stem, known, (*LOGITS_NAMES, *LABEL_SUFFIXES)) not in known
    ]
    what = counted(len(stray), "label map" if are_labels else "file") + (
        "" if are_labels else " of logits"
    )
    notes = [f"{folder}: ignored {what} without images, such as {min(stray)}"] if stray else []
    return CaseList(added, [*cases.notes, *notes])


def _with_own_logits(
    case: CaseFiles, by_stem: Mapping[str, list[Path]], folder: Path, *, first_label: int
) -> CaseFiles:
    name = case.case_id
    candidates = [path for ending in ("", *LOGITS_NAMES) for path in by_stem.get(name + ending, [])]
    # nnU-Net puts its label map CASE.nii.gz beside CASE.npz, and so does this tool beside
    # CASE_logits: explicit names win.
    if candidates:
        telling = [
            path
            for path in candidates
            if suffix_of(path) in SCORES_SUFFIXES or stem_of(path) != name
        ]
        return _with_only(case, "logits", telling or candidates, "one file of logits", folder)
    by_label: dict[int, list[Path]] = {}
    for stem, paths in by_stem.items():
        if (match := _LABEL_FILE.fullmatch(stem)) and match["case"] == name:
            by_label.setdefault(int(match["number"]), []).extend(paths)
    of_labels = [path for _, paths in sorted(by_label.items()) for path in paths]
    if not of_labels:
        expected = f"expected {name}.nii.gz, {name}.npz or the like; label maps and structures need --input-type labels"
        return case.lacking(f"no logits in {folder}; {expected}", f"no logits in {folder}")
    if sorted(by_label) == list(range(first_label, first_label + len(of_labels))):
        return replace(case, logits=tuple(of_labels))
    found = f"found {file_names(of_labels)} in {folder}"
    problem = f"expected one file for each label from {first_label}, {found}"
    if min(by_label) == 1 and first_label == 0:
        problem = (
            f"the background seems to be missing: {problem}; --add-background computes it from "
            "the probabilities of labels 1, 2, …"
        )
    return case.lacking(problem)


def _with_own_labels(
    case: CaseFiles,
    by_stem: Mapping[str, list[Path]],
    folder: Path,
    *,
    folders: Mapping[str, Path],
    is_single: bool,
) -> CaseFiles:
    if candidates := label_maps(by_stem, case.case_id, LABEL_SUFFIXES, but=case.images):
        return _with_only(case, "logits", candidates, "one label map", folder)
    if case.case_id in folders:
        structures = list_files(folders[case.case_id], VOLUME_SUFFIXES)
    else:
        structures = []
    if not structures and is_single:
        structures = [
            path for paths in by_stem.values() for path in paths if path not in case.images
        ]
    if structures:
        return _with_structures(case, structures)
    expected = f"expected {case.case_id}.nii.gz or the like, or a folder {case.case_id} with one file per structure"
    return case.lacking(f"no label map in {folder}; {expected}", f"no label map in {folder}")


def label_maps(
    by_stem: Mapping[str, list[Path]],
    case_id: str,
    endings: Sequence[str],
    but: Sequence[Path] = (),
) -> Sequence[Path]:
    """Return the files that may be the label map of a case: names that tell come first, then formats of segmentations."""
    telling = [path for ending in endings for path in by_stem.get(case_id + ending, [])]
    plain = [path for path in by_stem.get(case_id, []) if path not in but]
    return telling or [path for path in plain if suffix_of(path) in LABELS_SUFFIXES] or plain


def _with_structures(case: CaseFiles, paths: Sequence[Path]) -> CaseFiles:
    """Return the case with its structures, sorted by name."""
    ordered = tuple(sorted(paths, key=lambda path: (stem_of(path), path)))
    case = replace(case, logits=ordered, are_structures=True)
    counts = Counter(map(stem_of, ordered))
    twice = [str(path) for path in ordered if counts[stem_of(path)] > 1]
    if twice:
        return case.lacking(f"expected one file per structure, found {listed(twice)}")
    return case


def case_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of volumes in a folder by the name of the case, such as those of structures, or `segmentations` in them."""
    # TotalSegmentator's data sets have the latter.
    names = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    inner = {name: folder / name / "segmentations" for name in names}
    folders = {name: path if path.is_dir() else folder / name for name, path in inner.items()}
    return {name: path for name, path in folders.items() if list_files(path, VOLUME_SUFFIXES)}


def _with_companions(cases: CaseList, source: Path, what: str, endings: Sequence[str]) -> CaseList:
    """Add the mask or the labels of each case; `what` is "mask" or "labels"."""
    if not source.is_dir():
        case = _only_case(cases, [source], VOLUME_SUFFIXES, what)
        return CaseList([_with_only(case, what, [source], "", source)], cases.notes)
    by_stem = files_by_stem(source, VOLUME_SUFFIXES)
    found = []
    for case in cases:
        candidates = label_maps(by_stem, case.case_id, endings)
        none = case.lacking(
            f"expected one file of {what} in {source}, found none", f"no {what} in {source}"
        )
        found.append(
            _with_only(case, what, candidates, f"one file of {what}", source)
            if candidates
            else none
        )
    return CaseList(found, cases.notes)


def with_strokes(cases: CaseList, sources: Sequence[Path]) -> CaseList:
    """Add the strokes of each case that has some: of a folder by its name, or the files of the only case; may raise InputError."""
    folder = sources[0]
    if not folder.is_dir():
        case = _only_case(cases, sources, VOLUME_SUFFIXES, "strokes")
        return CaseList([replace(case, strokes=tuple(sources))], cases.notes)
    if len(sources) > 1:
        raise InputError(f"{folder}: give one folder of strokes, or the files of one case")
    by_stem = files_by_stem(folder, VOLUME_SUFFIXES)
    strokes = [
        [
            path
            for ending in ("", *STROKES_SUFFIXES)
            for path in by_stem.pop(case.case_id + ending, ())
        ]
        for case in cases
    ]
    added = CaseList(
        (replace(case, strokes=tuple(own)) for case, own in zip(cases, strokes, strict=True)),
        cases.notes,
    )
    names = [case.case_id for case in cases]
    number = sum(map(bool, strokes))
    if by_stem or not number:
        expected = f"expected names such as {names[0]}.nii.gz; the cases are {listed(names)}"
        raise InputError(
            f"{folder}: {listed(sorted(by_stem)) or 'no file'}: strokes of no case; {expected}"
        )
    if number < len(added):
        added.notes.append(
            f"{folder}: strokes of {number} of {counted(len(added), 'case')}; the others are refined without"
        )
    return added


def _with_only(
    case: CaseFiles, what: str, paths: Sequence[Path], expected: str, folder: Path
) -> CaseFiles:
    """Return the case with its "logits", "mask" or "labels", or with a problem if several files may be that."""
    if len(paths) > 1:
        return case.lacking(f"expected {expected}, found {file_names(paths)} in {folder}")
    chosen: dict[str, Any] = {what: tuple(paths) if what == "logits" else paths[0]}
    return replace(case, **chosen)


def labels_of(cases: Sequence[CaseFiles], labels: Path) -> dict[str, Path]:
    """Return the label map of each case that has one."""
    plain = CaseList(replace(case, labels=None, problem=None) for case in cases)
    return {
        case.case_id: case.labels
        for case in _with_companions(plain, labels, "labels", LABEL_SUFFIXES)
        if case.labels is not None
    }


def list_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the folder's files of the given formats, sorted by name.

    Hidden ones, such as files being written, are skipped.
    """
    # A link to nothing, as to data that were not fetched, counts as a file: its case must fail.
    try:
        paths = sorted(
            path
            for path in folder.iterdir()
            if suffix_of(path) in suffixes and not path.name.startswith(".")
        )
        return [
            path for path in paths if path.is_file() or (path.is_symlink() and not path.exists())
        ]
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror or error}") from error


def _only_case(
    cases: CaseList, paths: Sequence[Path], suffixes: tuple[str, ...], what: str
) -> CaseFiles:
    """Return the only case.

    Raise InputError for several, or unless its files are there and can be read by their names.
    """
    for path in paths:
        file_to_read(path, suffixes)
    if len(cases) != 1:
        raise InputError(
            f"{paths[0]}: a file of {what} for {len(cases)} cases; give a folder, or the images of one case"
        )
    return cases[0]


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


def file_names(paths: Sequence[Path]) -> str:
    """Return the names of some files, for messages."""
    return listed([path.name for path in sorted(paths)])
