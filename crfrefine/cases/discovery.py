"""Assign files to cases: the naming of nnU-Net, single files, and the file names of other tools.

Contents are read later.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import multimode

from crfrefine.base.text import counted, listed
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.dataset_description import read_descriptions
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
    for path in (*image_paths, *logits_paths):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")

    folder = None
    for path in image_paths:
        if path.is_dir():
            if len(image_paths) > 1:
                raise InputError(f"{path}: give one folder of images, or the files of one case")
            folder = path
    if folder is None:
        cases = CaseList([_case_of_files(image_paths)])
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
    if labels is not None:
        cases = _with_companions(cases, labels, "labels", LABEL_SUFFIXES)
    return cases


def _paths_of(paths: str | Path | Sequence[Path]) -> tuple[Path, ...]:
    if isinstance(paths, str | Path):
        return (Path(paths),)
    return tuple(map(Path, paths))


def _case_of_files(paths: tuple[Path, ...]) -> CaseFiles:
    """Return the case of single files, one per modality.

    Raises InputError if their names are those of several cases.
    """
    # Without other files to compare with, only the number of the first modality, 0000, is certainly
    # not part of the name.
    case_of_path: dict[Path, str] = {}
    for path in paths:
        file_to_read(path, VOLUME_SUFFIXES)
        match = MODALITY.fullmatch(stem_of(path))
        if match and int(match["number"]) == 0:
            case_of_path[path] = match["case"]

    case_ids = sorted(set(case_of_path.values()))
    if len(case_ids) > 1:
        raise InputError(
            f"{paths[0]}: files of {len(case_ids)} cases, {listed(case_ids)}; "
            "give the folder of the images"
        )
    return CaseFiles(case_of_path.get(paths[0], stem_of(paths[0])), paths)


def _cases_of_folder(folder: Path, logits: Sequence[Path]) -> CaseList:
    """Return the cases of a folder of images; InputError if there is none."""
    paths = list_files(folder, VOLUME_SUFFIXES)
    if not paths:
        nested = _cases_of_case_folders(folder)
        if nested:
            example = nested[0].images[0].relative_to(folder)
            note = (
                f"{folder}: a folder for each case, as in TotalSegmentator's data sets, "
                f"with its image, such as {example}"
            )
            return CaseList(nested, [note])
    return _cases_of_volumes(paths, folder, logits)


def _cases_of_volumes(paths: Sequence[Path], folder: Path, logits: Sequence[Path]) -> CaseList:
    """Return the cases of the volumes in a folder; InputError if none is an image."""
    beside = _files_beside_images(paths)
    images = [path for path in paths if path not in beside]
    logits_stems = set[str]()
    if logits:
        logits_stems = _stems_elsewhere(logits[0], folder, LOGITS_SUFFIXES)
    is_numbered = any(stem_of(path).endswith("_0000") for path in paths)
    by_case = _group_modalities(images, is_numbered, logits_stems)
    if not by_case:
        raise _no_case(folder)

    notes = []
    if beside:
        notes.append(
            f"{folder}: not taken for images: {counted(len(beside), 'file')} beside them, "
            f"such as {beside[0].name}"
        )
    num_expected, reason = _expected_modalities(by_case, folder)
    cases = []
    for case_id in sorted(by_case):
        cases.append(by_case[case_id].as_case(case_id, folder, num_expected, reason))
    return CaseList(cases, notes)


def _cases_of_case_folders(folder: Path) -> list[CaseFiles]:
    """Return the cases of TotalSegmentator's data sets, a folder for each: `s0001/ct.nii.gz`."""
    cases = []
    for place in _visible_folders(folder):
        files = list_files(place, VOLUME_SUFFIXES)
        images = [path for path in files if stem_of(path) in _IMAGES_OF_CASE_FOLDERS]
        if len(images) == 1:
            cases.append(CaseFiles(place.name, tuple(images)))
    return cases


