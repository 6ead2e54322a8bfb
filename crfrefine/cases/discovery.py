"""Find the files of cases: by the names of `conventions` in a folder, by a pattern, or one by one.

Contents are read later.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from crfrefine.base.text import counted, listed
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.conventions import (
    IMAGE,
    IMAGE_IN_FOLDER,
    IMAGE_WORDS,
    LABEL_MAP,
    LABEL_WORDS,
    LABELS,
    LOGITS,
    MASK,
    MASK_WORDS,
    NUMBERED,
    OTHER_WORDS,
    SCORE_WORDS,
    STROKES,
    STRUCTURES,
    Kind,
    without_word,
)
from crfrefine.cases.dataset_description import read_dataset_description
from crfrefine.cases.listing import Files, file_names
from crfrefine.cases.patterns import (
    MAX_MODALITIES,
    Match,
    check_pattern,
    describe_found,
    find_matches,
    folder_of,
    holds_many,
    is_pattern,
    list_files,
    names_part,
    nearest_files,
    of_case,
)
from crfrefine.cases.proposals import describe_patterns, find_patterns, propose
from crfrefine.errors import InputError
from crfrefine.io.paths import (
    LABELS_SUFFIXES,
    LOGITS_SUFFIXES,
    VOLUME_SUFFIXES,
    describe_others,
    file_to_read,
    stem_of,
    suffix_of,
)

_FOUR_DIGITS = re.compile(r"[0-9]{4}")


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
    """Find the cases in folders, by patterns, or the one case of single files, sorted by name.

    Incomplete ones have a `problem`.

    The images are a folder, a pattern, or the files of one case, one per modality; logits a folder,
    a pattern, one file with all labels, or one per label in order. With the input type "labels"
    they are label maps, or one file per structure, in a folder per case. With `include_imageless`,
    labels or logits without an image count as incomplete cases. With `add_background`, files per
    label begin with label 1. Raises InputError: a path that does not exist, no case, or several
    where one is expected.
    """
    image_paths = _paths_of(images)
    logits_paths = _paths_of(logits or ())
    for path in (*image_paths, *logits_paths):
        if not path.exists() and not is_pattern(path):
            raise InputError(f"{path}: no such file or folder")
        if len(image_paths) > 1 and path in image_paths and holds_many(path):
            raise InputError(
                f"{path}: give one folder of images, one pattern, or the files of one case"
            )

    is_single = not holds_many(image_paths[0])
    if is_single:
        cases = CaseList([_case_of_files(image_paths)])
    else:
        output = next(iter(logits_paths), None)
        cases = _cases_of_images(image_paths[0], output, masks, labels)
        if include_imageless:
            cases = _with_imageless(cases, image_paths[0], ((output, LOGITS), (labels, LABELS)))
    if logits_paths:
        cases = with_logits(
            cases,
            logits_paths,
            are_labels=input_type == "labels",
            is_single=is_single,
            first_label=int(add_background),
        )
    if masks is not None:
        cases = with_files(cases, masks, MASK)
    if labels is not None:
        cases = with_files(cases, labels, LABELS)
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
    for path in paths:
        file_to_read(path, VOLUME_SUFFIXES)
    first = [stem_of(path) for path in paths if stem_of(path).endswith("_0000")]
    case_ids = sorted({stem.removesuffix("_0000") for stem in first} - {""})
    if len(case_ids) > 1:
        raise InputError(
            f"{paths[0]}: files of {len(case_ids)} cases, {listed(case_ids)}; "
            "give the folder of the images"
        )
    stem = stem_of(paths[0])
    return CaseFiles(stem.removesuffix("_0000") or stem, paths)


def _cases_of_images(place: Path, output: Path | None, *others: Path | None) -> CaseList:
    """Return the cases of a folder or of a pattern of images; InputError if there is none.

    `output` and `others` are where other files of the cases are.
    """
    images, beside = _find_images(place, output, *others)
    if not images:
        raise _no_case(place)
    names = [match.path.name for match in images]
    if not is_pattern(place) and all(find_patterns(names)):
        raise InputError(
            f"{place}: images and their label maps have names of the same kind"
            f"{describe_patterns(place, *find_patterns(names))}"
        )

    by_case: dict[str, list[Match]] = {}
    for match in images:
        by_case.setdefault(match.case, []).append(match)
    modalities, reason = _expected_modalities(by_case, place)
    cases = []
    for case_id in sorted(by_case):
        cases.append(_case_of_images(case_id, by_case[case_id], modalities, reason, place))
    notes = []
    found = ""
    if is_pattern(place):
        found = describe_found(place, images, modalities)
    elif images[0].path.parent != place:
        notes = [
            f"{place}: a folder for each case, as in TotalSegmentator's data sets, "
            f"with its image, such as {images[0].path.relative_to(place)}"
        ]
    if beside:
        notes.append(
            f"{place}: not taken for images: {counted(len(beside), 'file')} beside them, "
            f"such as {beside[0]}"
        )
    return CaseList(cases, notes, found)


def _find_images(
    place: Path, output: Path | None, *others: Path | None
) -> tuple[list[Match], list[str]]:
    """Return the images of a folder or pattern, and the names of files beside them.

    Four digits at the end may also belong to the name of a case, unless something shows that
    modalities are numbered: a first one, 0000, or an output of the name without digits.
    """
    numbered: dict[Path, Match] = {}
    if is_pattern(place):
        check_pattern(place, ("case", "modality"))
        found = find_matches(place, VOLUME_SUFFIXES)
    else:
        found = find_matches(place / IMAGE, VOLUME_SUFFIXES)
        if not found:
            found = find_matches(place / IMAGE_IN_FOLDER, VOLUME_SUFFIXES)
        for match in find_matches(place / NUMBERED, VOLUME_SUFFIXES):
            numbered[match.path] = match
    taken = set[Path]()
    for other in (output, *others):
        if other is not None and is_pattern(other) and other != place:
            taken.update(match.path for match in find_matches(other, LOGITS_SUFFIXES))
    outputs = set[str]()
    if output is not None and output.is_dir() and place.is_dir() and not output.samefile(place):
        outputs.update(stem_of(path) for path in list_files(output, LOGITS_SUFFIXES))

    names = {match.case for match in found}
    cases = names.union(match.case for match in numbered.values())
    is_numbered = any(match.modality == "0000" for match in numbered.values())
    # `{modality}` alone would also take a label map beside the images for one.
    words = OTHER_WORDS if "{modality}" in str(place) else ()
    images = []
    beside = []
    for match in found:
        modality = numbered.get(match.path, match)
        if match.modality.lower() in words or _is_beside(match, names, cases):
            if match.path not in taken:
                beside.append(match.path.name)
        elif match.case not in outputs and (is_numbered or modality.case in outputs):
            images.append(modality)
        else:
            images.append(match)
    return [match for match in images if match.path not in taken], beside


def _is_beside(match: Match, names: Collection[str], cases: Collection[str]) -> bool:
    """Return whether a file is a label map, an output of this tool or logits beside images."""
    # Such as with -i FOLDER -p FOLDER. A segmentation may have the name of a label map, too.
    if suffix_of(match.path) in LABELS_SUFFIXES:
        return True
    labeled = without_word(match.case, LABEL_WORDS)
    scored = without_word(match.case, SCORE_WORDS)
    return (labeled != match.case and labeled in names) or (
        scored != match.case and scored in cases
    )


def _no_case(place: Path) -> InputError:
    if is_pattern(place):
        return InputError(
            f"{place}: no image by this pattern, apart from what other options name"
            f"{nearest_files(place)}{propose(folder_of(place))}"
        )
    reason = "it is empty"
    if any(place.iterdir()):
        reason = "it has no file with one of these suffixes"
    suffixes = ", ".join(VOLUME_SUFFIXES)
    return InputError(
        f"{place}: no case found: {reason} ({suffixes}){propose(place) or describe_others(place)}"
    )


def _expected_modalities(
    by_case: Mapping[str, Sequence[Match]], place: Path
) -> tuple[tuple[str, ...], str]:
    """Return the modalities that each case must have, in order, and which source says so.

    None are expected of images without names of modalities.
    """
    found = []
    for matches in by_case.values():
        names = {match.modality for match in matches if match.modality}
        if names and all(map(_FOUR_DIGITS.fullmatch, names)):
            names = {f"{number:04d}" for number in range(int(max(names)) + 1)}
        if names:
            found.append(tuple(sorted(names)))
    if not found:
        return (), ""
    counts = Counter(found)
    # The most frequent ones; of two equally frequent ones the larger, so that missing files are
    # found.
    usual = max(counts, key=lambda names: (counts[names], len(names)))
    description = read_dataset_description(place)
    if description is not None and description.channel_names:
        source = f"as {description.path.name} names"
        channels = [name.casefold() for name in description.channel_names]
        if all(map(_FOUR_DIGITS.fullmatch, usual)):
            return tuple(f"{number:04d}" for number in range(len(channels))), source
        names_there = {name.casefold(): name for names in found for name in names}
        if names_there.keys() >= {*channels}:
            return tuple(names_there[channel] for channel in channels), source
    return usual, "as in the other cases"


def _case_of_images(
    case_id: str, matches: Sequence[Match], modalities: Sequence[str], reason: str, place: Path
) -> CaseFiles:
    """Return a case of one file, or of one per modality, or with a problem."""
    first: dict[str, Path] = {}
    for match in matches:
        first.setdefault(match.modality, match.path)
    order = sorted(first, key=lambda name: [*modalities, name].index(name))
    images = [first[name] for name in order]
    if "" in first:
        images = [first[""]]
    case = CaseFiles(case_id, tuple(images))
    if len(matches) > len(images):
        found = file_names([match.path for match in matches])
        return case.lacking(
            f"expected one image, or one file per numbered modality, found {found} in {place}"
        )
    if "" in first or order == [*modalities]:
        return case
    absent = [name for name in modalities if name not in first]
    return case.lacking(
        f"expected the modalities {_list_names(modalities)}, {reason}; "
        f"found {_list_names(order)} in {place}",
        *(f"no modality {name} in {place}" for name in absent),
    )


def named_modalities(place: Path, files: CaseFiles) -> tuple[str, ...]:
    """Return the names that a pattern gives the images of a case, in order; () without names.

    Numbers of modalities are no names.
    """
    if not is_pattern(place) or not names_part(place, "modality"):
        return ()
    matches = find_matches(of_case(place, files.case_id), VOLUME_SUFFIXES)
    name_of = {match.path: match.modality for match in matches}
    names = tuple(name_of.get(path, "") for path in files.images)
    if all(map(_FOUR_DIGITS.fullmatch, names)):
        return ()
    return names


def _list_names(modalities: Collection[str]) -> str:
    return listed(modalities, MAX_MODALITIES)


def _with_imageless(
    cases: CaseList, images: Path, sources: Sequence[tuple[Path | None, Kind]]
) -> CaseList:
    """Add the cases that are known only from their labels or logits, each with its `problem`."""
    case_ids = {case.case_id for case in cases}
    names = set[str]()
    for place, kind in sources:
        if place is not None and place != images and holds_many(place):
            names.update(Files(place, kind).strays(case_ids))
    lacking = f"no image in {images}"
    problem = f"{lacking}; expected CASE or CASE_0000 with one of {', '.join(VOLUME_SUFFIXES)}"
    if is_pattern(images):
        problem = f"{lacking}; expected a file by this pattern"
    added = [CaseFiles(name, ()).lacking(problem, lacking) for name in names]
    return CaseList(
        sorted([*cases, *added], key=lambda case: case.case_id), cases.notes, cases.found
    )


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
        logits: a folder, a pattern, or the files of the only case.
        are_labels: add the label map or the structures of each case instead.
        is_single: the images are files of one case, and not a folder.
        first_label: the label of the first of several files; 1 without a background.
    """
    kind = LABEL_MAP if are_labels else LOGITS
    place = logits[0]
    if len(logits) > 1 or not holds_many(place):
        case = _only_case(cases, logits, kind)
        if are_labels and len(logits) > 1:
            case = _with_structures(case, [(stem_of(path), path) for path in logits])
        else:
            case = replace(case, logits=tuple(logits))
        return CaseList([case], cases.notes, cases.found)

    files = Files(place, kind)
    files.require_any()
    structures = structures_in(place) if are_labels else {}
    added = CaseList(notes=cases.notes, found=cases.found)
    for case in cases:
        inside = structures.get(case.case_id)
        if are_labels and is_single and inside is None and place.is_dir():
            inside = place / "{label}"
        matches = files.of(case.case_id, case.images)
        if inside is not None and (files.is_per_label or not matches):
            added.append(_with_structures(case, structure_files(inside, case.images)))
        elif matches and matches[0].label:
            added.append(_with_file_per_label(case, matches, place, first_label))
        else:
            added.append(files.add_to(case))
    taken = {path for case in added for path in (*case.images, *case.logits)}
    stray = files.strays({case.case_id for case in cases})
    names = sorted(path.name for paths in stray.values() for path in paths if path not in taken)
    if names:
        what = counted(len(names), "label map") if are_labels else counted(len(names), "file")
        of = "" if are_labels else " of logits"
        added.notes.append(f"{place}: ignored {what}{of} without images, such as {names[0]}")
    return added


