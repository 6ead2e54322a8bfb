"""Assign the label maps of each method to cases by their names, without reading any.

Cases that lack a file are found here, too, and left out of all results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from crfrefine.base.text import counted
from crfrefine.cases.case_files import (
    CaseFiles,
    CaseList,
    Incomplete,
    require_all_complete,
    too_few_complete,
)
from crfrefine.cases.conventions import (
    CALIBRATION,
    LABEL_WORDS,
    LABELS,
    PREDICTION,
    without_word,
)
from crfrefine.cases.discovery import discover_cases, with_logits
from crfrefine.cases.listing import Files, file_names
from crfrefine.cases.nnunet import (
    is_trained,
    locate_labels,
    require_trained,
    validated_predictions,
)
from crfrefine.cases.patterns import is_pattern
from crfrefine.errors import InputError
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.evaluate.structures import find_structures, has_structures
from crfrefine.io import paths as io_paths


class MethodFiles(NamedTuple):
    """The files of a method for a case."""

    # A label map, or probabilities of all labels, as its header says. None means that the labels
    # come from `probabilities`.
    label_map: Path | None = None
    # Logits or probabilities of all labels: one file, or one per label; empty without any.
    probabilities: tuple[Path, ...] = ()
    # True if the user named them; otherwise they were found beside the label map.
    asked_for_probabilities: bool = False
    # Why the method cannot be measured in this case, judged by file names.
    problem: str | None = None
    # Why the calibration is missing, although probabilities were requested.
    probabilities_problem: str | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files of the method."""
        if self.label_map is None:
            return self.probabilities
        return (self.label_map, *self.probabilities)