def _files_beside_images(paths: Sequence[Path]) -> list[Path]:
    """Return the label maps, outputs of this tool and logits beside images: they are not cases."""
    # Such as with -i FOLDER -p FOLDER.
    stems = {stem_of(path) for path in paths}
    segmentations = [path for path in paths if suffix_of(path) in LABELS_SUFFIXES]
    labels = []
    for path in paths:
        stem = stem_of(path)
        name = without_ending(stem, LABEL_SUFFIXES)
        if name != stem and name in stems:
            labels.append(path)
    probabilities = probabilities_beside(paths, stems | _without_modality(stems))
    # A segmentation may have the name of a label map, too.
    return [*dict.fromkeys([*segmentations, *labels, *probabilities])]


def _without_modality(stems: Iterable[str]) -> set[str]:
    """Return the names of cases in names that end in the number of a modality."""
    names = set[str]()
    for stem in stems:
        match = MODALITY.fullmatch(stem)
        if match:
            names.add(match["case"])
    return names


def _stems_elsewhere(source: Path, images: Path, suffixes: Sequence[str]) -> set[str]:
    """Return the names without suffix in a folder; none for a file, or the folder of the images."""
    if not source.is_dir() or source.samefile(images):
        return set()
    return set(files_by_stem(source, suffixes))


@dataclass
class _ImagesOfCase:
    """The images in a folder whose names give the same case."""

    unnumbered: list[Path] = field(default_factory=list)
    by_number: dict[int, list[Path]] = field(default_factory=dict)  # by the number of the modality

    @property
    def num_modalities(self) -> int:
        """One more than the largest number; 0 without numbers."""
        return max(self.by_number, default=-1) + 1

    def as_case(self, case_id: str, folder: Path, num_expected: int, who_says_so: str) -> CaseFiles:
        """Return a case of one file, or of one per modality, or with a problem."""
        numbers = sorted(self.by_number)
        paths = [*self.unnumbered]
        for number in numbers:
            paths += self.by_number[number]
        images = self.unnumbered[:1] or [self.by_number[number][0] for number in numbers]
        case = CaseFiles(case_id, tuple(images))
        if len(paths) > len(images):
            return case.lacking(
                "expected one image, or one file per numbered modality, "
                f"found {file_names(paths)} in {folder}"
            )
        expected = range(num_expected)
        if self.unnumbered or numbers == [*expected]:
            return case
        problem = (
            f"expected the modalities {_list_numbers(expected)}, {who_says_so}; "
            f"found {_list_numbers(numbers)} in {folder}"
        )
        absent = sorted(set(expected).difference(numbers))
        return case.lacking(
            problem, *(f"no modality {number:04d} in {folder}" for number in absent)
        )


def _group_modalities(
    paths: Iterable[Path], is_numbered: bool, logits_stems: Collection[str]
) -> dict[str, _ImagesOfCase]:
    """Return the images by their cases.

    Four digits at the end may also belong to the name of a case, unless something shows that
    modalities are numbered (`is_numbered`, or logits of the name without digits).
    """
    by_case: dict[str, _ImagesOfCase] = {}
    for path in paths:
        stem = stem_of(path)
        match = MODALITY.fullmatch(stem)
        is_modality = match is not None and (is_numbered or match["case"] in logits_stems)
        if match and is_modality and stem not in logits_stems:
            images = by_case.setdefault(match["case"], _ImagesOfCase())
            images.by_number.setdefault(int(match["number"]), []).append(path)
        else:
            by_case.setdefault(stem, _ImagesOfCase()).unnumbered.append(path)
    return by_case


def _no_case(folder: Path) -> InputError:
    reason = "it is empty"
    if any(folder.iterdir()):
        reason = "it has no file with one of these suffixes"
    suffixes = ", ".join(VOLUME_SUFFIXES)
    return InputError(f"{folder}: no case found: {reason} ({suffixes}){describe_others(folder)}")