def structures_in(place: Path) -> dict[str, Path]:
    """Return the pattern of the structures of each case, in a folder or by a pattern.

    They lie in the folder of the case, or in `segmentations` in it, as in TotalSegmentator's data
    sets. A file alone that has the name of the case is its label map.
    """
    if is_pattern(place):
        if not names_part(place, "label"):
            return {}
        check_pattern(place, ("case", "label"))
        matches = find_matches(place, VOLUME_SUFFIXES)
        return {match.case: of_case(place, match.case) for match in matches}
    found: dict[str, Path] = {}
    num_files: dict[str, int] = {}
    listings: dict[Path, list[Path]] = {}
    for name in STRUCTURES:
        labels_of_cases: dict[str, list[str]] = {}
        for match in find_matches(place / name, VOLUME_SUFFIXES, listings):
            labels_of_cases.setdefault(match.case, []).append(match.label)
        for case_id, labels in labels_of_cases.items():
            is_label_map = len(labels) == 1 and (
                name == STRUCTURES[-1] or labels[0].startswith(case_id)
            )
            # The best names come first, and last those that all begin with the case.
            if num_files.setdefault(case_id, len(labels)) == len(labels) and not is_label_map:
                found[case_id] = of_case(place / name, case_id)
    return found


def are_clear(structures: Mapping[str, Path]) -> bool:
    """Return whether folders of cases hold structures, and not images with their label maps."""
    words = {*IMAGE_WORDS, *LABEL_WORDS, *MASK_WORDS}
    for case_id, place in structures.items():
        for match in find_matches(place, VOLUME_SUFFIXES):
            if match.label.startswith(case_id) or match.label.lower() in words:
                return False
    return bool(structures)