class CasePair(NamedTuple):
    """A case: its reference, and the files of each method."""

    case_id: str
    reference: Path  # Label map.
    methods: Mapping[str, MethodFiles]
    # The files of its modalities, in order; empty if no images were given, or none of this case.
    images: tuple[Path, ...] = ()
    problem: str | None = None  # Why the case cannot be measured at all.

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files of the method."""
        paths = [self.reference]
        for files in self.methods.values():
            paths += files.paths
        return (*paths, *self.images)


class Pairing(NamedTuple):
    """All cases, sorted by name."""

    cases: tuple[CasePair, ...]  # Those with a file in the reference and in every method.
    notes: tuple[str, ...]  # Notes on ignored files, one sentence each.
    left_out: Incomplete
    # Number of each structure by its name; empty without structures. Label maps are then folders of
    # structures, or their labels have these names.
    structures: Mapping[str, int]


class _Candidates(NamedTuple):
    """The files of complete and incomplete cases."""

    # Label maps by case: one, unless several may be the reference.
    references: Mapping[str, Sequence[Path]]
    methods: dict[str, Mapping[str, MethodFiles]]  # By method and case.
    structures: Mapping[str, int]  # As in the `Pairing`.

    @property
    def names(self) -> list[str]:
        """The names of all cases, sorted."""
        return sorted({*self.references}.union(*self.methods.values()))

    def missing(self, options: EvaluationOptions) -> dict[str, list[str]]:
        """Return the missing files of each case that lacks a reference or a prediction."""
        missing: dict[str, list[str]] = {}
        for case_id in self.names:
            reasons = []
            if case_id not in self.references:
                reasons.append(f"no label map in {options.labels}")
            for method, path in options.methods.items():
                if case_id not in self.methods[method]:
                    reasons.append(f"no prediction in {path}")
            if reasons:
                missing[case_id] = list(dict.fromkeys(reasons))  # Methods may share a folder.
        return missing


class _Gap(NamedTuple):
    """The complete cases without a file that their masks are measured without."""

    reason: str
    case_ids: Sequence[str]  # Empty if no case lacks a file.
    consequence: str


NETWORK = "network"  # the name of the baseline of `--nnunet`
_Methods = tuple[Path, Path, tuple[tuple[str, Path], ...]]


def methods_with_nnunet(
    predictions: Path | None,
    labels: Path | None,
    nnunet: Path | None,
    baselines: tuple[tuple[str, Path], ...],
) -> _Methods | None:
    """Return predictions, labels and baselines, where a trained network stands for what is missing.

    None if something is missing. Raise InputError if it is not a trained network, or its labels are
    not found.
    """
    if nnunet is not None:
        network = require_trained(nnunet)
        if labels is None:
            images = network.places("nnUNet_raw")[0] / "imagesTr"
            labels = locate_labels(network, images, None)
        if predictions is None:
            return nnunet, labels, baselines
        baselines = ((NETWORK, nnunet), *baselines)
    if predictions is None or labels is None:
        return None
    return predictions, labels, baselines


def pair_cases(options: EvaluationOptions) -> Pairing:
    """Find the files of each method for each case.

    Duplicates become a `problem` of the case or of its method.
    Raise InputError without a complete case, or, with `strict`, for an incomplete one.
    """
    notes: list[str] = []
    candidates = _find_candidates(options, notes)
    names = candidates.names
    left_out = candidates.missing(options)
    complete = [case_id for case_id in names if case_id not in left_out]

    gaps = []
    for method, path in options.probabilities:
        files = _with_probabilities(candidates.methods[method], complete, path, notes)
        candidates.methods[method] = files
        gaps.append(_missing_probabilities(method, path, files))
    images: Mapping[str, tuple[Path, ...]] = {}
    if options.images is not None:
        images = _find_images(options.images, candidates.references)
        imageless = [case_id for case_id in complete if case_id not in images]
        gaps.append(
            _Gap(f"no image in {options.images}", imageless, "the report shows them without")
        )

    if options.strict:
        require_all_complete(_incomplete(names, left_out, gaps), len(names))
    if not complete:
        expected = "cases with one name in the labels and in every method"
        advice = "Name other folders, or leave out a method that has no file yet."
        raise too_few_complete(left_out, len(names), expected, advice)

    for gap in gaps:
        if gap.case_ids:
            notes.append(
                f"{gap.reason} for {len(gap.case_ids)} of {len(complete)} cases, "
                f"such as {gap.case_ids[0]}; {gap.consequence}"
            )
    if candidates.structures:
        notes.append(
            f"{counted(len(candidates.structures), 'structure')} in "
            f"{counted(len(complete), 'case')}: one binary file per structure, "
            "numbered in the order of names; --no-structures takes each file for a case"
        )
    cases = [_pair(case_id, candidates, images, options.labels) for case_id in complete]
    return Pairing(tuple(cases), tuple(notes), left_out, candidates.structures)


def _pair(
    case_id: str, candidates: _Candidates, images: Mapping[str, tuple[Path, ...]], labels: Path
) -> CasePair:
    references = candidates.references[case_id]
    methods = {name: files[case_id] for name, files in candidates.methods.items()}
    problem = None
    if len(references) > 1:
        problem = f"expected one label map, found {file_names(references)} in {labels}"
    return CasePair(case_id, references[0], methods, images.get(case_id, ()), problem)


def _incomplete(
    names: Sequence[str], left_out: Incomplete, gaps: Sequence[_Gap]
) -> dict[str, list[str]]:
    """Return what each case lacks, optional files included."""
    incomplete = {}
    for case_id in names:
        reasons = list(left_out.get(case_id, ()))
        reasons += [gap.reason for gap in gaps if case_id in gap.case_ids]
        if reasons:
            incomplete[case_id] = reasons
    return incomplete


def _find_candidates(options: EvaluationOptions, notes: list[str]) -> _Candidates:
    """Return folders of structures and label maps with their names, or label maps.

    The latter have the probabilities beside those of methods.
    """
    methods: dict[str, Mapping[str, MethodFiles]] = {}
    if not has_structures(options):
        references = _references(options.labels, notes)
        for name, path in options.methods.items():
            methods[name] = _files_of_method(path, references, options.labels, notes)
        return _Candidates(references, methods, {})
    structures = find_structures(options)
    for name, paths in structures.methods.items():
        methods[name] = {case_id: MethodFiles(path) for case_id, path in paths.items()}
    folders = {case_id: [path] for case_id, path in structures.references.items()}
    return _Candidates(folders, methods, structures.numbers)


def _references(source: Path, notes: list[str]) -> dict[str, Sequence[Path]]:
    """Return the label maps of each case: one, unless there are several candidates."""
    if not source.is_dir() and not is_pattern(source):
        io_paths.file_to_read(source, io_paths.VOLUME_SUFFIXES)
        return {without_word(io_paths.stem_of(source), LABEL_WORDS): [source]}
    files = Files(source, LABELS)
    names = files.cases()
    if not names:
        raise InputError(
            f"{source}: no label map found, with one of {', '.join(io_paths.VOLUME_SUFFIXES)}"
            f"{files.advice()}"
        )
    references: dict[str, Sequence[Path]] = {}
    for name in names:
        references[name] = [match.path for match in files.of(name)]
    beside = dict.fromkeys(files.paths)
    for path in chain(*references.values()):
        beside.pop(path, None)
    if beside:
        example = next(iter(beside))
        notes.append(
            f"{source}: not taken for references: {counted(len(beside), 'file')} "
            f"beside label maps, such as {example.name}"
        )
    if is_pattern(source):
        notes.append(files.described(names))
    return references


def _files_of_method(
    source: Path, references: Mapping[str, object], labels: Path, notes: list[str]
) -> dict[str, MethodFiles]:
    """Return the files of a method for each case, also for cases without a reference."""
    if is_trained(source):
        validated = validated_predictions(require_trained(source))
        return {case_id: MethodFiles(*files) for case_id, files in validated.items()}
    if not source.is_dir() and not is_pattern(source):
        path = _file_of_only_case(source, references, io_paths.LOGITS_SUFFIXES)
        (case_id,) = references
        if io_paths.suffix_of(path) in io_paths.SCORES_SUFFIXES:
            return {case_id: MethodFiles(probabilities=(source,))}
        return {case_id: MethodFiles(source)}

    files = Files(source, PREDICTION)
    extra = sorted(files.strays(references))
    names = [name for name in references if files.of(name)]
    # If the reference is a single file, other cases are not expected.
    if labels.is_dir() or is_pattern(labels):
        names += extra
    elif extra:
        notes.append(
            f"{source}: not measured: {counted(len(extra), 'case')} without a reference, "
            f"such as {extra[0]}"
        )
    if is_pattern(source) and names:
        notes.append(files.described(names))
    label_maps = Files(source, LABELS)
    probabilities = Files(source, CALIBRATION)
    chosen = {}
    for name in sorted(names):
        found = _choose(name, label_maps, probabilities)
        if found.paths or found.problem:
            chosen[name] = found
    return chosen


def _file_of_only_case(
    source: Path, references: Mapping[str, object], suffixes: tuple[str, ...]
) -> Path:
    path, _ = io_paths.file_to_read(source, suffixes)
    if len(references) != 1:
        raise InputError(
            f"{source}: a file for the {len(references)} cases of the reference; give a folder, "
            "one case's reference, or --structures for one binary file per structure"
        )
    return path


def _choose(case_id: str, label_maps: Files, probabilities: Files) -> MethodFiles:
    """Return the label map of a case, and its probabilities; of a pattern, what the file is."""
    maps = [match.path for match in label_maps.of(case_id)]
    scores = [match.path for match in probabilities.of(case_id)]
    if is_pattern(label_maps.place):
        scores = [path for path in scores if io_paths.suffix_of(path) in io_paths.SCORES_SUFFIXES]
    for kind, paths in (("label map", maps), ("file of probabilities", scores)):
        if len(paths) > 1:
            names = file_names(paths)
            place = label_maps.place
            return MethodFiles(problem=f"expected one {kind}, found {names} in {place}")
    return MethodFiles(next(iter(maps), None), tuple(scores))


def _with_probabilities(
    files_of: Mapping[str, MethodFiles], case_ids: Sequence[str], source: Path, notes: list[str]
) -> dict[str, MethodFiles]:
    """Replace the probabilities of a method with those of another folder."""
    empty_cases = CaseList([CaseFiles(case_id, ()) for case_id in case_ids])
    cases = with_logits(empty_cases, [source])
    notes += cases.notes
    replaced = {}
    for case in cases:
        files = files_of[case.case_id]
        # The masks still come from the method's own file, even if that holds probabilities.
        label_map = next(iter(files.paths), None)
        problem = None
        if case.problem is not None and not case.missing:
            problem = case.problem.removeprefix(f"case {case.case_id!r}: ")
        replaced[case.case_id] = MethodFiles(
            label_map,
            case.logits,
            asked_for_probabilities=True,
            problem=files.problem,
            probabilities_problem=problem,
        )
    return replaced


def _missing_probabilities(method: str, source: Path, files_of: Mapping[str, MethodFiles]) -> _Gap:
    """Return the cases without probabilities; raise InputError if no case has any."""
    missing = []
    for case_id, files in files_of.items():
        if not files.probabilities and files.probabilities_problem is None:
            missing.append(case_id)
    if files_of and len(missing) == len(files_of):
        raise InputError(
            f"{source}: has no logits or probabilities of any case; expected names such as "
            f"{missing[0]} with one of {', '.join(io_paths.LOGITS_SUFFIXES)}"
        )
    return _Gap(
        f"no probabilities in {source}", missing, f"the calibration of {method} covers the others"
    )


def _find_images(source: Path, references: Mapping[str, object]) -> Mapping[str, tuple[Path, ...]]:
    """Return the files of each case's image: those of a folder, or one file for the only case."""
    if source.is_dir() or is_pattern(source):
        return {case.case_id: case.images for case in discover_cases(source, None)}
    _file_of_only_case(source, references, io_paths.VOLUME_SUFFIXES)
    return dict.fromkeys(references, (source,))