def _expected_modalities(by_case: Mapping[str, _ImagesOfCase], folder: Path) -> tuple[int, str]:
    """Return how many modalities each case must have, and which source says so."""
    counts = [images.num_modalities for images in by_case.values() if images.by_number]
    if not counts:
        return 0, ""
    description = next(read_descriptions([folder]), None)
    if description is not None and description.channel_names:
        return len(description.channel_names), f"as {description.path.name} names"
    # The most frequent number; of two equally frequent ones the larger, so that missing files are
    # found.
    return max(multimode(counts)), "as in the other cases"


def _list_numbers(numbers: Iterable[int]) -> str:
    return listed([f"{number:04d}" for number in numbers], _MAX_MODALITIES)


def _with_imageless(
    cases: CaseList, images: Path, labels: Path | None, logits: Sequence[Path]
) -> CaseList:
    """Add the cases that are known only from their labels or logits, each with its `problem`."""
    case_ids = {case.case_id for case in cases}
    names = set[str]()
    for source in logits:
        for stem in _stems_elsewhere(source, images, LOGITS_SUFFIXES):
            names.add(case_of(stem, case_ids, LOGITS_NAMES))
    if labels is not None:
        for stem in _stems_elsewhere(labels, images, VOLUME_SUFFIXES):
            names.add(case_of(stem, case_ids, LABEL_SUFFIXES))

    lacking = f"no image in {images}"
    problem = f"{lacking}; expected CASE or CASE_0000 with one of {', '.join(VOLUME_SUFFIXES)}"
    added = [CaseFiles(name, ()).lacking(problem, lacking) for name in names - case_ids]
    return CaseList(sorted([*cases, *added], key=lambda case: case.case_id), cases.notes)


def case_of(stem: str, case_ids: Collection[str], endings: Sequence[str]) -> str:
    """Return the case of a file name.

    It is the name without an ending, the number of a label, or that of a modality if the case is
    one of `case_ids`.
    """
    if stem in case_ids:
        return stem
    of_label = _LABEL_FILE.fullmatch(stem)
    if of_label:
        return of_label["case"]
    name = without_ending(stem, endings)
    modality = MODALITY.fullmatch(name)
    if modality and modality["case"] in case_ids:
        return modality["case"]
    return name


def without_ending(name: str, endings: Sequence[str]) -> str:
    """Return a name without the first of the endings that it has."""
    for ending in endings:
        if name.endswith(ending) and name != ending:
            return name.removesuffix(ending)
    return name


def with_logits(
    cases: CaseList,
    logits: Sequence[Path],
    *,
    are_labels: bool = False,
    is_single: bool = False,
    first_label: int = 0,
) -> CaseList:
    """Add the logits of each case, or its `problem`.

    Args:
        cases: the cases.
        logits: a folder, or the files of the only case.
        are_labels: add the label map or the structures of each case instead.
        is_single: the images are files of one case, and not a folder.
        first_label: the label of the first of several files; 1 without a background.
    """
    if not logits[0].is_dir() or len(logits) > 1:
        suffixes = LOGITS_SUFFIXES
        what = "logits"
        if are_labels:
            suffixes = VOLUME_SUFFIXES
            what = "labels"
        case = _only_case(cases, logits, suffixes, what)
        if are_labels and len(logits) > 1:
            case = _with_structures(case, logits)
        else:
            case = replace(case, logits=tuple(logits))
        return CaseList([case], cases.notes)
    if are_labels:
        return _with_labels_in(logits[0], cases, is_single)
    return _with_logits_in(logits[0], cases, first_label)


def _with_logits_in(folder: Path, cases: CaseList, first_label: int) -> CaseList:
    """Add the logits of each case in a folder, or its `problem`."""
    by_stem = files_by_stem(folder, LOGITS_SUFFIXES)
    added = [_with_logits_of(case, by_stem, folder, first_label) for case in cases]
    return _with_strays_noted(CaseList(added, cases.notes), folder, by_stem, "file", " of logits")