def structure_files(place: Path, but: Collection[Path] = ()) -> list[tuple[str, Path]]:
    """Return name and path of each structure of a case by its pattern, sorted by name."""
    matches = find_matches(place, VOLUME_SUFFIXES)
    return sorted((match.label, match.path) for match in matches if match.path not in but)


def _with_structures(case: CaseFiles, named: Sequence[tuple[str, Path]]) -> CaseFiles:
    """Return the case with its structures, sorted by name."""
    names = [name for name, _ in sorted(named)]
    paths = [path for _, path in sorted(named)]
    case = replace(case, logits=tuple(paths), structures=tuple(names))
    counts = Counter(names)
    twice = [str(path) for name, path in sorted(named) if counts[name] > 1]
    if twice:
        return case.lacking(f"expected one file per structure, found {listed(twice)}")
    return case


def _with_file_per_label(
    case: CaseFiles, matches: Sequence[Match], place: Path, first_label: int
) -> CaseFiles:
    """Return a case with a file for each label, or with a problem if one is missing or double.

    Labels are numbers, or names in a `dataset.json`.
    """
    numbers: dict[str, int] = {}
    description = read_dataset_description(place)
    if description is not None:
        numbers = {name: label for label, name in description.label_names.items()}
    by_label = {}
    for match in matches:
        number = int(match.label) if match.label.isdecimal() else numbers.get(match.label, -1)
        by_label[number, match.path] = match.path
    labels = [label for label, _ in sorted(by_label)]
    paths = tuple(by_label[key] for key in sorted(by_label))
    if labels == [*range(first_label, first_label + len(paths))]:
        return replace(case, logits=paths)

    problem = (
        f"expected one file for each label from {first_label}, found {file_names(paths)} in {place}"
    )
    if labels[0] < 0:
        problem += "; {label} is a number, or a name in dataset.json, for structures with "
        problem += "--input-type labels any name"
    elif labels[0] == 1 and first_label == 0:
        problem = (
            f"the background seems to be missing: {problem}; --add-background computes it from "
            "the probabilities of labels 1, 2, …"
        )
    return case.lacking(problem)


