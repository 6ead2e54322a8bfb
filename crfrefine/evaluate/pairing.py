"""Assign the label maps of each method to cases, without reading any, and find incomplete cases, which no number includes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crfrefine.base.text import counted
from crfrefine.errors import InputError
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.io.paths import (
    LABELS_SUFFIXES,
    LOGITS_SUFFIXES,
    SCORES_SUFFIXES,
    VOLUME_SUFFIXES,
    Format,
    describe_others,
    file_to_read,
    stem_of,
    suffix_of,
)
from crfrefine.runs.cases.case_files import CaseFiles, CaseList, Incomplete, require_all_complete, too_few_complete
from crfrefine.runs.cases.discovery import (
    LABEL_SUFFIXES,
    LOGITS_NAMES,
    discover_cases,
    file_names,
    files_by_stem,
    list_files,
    probabilities_beside,
    segmentations_first,
    with_logits,
)

_MODALITY = re.compile(r"(?P<case>.+)_[0-9]{4}", re.DOTALL)

# A label map may have several files of probabilities with the same content, from `infer` and nnU-Net; the most likely suffix comes first.
_SCORES = ("_probabilities", "_probseg", "_softmax", "_logits")


@dataclass(frozen=True)
class MethodFiles:
    """The files of a method for a case."""

    # One value per voxel, or probabilities of all labels (only the header tells). None means that they come from `probabilities`.
    label_map: Path | None = None
    probabilities: tuple[Path, ...] = ()  # Logits or probabilities of all labels: one file, or one per label; empty without any.
    asked_for_probabilities: bool = False  # True if the user named them; otherwise they were found beside the label map.
    problem: str | None = None  # Why the method cannot be measured in this case, judged by file names.
    probabilities_problem: str | None = None  # Why there is no calibration, although probabilities were requested.
    is_missing: bool = False  # True if there is no file at all.

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        return self.probabilities if self.label_map is None else (self.label_map, *self.probabilities)

    @property
    def lacks_probabilities(self) -> bool:
        """True if the user named a folder of probabilities without a file for this case."""
        return self.asked_for_probabilities and not self.probabilities and self.probabilities_problem is None


@dataclass(frozen=True)
class CasePair:
    """A case: its reference, and the files of each method."""

    case_id: str
    reference: Path  # Label map.
    methods: Mapping[str, MethodFiles] = field(default_factory=dict)
    images: tuple[Path, ...] = ()  # The files of its modalities, in order; empty if no images were given, or none of this case.
    problem: str | None = None  # Why the case cannot be measured at all.
    structures: Mapping[str, int] = field(default_factory=dict)  # As of the `Pairing`.

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        return (self.reference, *(path for files in self.methods.values() for path in files.paths), *self.images)


@dataclass(frozen=True)
class Pairing:
    """All cases, sorted by name."""

    cases: tuple[CasePair, ...]  # Those with a file in the reference and in every method.
    notes: tuple[str, ...]  # Notes on ignored files, one sentence each.
    left_out: Incomplete = field(default_factory=dict)
    # Number of each structure by its name: label maps are folders of structures, or their labels have these names. Empty without any.
    structures: Mapping[str, int] = field(default_factory=dict)


def pair_cases(options: EvaluationOptions) -> Pairing:
    """Find the files of each method for each case; duplicates become a `problem` of the case or of its method."""
    # Raises InputError without any complete case, or with `strict` for an incomplete one.
    notes: list[str] = []
    references = _references(options.labels, notes)
    lacking: dict[str, list[str]] = {}
    by_method = {name: _of_method(path, list(references), options.labels, lacking, notes) for name, path in options.methods.items()}
    num_found, probabilities = len({*references, *lacking}), dict(options.probabilities)
    complete = sorted(case_id for case_id in references if case_id not in lacking)
    for name, path in probabilities.items():
        by_method[name] = _with_probabilities(by_method[name], path, notes)
    images = find_images(options.images, list(references), complete, notes)
    unscored = {name: [case_id for case_id in complete if by_method[name][case_id].lacks_probabilities] for name in probabilities}
    if options.strict:  # Requested files are needed, too, even if masks can be measured without them.
        needed = {f"no probabilities in {probabilities[name]}": case_ids for name, case_ids in unscored.items()}
        if options.images is not None:
            needed[f"no image in {options.images}"] = [case_id for case_id in complete if case_id not in images]
        others = [{case_id: [reason] for case_id in case_ids} for reason, case_ids in needed.items()]
        require_all_complete(incomplete_cases(lacking, *others), num_found)
    left_out = incomplete_cases(lacking)
    if not complete:
        expected = "cases with one name in the labels and in every method"
        raise too_few_complete(left_out, num_found, expected, "Name other folders, or leave out a method that has no file yet.")
    for name, case_ids in unscored.items():
        if len(case_ids) == len(complete):
            expected = f"expected names such as {complete[0]} with one of {', '.join(LOGITS_SUFFIXES)}"
            raise InputError(f"{probabilities[name]}: has no logits or probabilities of any case; {expected}")
        if case_ids:
            lack = f"no probabilities of {len(case_ids)} of {len(complete)} cases, such as {case_ids[0]}"
            notes.append(f"{probabilities[name]}: {lack}; the calibration of {name} covers the others")
    cases = []
    for case_id in complete:
        paths, methods = references[case_id], {name: files[case_id] for name, files in by_method.items()}
        problem = f"expected one label map, found {file_names(paths)} in {options.labels}" if len(paths) > 1 else None
        cases.append(CasePair(case_id, paths[0], methods, images.get(case_id, ()), problem))
    return Pairing(tuple(cases), tuple(notes), left_out)


def incomplete_cases(*reasons: Mapping[str, Sequence[str]]) -> Incomplete:
    """Return the incomplete cases, sorted by name."""
    together: dict[str, list[str]] = {}
    for by_case in reasons:
        for case_id, own in by_case.items():
            together.setdefault(case_id, []).extend(own)
    return {case_id: tuple(together[case_id]) for case_id in sorted(together)}


def _references(source: Path, notes: list[str]) -> dict[str, list[Path]]:
    """Return the label maps of each case: one, unless there are several candidates."""
    if not source.is_dir():
        file_to_read(source, VOLUME_SUFFIXES)
        return {_case_of(source): [source]}
    paths = _without_probabilities(list_files(source, VOLUME_SUFFIXES))
    stems = {stem_of(path) for path in paths}
    images = [path for path in paths if (match := _MODALITY.fullmatch(stem_of(path))) and match["case"] in stems]
    paths = [path for path in paths if path not in images]
    if not paths:
        reason = "it is empty" if not any(source.iterdir()) else f"it has no file with one of these suffixes: {', '.join(VOLUME_SUFFIXES)}"
        raise InputError(f"{source}: no label map found: {reason}{describe_others(source)}")
    telling: dict[str, list[Path]] = {}
    plain: dict[str, list[Path]] = {}
    for path in paths:
        is_plain = _case_of(path) == stem_of(path) and suffix_of(path) not in LABELS_SUFFIXES
        group = plain if is_plain else telling
        group.setdefault(_case_of(path), []).append(path)
    images += [path for case_id in telling for path in plain.pop(case_id, [])]
    if images:
        beside = f"{counted(len(images), 'file')} beside label maps, such as {images[0].name}"
        notes.append(f"{source}: taken as images, not as references: {beside}")
    return {**telling, **plain}


def _of_method(
    source: Path, case_ids: Sequence[str], labels: Path, lacking: dict[str, list[str]], notes: list[str]
) -> dict[str, MethodFiles]:
    """Return a method's files for each case of the reference; add to `lacking` the cases that only one of the two has."""
    if not source.is_dir():
        holds_scores = _format_of_only_case(source, case_ids, LOGITS_SUFFIXES).holds_scores_alone
        return {case_ids[0]: MethodFiles(probabilities=(source,)) if holds_scores else MethodFiles(source)}
    by_stem = files_by_stem(source, LOGITS_SUFFIXES)
    files_of = {case_id: _choose(case_id, by_stem, source) for case_id in case_ids}
    for case_id, files in files_of.items():
        if files.is_missing:
            lacking.setdefault(case_id, []).append(f"no prediction in {source}")
    taken = {case_id + ending for case_id in case_ids for ending in ("", *LABEL_SUFFIXES, *_SCORES)}
    stray = [path for stem, paths in by_stem.items() if stem not in taken for path in paths]
    others = []
    for path in _without_probabilities(stray):
        name = _predicted_case(path, case_ids)
        # If the reference is a single file, or an image beside its label map, other cases are not expected.
        if labels.is_dir() and name not in case_ids:
            lacking[name] = [f"no label map in {labels}"]
        else:
            others.append(path)
    if others:
        notes.append(f"{source}: not measured: {counted(len(others), 'file')} without a reference, such as {others[0].name}")
    return files_of