def _with_labels_in(folder: Path, cases: CaseList, is_single: bool) -> CaseList:
    """Add the label map or the structures of each case in a folder, or its `problem`."""
    by_stem = files_by_stem(folder, VOLUME_SUFFIXES)
    folders = case_folders(folder)
    added = []
    for case in cases:
        structures = folders.get(case.case_id)
        added.append(_with_labels_of(case, by_stem, folder, structures, is_single))
    return _with_strays_noted(CaseList(added, cases.notes), folder, by_stem, "label map")


def _with_strays_noted(
    cases: CaseList, folder: Path, by_stem: Mapping[str, Sequence[Path]], noun: str, of: str = ""
) -> CaseList:
    """Note the files in a folder that belong to no case, if there are any."""
    stray = _stray_files(by_stem, cases)
    if not stray:
        return cases
    what = f"{counted(len(stray), noun)}{of}"
    note = f"{folder}: ignored {what} without images, such as {stray[0]}"
    return CaseList(cases, [*cases.notes, note])


def _stray_files(by_stem: Mapping[str, Sequence[Path]], cases: Sequence[CaseFiles]) -> list[str]:
    """Return the sorted names of the files in a folder of logits that belong to no case."""
    case_ids = {case.case_id for case in cases}
    taken: set[Path] = set()
    for case in cases:
        taken.update(case.logits)
    stray = []
    for stem, paths in by_stem.items():
        if case_of(stem, case_ids, (*LOGITS_NAMES, *LABEL_SUFFIXES)) not in case_ids:
            stray += [path.name for path in paths if path not in taken]
    return sorted(stray)


def _with_logits_of(
    case: CaseFiles, by_stem: Mapping[str, list[Path]], folder: Path, first_label: int
) -> CaseFiles:
    """Return a case with its logits in a folder: one file, or one for each label."""
    candidates = _files_with_endings(by_stem, case.case_id, ("", *LOGITS_NAMES))
    if candidates:
        explicit = [path for path in candidates if _names_logits(path, case.case_id)]
        return _with_only(case, "logits", explicit or candidates, "one file of logits", folder)
    by_label = _files_by_label(by_stem, case.case_id)
    if by_label:
        return _with_file_per_label(case, by_label, folder, first_label)
    lacking = f"no logits in {folder}"
    return case.lacking(
        f"{lacking}; expected {case.case_id}.nii.gz, {case.case_id}.npz or the like; "
        "label maps and structures need --input-type labels",
        lacking,
    )


def _names_logits(path: Path, case_id: str) -> bool:
    """Return whether the name of a file says that it holds logits, and not a label map.

    nnU-Net puts its label map CASE.nii.gz beside CASE.npz, and so does this tool beside
    CASE_logits.
    """
    return suffix_of(path) in SCORES_SUFFIXES or stem_of(path) != case_id


def _with_file_per_label(
    case: CaseFiles, by_label: Mapping[int, list[Path]], folder: Path, first_label: int
) -> CaseFiles:
    """Return a case with a file for each label, or with a problem if one is missing or double."""
    labels = sorted(by_label)
    paths: list[Path] = []
    for label in labels:
        paths += by_label[label]
    if labels == [*range(first_label, first_label + len(paths))]:
        return replace(case, logits=tuple(paths))

    problem = (
        f"expected one file for each label from {first_label}, "
        f"found {file_names(paths)} in {folder}"
    )
    if labels[0] == 1 and first_label == 0:
        problem = (
            f"the background seems to be missing: {problem}; --add-background computes it from "
            "the probabilities of labels 1, 2, …"
        )
    return case.lacking(problem)


