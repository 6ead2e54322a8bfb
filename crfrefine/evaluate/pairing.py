"""Assign the label maps of each method to cases, without reading any, and find incomplete cases, which no number includes.

A folder with one binary file per structure is a case, too, whose labels have the names of the
files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from crfrefine.base.text import counted
from crfrefine.errors import InputError
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.evaluate.structures import find_structures, has_structures
from crfrefine.io import paths as io_paths
from crfrefine.runs.cases import discovery
from crfrefine.runs.cases.case_files import (
    CaseFiles,
    CaseList,
    Incomplete,
    require_all_complete,
    too_few_complete,
)

# A case may have several files of probabilities with the same content, from `infer` and nnU-Net;
# the first kind in this order counts. The probabilities of `infer` belong to its label map; an .npz
# of the same name may be its input.
_SCORES = ("_probabilities", "", "_probseg", "_softmax", "_logits")


class MethodFiles(NamedTuple):
    """The files of a method for a case."""

    # One value per voxel, or probabilities of all labels (only the header tells). None means that
    # they come from `probabilities`.
    label_map: Path | None = None
    # Logits or probabilities of all labels: one file, or one per label; empty without any.
    probabilities: tuple[Path, ...] = ()
    # True if the user named them; otherwise they were found beside the label map.
    asked_for_probabilities: bool = False
    # Why the method cannot be measured in this case, judged by file names.
    problem: str | None = None
    # Why there is no calibration, although probabilities were requested.
    probabilities_problem: str | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
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
        """All files."""
        return (
            self.reference,
            *(path for files in self.methods.values() for path in files.paths),
            *self.images,
        )


class Pairing(NamedTuple):
    """All cases, sorted by name."""

    cases: tuple[CasePair, ...]  # Those with a file in the reference and in every method.
    notes: tuple[str, ...]  # Notes on ignored files, one sentence each.
    left_out: Incomplete
    # Number of each structure by its name: label maps are folders of structures, or their labels
    # have these names. Empty without any.
    structures: Mapping[str, int]


def pair_cases(options: EvaluationOptions) -> Pairing:
    """Find the files of each method for each case.

    Duplicates become a `problem` of the case or of its method.
    """
    # Raises InputError without any complete case, or with `strict` for an incomplete one.
    notes: list[str] = []
    structures: Mapping[str, int] = {}
    if has_structures(options):
        structures, (reference, *predictions) = find_structures(options)
        references: dict[str, Sequence[Path]] = {
            case_id: [path] for case_id, path in reference.items()
        }
        by_method = {
            name: {case_id: MethodFiles(path) for case_id, path in paths.items()}
            for name, paths in zip(options.methods, predictions, strict=True)
        }
    else:
        references = _references(options.labels, notes)
        by_method = {
            name: _of_method(path, references, options.labels, notes)
            for name, path in options.methods.items()
        }
    places: dict[str, Mapping[str, object]] = {f"no label map in {options.labels}": references}
    places |= {
        f"no prediction in {path}": by_method[name] for name, path in options.methods.items()
    }
    names = sorted({*references}.union(*by_method.values()))
    lacking = {
        name: reasons
        for name in names
        if (reasons := [reason for reason, there in places.items() if name not in there])
    }
    complete = [case_id for case_id in names if case_id not in lacking]
    # What was asked for but is not needed to measure masks: why it is missing, the cases without
    # it, and what that means.
    optional: list[tuple[str, list[str], str]] = []
    for name, path in options.probabilities:
        files_of = by_method[name] = _with_probabilities(by_method[name], complete, path, notes)
        without = [
            case_id
            for case_id, files in files_of.items()
            if not files.probabilities and files.probabilities_problem is None
        ]
        optional.append(
            (f"no probabilities in {path}", without, f"the calibration of {name} covers the others")
        )
        if complete and len(without) == len(complete):
            expected = f"expected names such as {complete[0]} with one of {', '.join(io_paths.LOGITS_SUFFIXES)}"
            raise InputError(f"{path}: has no logits or probabilities of any case; {expected}")
    images: dict[str, tuple[Path, ...]] = {}
    if options.images is not None:
        if options.images.is_dir():
            found = discovery.discover_cases(options.images, None)
            images = {case.case_id: case.images for case in found}
        else:
            _suffix_of_only_case(options.images, references, io_paths.VOLUME_SUFFIXES)
            images = dict.fromkeys(complete, (options.images,))
        without = [case_id for case_id in complete if case_id not in images]
        optional.append((f"no image in {options.images}", without, "the report shows them without"))
    if options.strict:
        needed = {
            name: [
                *lacking.get(name, ()),
                *(reason for reason, without, _ in optional if name in without),
            ]
            for name in names
        }
        require_all_complete(
            {name: reasons for name, reasons in needed.items() if reasons}, len(names)
        )
    if not complete:
        expected = "cases with one name in the labels and in every method"
        advice = "Name other folders, or leave out a method that has no file yet."
        raise too_few_complete(lacking, len(names), expected, advice)
    for reason, without, meaning in optional:
        if without:
            notes.append(
                f"{reason} for {len(without)} of {len(complete)} cases, such as {without[0]}; {meaning}"
            )
    if structures:
        about = f"{counted(len(structures), 'structure')} in {counted(len(complete), 'case')}"
        notes.append(
            f"{about}: one binary file per structure, numbered in the order of names; --no-structures takes each file for a case"
        )
    cases = []
    for case_id in complete:
        paths = references[case_id]
        methods = {name: files[case_id] for name, files in by_method.items()}
        if len(paths) > 1:
            problem = (
                f"expected one label map, found {discovery.file_names(paths)} in {options.labels}"
            )
        else:
            problem = None
        cases.append(CasePair(case_id, paths[0], methods, images.get(case_id, ()), problem))
    return Pairing(tuple(cases), tuple(notes), lacking, structures)


def _references(source: Path, notes: list[str]) -> dict[str, Sequence[Path]]:
    """Return the label maps of each case: one, unless there are several candidates."""
    if not source.is_dir():
        io_paths.file_to_read(source, io_paths.VOLUME_SUFFIXES)
        return {
            discovery.without_ending(io_paths.stem_of(source), discovery.LABEL_SUFFIXES): [source]
        }
    by_stem = discovery.files_by_stem(source, io_paths.VOLUME_SUFFIXES)
    if not by_stem:
        raise InputError(
            f"{source}: no label map found, with one of {', '.join(io_paths.VOLUME_SUFFIXES)}{io_paths.describe_others(source)}"
        )
    names = {discovery.without_ending(stem, discovery.LABEL_SUFFIXES) for stem in by_stem}
    case_ids = [
        name
        for name in sorted(names)
        if discovery.case_of(name, names - {name}, discovery.LOGITS_NAMES) not in names - {name}
    ]
    references: dict[str, Sequence[Path]] = {}
    for case_id in case_ids:  # A name and a format that tell of a segmentation are two candidates.
        segmentations = [
            path
            for path in by_stem.get(case_id, [])
            if io_paths.suffix_of(path) in io_paths.LABELS_SUFFIXES
        ]
        references[case_id] = list(
            dict.fromkeys(
                [*discovery.label_maps(by_stem, case_id, discovery.LABEL_SUFFIXES), *segmentations]
            )
        )
    taken = {path for paths in references.values() for path in paths}
    beside = [path for paths in by_stem.values() for path in paths if path not in taken]
    if beside:
        notes.append(
            f"{source}: not taken for references: {counted(len(beside), 'file')} beside label maps, such as {beside[0].name}"
        )
    return references


def _of_method(
    source: Path, references: Mapping[str, object], labels: Path, notes: list[str]
) -> dict[str, MethodFiles]:
    """Return a method's files of each case, also of cases without a reference."""
    if not source.is_dir():
        holds_scores = (
            _suffix_of_only_case(source, references, io_paths.LOGITS_SUFFIXES)
            in io_paths.SCORES_SUFFIXES
        )
        return {
            next(iter(references)): MethodFiles(probabilities=(source,))
            if holds_scores
            else MethodFiles(source)
        }
    maps = discovery.files_by_stem(source, io_paths.VOLUME_SUFFIXES)
    scores = discovery.files_by_stem(source, io_paths.SCORES_SUFFIXES)
    stems = {discovery.without_ending(stem, discovery.LABEL_SUFFIXES) for stem in (*maps, *scores)}
    names = sorted({discovery.case_of(stem, references, discovery.LOGITS_NAMES) for stem in stems})
    extra = [name for name in names if name not in references]
    if (
        extra and not labels.is_dir()
    ):  # The reference is a single file: other cases are not expected.
        notes.append(
            f"{source}: not measured: {counted(len(extra), 'case')} without a reference, such as {extra[0]}"
        )
        names = [name for name in names if name in references]
    chosen = {name: _choose(name, maps, scores, source) for name in names}
    return {name: files for name, files in chosen.items() if files.paths or files.problem}


