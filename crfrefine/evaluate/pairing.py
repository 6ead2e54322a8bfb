"""Assign the label maps of each method to cases by their names, without reading any.

Cases that lack a file are found here, too, and left out of all results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from crfrefine.base.notes import Note, NoteKind
from crfrefine.cases.case_files import CaseFiles, CaseList, Files, require_complete
from crfrefine.cases.conventions import (
    ARCHIVES,
    CALIBRATION,
    LABELS,
    LOGITS,
    OPTIONAL_LABELS,
    PREDICTION,
)
from crfrefine.cases.discovery import discover_cases
from crfrefine.cases.nnunet import is_trained, require_trained, validated_predictions
from crfrefine.cases.patterns import advise, holds_many, is_pattern, names_part
from crfrefine.errors import InputError
from crfrefine.evaluate.measured import CasePair, find_measured
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.evaluate.results import Evaluation
from crfrefine.evaluate.structures import find_structures, has_structures
from crfrefine.io import paths as io_paths

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


def pair_cases(options: EvaluationOptions) -> Evaluation:
    """Return the evaluation before any case is measured: the files of each method for each case.

    Cases without a file in the reference or in a method are left out. Duplicates become a `problem`
    of the case or of its method. Raise InputError without a complete case, or, with `strict`, for
    an incomplete one; and a CrfRefineError for unusable regions.
    """
    found: list[str] = []
    notes: list[Note] = []
    measured = find_measured(options, notes)
    structures: Mapping[str, int] = {}
    if has_structures(options):
        structures, references, methods = find_structures(options)
    else:
        references = _references(options.labels, found, notes)
        methods = {}
        for name, path in options.methods.items():
            methods[name] = _files_of_method(path, references, options.labels, found, notes)

    sources = [(f"no label map in {options.labels}", references)]
    for name, path in options.methods.items():
        sources.append((f"no prediction in {path}", methods[name]))
    pairs = []
    left_out = {}
    for case_id in sorted({*references}.union(*methods.values())):
        missing = [reason for reason, cases in sources if case_id not in cases]
        if missing:
            left_out[case_id] = list(dict.fromkeys(missing))  # Methods may share a folder.
        else:
            of_methods = {name: cases[case_id] for name, cases in methods.items()}
            pairs.append(CasePair(references[case_id], of_methods, {}))
    lacking = _add_companions(options, references, pairs, found, notes)
    incomplete = {**left_out, **lacking} if options.strict else left_out
    require_complete(
        dict(sorted(incomplete.items())),
        len(pairs) + len(left_out),
        "cases with one name in the labels and in every method",
        ["Name other folders, or leave out a method that has no file yet."],
        is_strict=options.strict,
    )
    if structures:
        kind = NoteKind.COMPARED_STRUCTURES
        notes.append(Note.of(kind, structures=len(structures), cases=len(pairs)))
    measured = measured.with_structures(structures)
    return Evaluation(options, measured, pairs, found=found, notes=notes, left_out=left_out)


def _add_companions(
    options: EvaluationOptions,
    references: Mapping[str, CaseFiles],
    pairs: list[CasePair],
    found: list[str],
    notes: list[Note],
) -> dict[str, list[str]]:
    """Add the images and the named probabilities to the cases; return what each lacks of these.

    Such a case is measured all the same, with a note. Raise InputError if no case has any of the
    named probabilities.
    """
    gaps: list[tuple[str, list[str], str]] = []  # a reason, the cases, and what follows
    for method, path in options.probabilities:
        cases = CaseList(CaseFiles(pair.case_id, ()) for pair in pairs)
        Files(LOGITS, path).add_to(cases)
        notes += cases.notes
        for pair, files in zip(pairs, cases, strict=True):
            pair.named[method] = files
        without = [case.case_id for case in cases if case.missing]
        if cases and len(without) == len(cases):
            raise InputError(
                f"{path}: has no logits or probabilities of any case; expected names such as "
                f"{without[0]} with one of {', '.join(io_paths.LOGITS_SUFFIXES)}"
            )
        consequence = f"the calibration of {method} covers the others"
        gaps.append((f"no probabilities in {path}", without, consequence))
    if options.images is not None:
        images = _find_images(options.images, references, options.labels, found)
        without = [pair.case_id for pair in pairs if pair.case_id not in images]
        for number, pair in enumerate(pairs):
            shown = images.get(pair.case_id, pair.reference)
            reference = replace(pair.reference, images=shown.images, modalities=shown.modalities)
            pairs[number] = pair._replace(reference=reference)
        gaps.append((f"no image in {options.images}", without, "the report shows them without"))

    lacking: dict[str, list[str]] = {}
    for reason, without, consequence in gaps:
        for case_id in without:
            lacking.setdefault(case_id, []).append(reason)
        if without:
            notes.append(
                Note.of(
                    NoteKind.MISSING_FILES,
                    what=reason,
                    lacking=len(without),
                    cases=len(pairs),
                    first=without[0],
                    consequence=consequence,
                )
            )
    return lacking


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
    beside = [path for path in files.cases_of if path not in taken]
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