def _files_with_endings(
    by_stem: Mapping[str, list[Path]], name: str, endings: Sequence[str]
) -> list[Path]:
    """Return the files of a name with one of the endings, in the order of the endings."""
    paths: list[Path] = []
    for ending in endings:
        paths += by_stem.get(name + ending, [])
    return paths


def _files_by_label(by_stem: Mapping[str, list[Path]], case_id: str) -> dict[int, list[Path]]:
    """Return the files of single labels of a case by the label."""
    by_label: dict[int, list[Path]] = {}
    for stem, paths in by_stem.items():
        match = _LABEL_FILE.fullmatch(stem)
        if match and match["case"] == case_id:
            by_label.setdefault(int(match["number"]), []).extend(paths)
    return by_label


def _with_labels_of(
    case: CaseFiles,
    by_stem: Mapping[str, list[Path]],
    folder: Path,
    structures: Path | None,
    is_single: bool,
) -> CaseFiles:
    """Return a case with its label map in a folder, or with its folder of structures.

    The structures of a single case (`is_single`) may also lie in the folder itself.
    """
    candidates = label_maps(by_stem, case.case_id, LABEL_SUFFIXES, but=case.images)
    if candidates:
        return _with_only(case, "logits", candidates, "one label map", folder)

    files: list[Path] = []
    if structures is not None:
        files = list_files(structures, VOLUME_SUFFIXES)
    elif is_single:
        files = [path for path in list_files(folder, VOLUME_SUFFIXES) if path not in case.images]
    if files:
        return _with_structures(case, files)
    lacking = f"no label map in {folder}"
    return case.lacking(
        f"{lacking}; expected {case.case_id}.nii.gz or the like, "
        f"or a folder {case.case_id} with one file per structure",
        lacking,
    )


def label_maps(
    by_stem: Mapping[str, list[Path]],
    case_id: str,
    endings: Sequence[str],
    but: Sequence[Path] = (),
) -> Sequence[Path]:
    """Return the files that may be the label map of a case, without those in `but`.

    Names with an ending come first, then formats of segmentations.
    """
    with_ending = _files_with_endings(by_stem, case_id, endings)
    if with_ending:
        return with_ending
    plain = [path for path in by_stem.get(case_id, []) if path not in but]
    segmentations = [path for path in plain if suffix_of(path) in LABELS_SUFFIXES]
    return segmentations or plain


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
    """Return the folders with volumes in a folder by the name of their case.

    The volumes, such as structures, lie in the folder of the case, or in `segmentations` in it, as
    in TotalSegmentator's data sets.
    """
    folders = {}
    for place in _visible_folders(folder):
        inner = place / "segmentations"
        volumes = inner if inner.is_dir() else place
        if list_files(volumes, VOLUME_SUFFIXES):
            folders[place.name] = volumes
    return folders