def with_files(cases: CaseList, place: Path, kind: Kind) -> CaseList:
    """Add the mask or the labels of each case, or its `problem`."""
    if holds_many(place):
        files = Files(place, kind)
        files.require_any()
        return CaseList([files.add_to(case) for case in cases], cases.notes, cases.found)
    case = _only_case(cases, [place], kind)
    return CaseList([kind.added(case, place)], cases.notes, cases.found)


def with_strokes(cases: CaseList, sources: Sequence[Path]) -> CaseList:
    """Add the strokes of each case that has some: a folder's, a pattern's, or single files.

    Raises InputError: no strokes, strokes of no case, or single files for several cases.
    """
    place = sources[0]
    if not holds_many(place):
        case = _only_case(cases, sources, STROKES)
        return CaseList([replace(case, strokes=tuple(sources))], cases.notes, cases.found)
    if len(sources) > 1:
        raise InputError(f"{place}: give one folder of strokes, or the files of one case")

    files = Files(place, STROKES)
    files.require_any()
    added = CaseList(notes=cases.notes, found=cases.found)
    for case in cases:
        strokes = tuple(match.path for match in files.of(case.case_id))
        added.append(replace(case, strokes=strokes))
    names = [case.case_id for case in cases]
    strays = [path for paths in files.strays(names).values() for path in paths]
    number = sum(bool(case.strokes) for case in added)
    if strays or not number:
        found = listed(sorted(map(stem_of, strays))) or "no file"
        raise InputError(
            f"{place}: {found}: strokes of no case; "
            f"expected names such as {names[0]}.nii.gz; the cases are {listed(names)}"
        )
    if number < len(added):
        added.notes.append(
            f"{place}: strokes of {number} of {counted(len(added), 'case')}; "
            "the others are refined without"
        )
    return added


def labels_of(cases: Sequence[CaseFiles], labels: Path) -> dict[str, Path]:
    """Return the label map of each case that has one."""
    plain = CaseList(replace(case, labels=None, problem=None) for case in cases)
    found = {case.case_id: case.labels for case in with_files(plain, labels, LABELS)}
    return {case_id: path for case_id, path in found.items() if path is not None}


def _only_case(cases: CaseList, paths: Sequence[Path], kind: Kind) -> CaseFiles:
    """Return the only case.

    Raise InputError for several, or unless its files are there and can be read by their names.
    """
    for path in paths:
        file_to_read(path, kind.suffixes)
    if len(cases) != 1:
        raise InputError(
            f"{paths[0]}: {kind.one} for {len(cases)} cases; "
            "give a folder, a pattern, or the images of one case"
        )
    return cases[0]