def _format_of_only_case(source: Path, case_ids: Sequence[str], suffixes: tuple[str, ...]) -> Format:
    """Return the format of a single file; raise InputError for several cases."""
    _, known = file_to_read(source, suffixes)
    if len(case_ids) != 1:
        raise InputError(f"{source}: a file for the {len(case_ids)} cases of the reference; give a folder, or one case's reference")
    return known


def _predicted_case(path: Path, case_ids: Sequence[str]) -> str:
    """Return the case of an unused file: a label map, probabilities without one, or a modality of a known case."""
    name = _without_ending(_case_of(path), LOGITS_NAMES)
    match = _MODALITY.fullmatch(name)
    return match["case"] if match and match["case"] in case_ids else name


def _choose(case_id: str, by_stem: Mapping[str, Sequence[Path]], folder: Path) -> MethodFiles:
    """Return the files of a folder for a case."""
    own = by_stem.get(case_id, [])
    telling = [path for ending in LABEL_SUFFIXES for path in by_stem.get(case_id + ending, []) if suffix_of(path) not in SCORES_SUFFIXES]
    label_maps = telling or segmentations_first([path for path in own if suffix_of(path) not in SCORES_SUFFIXES])
    if len(label_maps) > 1:
        return MethodFiles(problem=f"expected one label map, found {file_names(label_maps)} in {folder}")
    archives = [path for path in own if suffix_of(path) in SCORES_SUFFIXES]
    beside = [by_stem[case_id + ending] for ending in _SCORES if case_id + ending in by_stem]
    # The probabilities of `infer` belong to its label map; an .npz of the same name may be its input.
    candidates = [*beside[:1], archives] if case_id + _SCORES[0] in by_stem else [archives, *beside]
    probabilities = next((paths for paths in candidates if paths), [])
    if len(probabilities) > 1:
        return MethodFiles(problem=f"expected one file of probabilities, found {file_names(probabilities)} in {folder}")
    label_map = label_maps[0] if label_maps else None
    return MethodFiles(label_map, tuple(probabilities), is_missing=not label_maps and not probabilities)