def _visible_folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted by name, without hidden ones."""
    folders = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            folders.append(path)
    return folders


def _with_companions(cases: CaseList, source: Path, what: str, endings: Sequence[str]) -> CaseList:
    """Add the mask or the labels of each case; `what` is "mask" or "labels"."""
    if not source.is_dir():
        case = _only_case(cases, [source], VOLUME_SUFFIXES, what)
        return CaseList([_with_file(case, what, source)], cases.notes)

    by_stem = files_by_stem(source, VOLUME_SUFFIXES)
    expected = f"one file of {what}"
    added = []
    for case in cases:
        candidates = label_maps(by_stem, case.case_id, endings)
        if candidates:
            added.append(_with_only(case, what, candidates, expected, source))
        else:
            problem = f"expected {expected} in {source}, found none"
            added.append(case.lacking(problem, f"no {what} in {source}"))
    return CaseList(added, cases.notes)


def with_strokes(cases: CaseList, sources: Sequence[Path]) -> CaseList:
    """Add the strokes of each case that has some: a folder's by their names, or single files.

    Raises InputError: no strokes, strokes of no case, or single files for several cases.
    """
    folder = sources[0]
    if not folder.is_dir():
        case = _only_case(cases, sources, VOLUME_SUFFIXES, "strokes")
        return CaseList([replace(case, strokes=tuple(sources))], cases.notes)
    if len(sources) > 1:
        raise InputError(f"{folder}: give one folder of strokes, or the files of one case")

    by_stem = files_by_stem(folder, VOLUME_SUFFIXES)
    added = CaseList(notes=cases.notes)
    num_with_strokes = 0
    for case in cases:
        strokes: list[Path] = []
        for ending in ("", *STROKES_SUFFIXES):
            strokes += by_stem.pop(case.case_id + ending, [])
        added.append(replace(case, strokes=tuple(strokes)))
        num_with_strokes += bool(strokes)

    if by_stem or not num_with_strokes:
        raise _strokes_of_no_case(by_stem, cases, folder)
    if num_with_strokes < len(added):
        added.notes.append(
            f"{folder}: strokes of {num_with_strokes} of {counted(len(added), 'case')}; "
            "the others are refined without"
        )
    return added


def _strokes_of_no_case(
    stems: Collection[str], cases: Sequence[CaseFiles], folder: Path
) -> InputError:
    """Return the error for a folder with strokes of no case, or without any."""
    strokes = listed(sorted(stems)) or "no file"
    names = [case.case_id for case in cases]
    return InputError(
        f"{folder}: {strokes}: strokes of no case; "
        f"expected names such as {names[0]}.nii.gz; the cases are {listed(names)}"
    )


def _with_only(
    case: CaseFiles, what: str, paths: Sequence[Path], expected: str, folder: Path
) -> CaseFiles:
    """Return the case with a file, like `_with_file`, or with a problem if there are several."""
    if len(paths) > 1:
        return case.lacking(f"expected {expected}, found {file_names(paths)} in {folder}")
    return _with_file(case, what, paths[0])


def _with_file(case: CaseFiles, what: str, path: Path) -> CaseFiles:
    """Return the case with its "logits", "mask" or "labels"."""
    if what == "logits":
        return replace(case, logits=(path,))
    if what == "mask":
        return replace(case, mask=path)
    return replace(case, labels=path)


def labels_of(cases: Sequence[CaseFiles], labels: Path) -> dict[str, Path]:
    """Return the label map of each case that has one."""
    plain = CaseList(replace(case, labels=None, problem=None) for case in cases)
    by_case = {}
    for case in _with_companions(plain, labels, "labels", LABEL_SUFFIXES):
        if case.labels is not None:
            by_case[case.case_id] = case.labels
    return by_case


def list_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the folder's files of the given formats, sorted by name.

    Hidden ones, such as files being written, are skipped.
    """
    paths = []
    try:
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or suffix_of(path) not in suffixes:
                continue
            # A link to nothing, as to data that were not fetched, counts as a file: its case must
            # fail.
            if path.is_file() or (path.is_symlink() and not path.exists()):
                paths.append(path)
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror or error}") from error
    return paths


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
            f"{paths[0]}: a file of {what} for {len(cases)} cases; "
            "give a folder, or the images of one case"
        )
    return cases[0]


def files_by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """Return the folder's files of the given formats by their names without suffix."""
    by_stem: dict[str, list[Path]] = {}
    for path in list_files(folder, suffixes):
        by_stem.setdefault(stem_of(path), []).append(path)
    return by_stem


def probabilities_beside(paths: Iterable[Path], names: Collection[str]) -> list[Path]:
    """Return the files of probabilities of cases with one of the names.

    Such as `CASE_probabilities`: they are not separate cases.
    """
    stems = set[str]()
    for ending in LOGITS_NAMES:
        stems.update(name + ending for name in names)
    return [path for path in paths if stem_of(path) in stems]


def file_names(paths: Sequence[Path]) -> str:
    """Return the names of some files, for messages."""
    return listed([path.name for path in sorted(paths)])
