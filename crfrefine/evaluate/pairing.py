"""Assign the label maps of each method to cases by their names, without reading any.

Cases that lack a file are found here, too, and left out of all results.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

from crfrefine.base.notes import Note, NoteKind
from crfrefine.cases.case_files import CaseFiles, CaseList, Incomplete, require_complete
from crfrefine.cases.conventions import (
    ARCHIVES,
    CALIBRATION,
    LABELS,
    LOGITS,
    OPTIONAL_LABELS,
    PREDICTION,
)
from crfrefine.cases.discovery import discover_cases
from crfrefine.cases.listing import Files
from crfrefine.cases.nnunet import is_trained, require_trained, validated_predictions
from crfrefine.cases.patterns import advise, holds_many, is_pattern, names_part
from crfrefine.errors import InputError
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.evaluate.structures import find_structures, has_structures
from crfrefine.io import paths as io_paths


class CasePair(NamedTuple):
    """A case: its reference with the files of its image, and the files of each method."""

    reference: CaseFiles  # `labels` is the label map, unless there are structures.
    # Those of a method are a label map, or probabilities of all labels as its header says, in
    # `labels`; and logits or probabilities beside it, or alone, in `logits`.
    methods: Mapping[str, CaseFiles]
    # Logits or probabilities that the user named, of the methods that have some.
    named: Mapping[str, CaseFiles]

    @property
    def case_id(self) -> str:
        """Its name."""
        return self.reference.case_id

    def files_of(self, method: str) -> tuple[Path, ...]:
        """Return the files that are read of a method."""
        files = self.methods[method]
        masks = files.logits[:1]
        if files.labels is not None:
            masks = (files.labels,)
        return tuple(dict.fromkeys((*masks, *self.named.get(method, files).logits)))

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        paths = [*self.reference.paths]
        for method in self.methods:
            paths += self.files_of(method)
        return tuple(paths)


class Pairing(NamedTuple):
    """All cases, sorted by name."""

    cases: tuple[CasePair, ...]  # Those with a file in the reference and in every method.
    found: tuple[str, ...]  # How many cases each pattern has.
    notes: tuple[Note, ...]  # On ignored files.
    left_out: Incomplete
    # Number of each structure by its name; empty without structures. Label maps are then folders of
    # structures, or their labels have these names.
    structures: Mapping[str, int]


# A reason, the complete cases whose masks are measured without a file for it, and what follows.
_Gap: TypeAlias = tuple[str, Sequence[str], str]
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
            labels = network.locate("labels", None)
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
    found: list[str] = []
    notes: list[Note] = []
    numbers: Mapping[str, int] = {}
    if has_structures(options):
        numbers, references, methods = find_structures(options)
    else:
        references = _references(options.labels, found, notes)
        methods = {}
        for name, path in options.methods.items():
            methods[name] = _files_of_method(path, references, options.labels, found, notes)
    left_out = _missing(options, references, methods)
    names = sorted({*references}.union(*methods.values()))
    complete = [case_id for case_id in names if case_id not in left_out]

    gaps: list[_Gap] = []
    named: dict[str, CaseList] = {}
    for method, path in options.probabilities:
        named[method] = CaseList(CaseFiles(case_id, ()) for case_id in complete)
        Files(LOGITS, path).add_to(named[method])
        notes += named[method].notes
        gaps.append(_missing_probabilities(method, path, named[method]))
    images: Mapping[str, CaseFiles] = {}
    if options.images is not None:
        images = _find_images(options.images, references, options.labels, found)
        imageless = [case_id for case_id in complete if case_id not in images]
        gaps.append((f"no image in {options.images}", imageless, "the report shows them without"))
    incomplete = {case_id: [*reasons] for case_id, reasons in left_out.items()}
    if options.strict:
        for reason, case_ids, _ in gaps:
            for case_id in case_ids:
                incomplete.setdefault(case_id, []).append(reason)
    require_complete(
        dict(sorted(incomplete.items())),
        len(names),
        "cases with one name in the labels and in every method",
        ["Name other folders, or leave out a method that has no file yet."],
        is_strict=options.strict,
    )
    for reason, case_ids, consequence in gaps:
        if case_ids:
            notes.append(
                Note.of(
                    NoteKind.MISSING_FILES,
                    what=reason,
                    lacking=len(case_ids),
                    cases=len(complete),
                    first=case_ids[0],
                    consequence=consequence,
                )
            )
    if numbers:
        kind = NoteKind.COMPARED_STRUCTURES
        notes.append(Note.of(kind, structures=len(numbers), cases=len(complete)))
    pairs = []
    for number, case_id in enumerate(complete):
        shown = images.get(case_id, CaseFiles(case_id, ()))
        reference = replace(references[case_id], images=shown.images, modalities=shown.modalities)
        of_methods = {name: cases[case_id] for name, cases in methods.items()}
        of_named = {method: cases[number] for method, cases in named.items()}
        pairs.append(CasePair(reference, of_methods, of_named))
    return Pairing(tuple(pairs), tuple(found), tuple(notes), left_out, numbers)


def _missing(
    options: EvaluationOptions,
    references: Collection[str],
    methods: Mapping[str, Collection[str]],
) -> dict[str, list[str]]:
    """Return the missing files of each case that lacks a reference or a prediction."""
    missing: dict[str, list[str]] = {}
    sources = [(f"no label map in {options.labels}", references)]
    for method, path in options.methods.items():
        sources.append((f"no prediction in {path}", methods[method]))
    for case_id in sorted({*references}.union(*methods.values())):
        reasons = [reason for reason, case_ids in sources if case_id not in case_ids]
        if reasons:
            missing[case_id] = list(dict.fromkeys(reasons))  # Methods may share a folder.
    return missing


def _references(source: Path, found: list[str], notes: list[Note]) -> dict[str, CaseFiles]:
    """Return each case with its label map, or with a problem if there are several candidates."""
    files = Files(LABELS, source)
    references = CaseList(CaseFiles(case_id, ()) for case_id in files.by_case())
    if not references:
        raise InputError(
            f"{source}: no label map found, with one of {', '.join(io_paths.VOLUME_SUFFIXES)}"
            f"{advise(source, holds_images=False)}"
        )
    files.add_to(references)
    taken = {match.path for case in references for match in files.of(case.case_id)}
    beside = [path for path in files.paths if path not in taken]
    if beside:
        kind = NoteKind.NOT_REFERENCES
        notes.append(Note.of(kind, str(source), files=len(beside), first=beside[0].name))
    found += files.described([case.case_id for case in references])
    return {case.case_id: case for case in references}


def _files_of_method(
    source: Path,
    references: Mapping[str, CaseFiles],
    labels: Path,
    found: list[str],
    notes: list[Note],
) -> dict[str, CaseFiles]:
    """Return the files of a method for each case, also for cases without a reference."""
    if is_trained(source):
        return validated_predictions(require_trained(source))
    if not holds_many(source):
        path = _file_of_only_case(source, references, io_paths.LOGITS_SUFFIXES)
        (case_id,) = references
        if io_paths.holds_scores_alone(path):
            return {case_id: CaseFiles(case_id, (), (source,))}
        return {case_id: CaseFiles(case_id, (), labels=source)}

    files = Files(PREDICTION, source)
    extra = list(files.by_case(references))
    names = [name for name in references if files.of(name)]
    # If the reference is a single file, other cases are not expected.
    if holds_many(labels):
        names += extra
    elif extra:
        note = Note.of(NoteKind.NOT_MEASURED, str(source), cases=len(extra), first=extra[0])
        notes.append(note)
    found += files.described(names)
    cases = CaseList(CaseFiles(name, ()) for name in sorted(names))
    probabilities = CALIBRATION
    if is_pattern(source):  # What else its files hold, their headers say.
        probabilities = replace(CALIBRATION, suffixes=ARCHIVES.suffixes)
    for kind in (OPTIONAL_LABELS, probabilities):
        Files(kind, source).add_to(cases)
    return {case.case_id: case for case in cases if case.paths or case.lack}


def _file_of_only_case(
    source: Path, references: Mapping[str, object], suffixes: tuple[str, ...]
) -> Path:
    """Return the file to read; raise InputError unless there is one case that it can be of."""
    path, _ = io_paths.file_to_read(source, suffixes)
    if len(references) != 1:
        raise InputError(
            f"{source}: a file for the {len(references)} cases of the reference; give a folder, "
            "one case's reference, or --structures for one binary file per structure"
        )
    return path


def _missing_probabilities(method: str, source: Path, cases: CaseList) -> _Gap:
    """Return the cases without probabilities; raise InputError if no case has any."""
    missing = [case.case_id for case in cases if case.missing]
    if cases and len(missing) == len(cases):
        raise InputError(
            f"{source}: has no logits or probabilities of any case; expected names such as "
            f"{missing[0]} with one of {', '.join(io_paths.LOGITS_SUFFIXES)}"
        )
    consequence = f"the calibration of {method} covers the others"
    return f"no probabilities in {source}", missing, consequence


def _find_images(
    source: Path, references: Mapping[str, object], labels: Path, found: list[str]
) -> Mapping[str, CaseFiles]:
    """Return the files of each case's image: those of a folder, or one file for the only case."""
    if holds_many(source):
        # Label maps of another pattern are no modalities.
        others = labels if is_pattern(labels) and not names_part(labels, "label") else None
        cases = discover_cases(source, None, labels=others)
        if cases.found:
            found.append(cases.found)
        return {case.case_id: case for case in cases}
    _file_of_only_case(source, references, io_paths.VOLUME_SUFFIXES)
    return {case_id: CaseFiles(case_id, (source,)) for case_id in references}