def _suffix_of_only_case(
    source: Path, references: Mapping[str, object], suffixes: tuple[str, ...]
) -> str:
    """Return the suffix of a single file; raise InputError for several cases."""
    path, _ = io_paths.file_to_read(source, suffixes)
    if len(references) != 1:
        advice = (
            "give a folder, one case's reference, or --structures for one binary file per structure"
        )
        raise InputError(
            f"{source}: a file for the {len(references)} cases of the reference; {advice}"
        )
    return io_paths.suffix_of(path)


def _choose(
    case_id: str, maps: Mapping[str, list[Path]], scores: Mapping[str, list[Path]], folder: Path
) -> MethodFiles:
    """Return the files of a folder for a case."""
    candidates = discovery.label_maps(maps, case_id, discovery.LABEL_SUFFIXES)
    kinds = (
        [*(maps.get(case_id + ending, []) if ending else []), *scores.get(case_id + ending, [])]
        for ending in _SCORES
    )
    probabilities = next((paths for paths in kinds if paths), [])
    for what, paths in (("label map", candidates), ("file of probabilities", probabilities)):
        if len(paths) > 1:
            return MethodFiles(
                problem=f"expected one {what}, found {discovery.file_names(paths)} in {folder}"
            )
    return MethodFiles(candidates[0] if candidates else None, tuple(probabilities))


def _with_probabilities(
    files_of: Mapping[str, MethodFiles], case_ids: Sequence[str], source: Path, notes: list[str]
) -> dict[str, MethodFiles]:
    """Replace the probabilities of a method with those of another folder."""
    cases = discovery.with_logits(
        CaseList([CaseFiles(case_id, ()) for case_id in case_ids]), [source]
    )
    notes += cases.notes
    replaced = {}
    for case in cases:
        own = files_of[case.case_id]
        if case.problem is None or case.missing:
            problem = None
        else:
            problem = case.problem.removeprefix(f"case {case.case_id!r}: ")
        # The masks still come from the method's own file, even if that holds probabilities.
        label_map = own.label_map
        if label_map is None and own.probabilities:
            label_map = own.probabilities[0]
        replaced[case.case_id] = MethodFiles(label_map, case.logits, True, own.problem, problem)
    return replaced