def _with_probabilities(files_of: Mapping[str, MethodFiles], source: Path, notes: list[str]) -> dict[str, MethodFiles]:
    """Replace the probabilities of a method with those of another folder."""
    cases = with_logits(CaseList([CaseFiles(case_id, ()) for case_id in files_of]), [source])
    notes += cases.notes
    replaced = {}
    for case in cases:
        own = files_of[case.case_id]
        problem = None if case.problem is None or case.missing else case.problem.removeprefix(f"case {case.case_id!r}: ")
        # The masks still come from the method's own file, even if that holds probabilities.
        label_map = own.probabilities[0] if own.label_map is None and own.probabilities else own.label_map
        replaced[case.case_id] = MethodFiles(label_map, case.logits, True, own.problem, problem, own.is_missing)
    return replaced


def find_images(source: Path | None, case_ids: Sequence[str], complete: Sequence[str], notes: list[str]) -> dict[str, tuple[Path, ...]]:
    """Return the files of each case's image, and note complete cases without one."""
    if source is None:
        return {}
    if not source.is_dir():
        _format_of_only_case(source, case_ids, VOLUME_SUFFIXES)
        return {case_ids[0]: (source,)}
    images = {case.case_id: case.images for case in discover_cases(source, None)}
    missing = [case_id for case_id in complete if case_id not in images]
    if missing:
        notes.append(f"{source}: no image of {len(missing)} of {len(complete)} cases, such as {missing[0]}; the report shows them without")
    return images


def _case_of(path: Path) -> str:
    return _without_ending(stem_of(path), LABEL_SUFFIXES)


def _without_ending(name: str, endings: Sequence[str]) -> str:
    return next((name.removesuffix(ending) for ending in endings if name.endswith(ending) and name != ending), name)


def _without_probabilities(paths: Sequence[Path]) -> list[Path]:
    """Leave out `CASE_probabilities` and the like beside `CASE`: they are not separate cases."""
    probabilities = set(probabilities_beside(paths, {*map(stem_of, paths), *map(_case_of, paths)}))
    return [path for path in paths if path not in probabilities]
