"""Assign the label maps of each method to cases by their names, without reading any.

Cases that lack a file are found here, too, and left out of all results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from crfrefine.base.notes import Note, NoteKind
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.conventions import (
    LOGITS,
)
from crfrefine.cases.dataset_description import DatasetDescription, read_descriptions
from crfrefine.cases.discovery import Sources
from crfrefine.cases.files_by_case import Files
from crfrefine.cases.finding import find_cases, find_predictions
from crfrefine.cases.incomplete import require_complete
from crfrefine.cases.nnunet import TrainedNetwork
from crfrefine.cases.patterns import names_part
from crfrefine.cases.plans import hint_at_networks, is_part_of_training
from crfrefine.errors import InputError
from crfrefine.evaluate.evaluation import Evaluation
from crfrefine.evaluate.measured import CasePair, find_measured
from crfrefine.evaluate.numbering import names_of_run
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.evaluate.structures import has_structures, pair_structures
from crfrefine.io import paths as io_paths
from crfrefine.io.formats import LOGITS_SUFFIXES, VOLUME_SUFFIXES
from crfrefine.io.paths import holds_many, is_pattern

NETWORK = "network"  # the name of the baseline of `--nnunet`


def methods_with_nnunet(
    predictions: Path | None,
    labels: Path | None,
    nnunet: Path | None,
    baselines: tuple[tuple[str, Path], ...],
) -> tuple[Path, Path, tuple[tuple[str, Path], ...]] | None:
    """Return predictions, labels and baselines, where a trained network supplies the missing ones.

    None if something is missing. Raise InputError if it is not a trained network, or its labels are
    not found.
    """
    if nnunet is not None:
        trained = TrainedNetwork(nnunet)
        if labels is None:
            labels = trained.locate("labels", None)
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
    for path in options.methods.values():
        if is_part_of_training(path):
            raise InputError(f"{path}: has no label maps of cases{hint_at_networks(path)}")
    search = _Search(options)
    are_structures = has_structures(options, search.notes)
    structures: Mapping[str, int] = {}
    if are_structures:
        structures, references, methods = pair_structures(options)
    measured = find_measured(options, structures, search.notes)
    if not are_structures:
        # A case of the reference with several candidates has a problem; none is an InputError.
        references = search.by_name(find_cases(Sources(labels=options.labels)))
        methods = {}
        for name, path in options.methods.items():
            methods[name] = search.predictions(path, references)

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
    search.add_probabilities(pairs)
    search.add_images(pairs, references)
    incomplete = {**left_out, **search.lacking} if options.strict else left_out
    require_complete(
        dict(sorted(incomplete.items())),
        len(pairs) + len(left_out),
        "cases with one name in the labels and in every method",
        ["Name other folders, or leave out a method that has no file yet."],
        is_strict=options.strict,
    )
    if not structures:
        measured = replace(measured, names=names_of_run(measured, pairs))
    notes = search.notes
    if structures:
        num_structures = len({*structures.values()})
        notes.append(NoteKind.COMPARED_STRUCTURES(structures=num_structures, cases=len(pairs)))
    return Evaluation(options, measured, pairs, found=search.found, notes=notes, left_out=left_out)


class _Search:
    """Finds the files of the cases of an evaluation, and notes findings beside them."""

    def __init__(self, options: EvaluationOptions) -> None:
        self.options = options
        self.found: list[str] = []  # how many cases each pattern has
        self.notes: list[Note] = []  # on files of no case, and on cases that lack a file
        self.lacking: dict[str, list[str]] = {}  # what cases lack that are measured all the same

    def by_name(self, cases: CaseList) -> dict[str, CaseFiles]:
        """Return cases by their names, and keep what is noted of them."""
        self.notes += cases.notes
        if cases.found:
            self.found.append(cases.found)
        return {case.case_id: case for case in cases}

    def predictions(
        self, source: Path, references: Mapping[str, CaseFiles]
    ) -> dict[str, CaseFiles]:
        """Return the files of a method for each case, also for cases without a reference."""
        if not holds_many(source):
            path = _file_of_only_case(source, references, LOGITS_SUFFIXES)
            (case_id,) = references
            if io_paths.holds_scores_alone(path):
                return {case_id: CaseFiles(case_id, (), (source,))}
            return {case_id: CaseFiles(case_id, (), labels=source)}

        # If the reference is a single file, other cases are not expected.
        is_only_case = not holds_many(self.options.labels)
        cases = find_predictions(source, references, is_only_case=is_only_case)
        return self.by_name(cases)

    def add_probabilities(self, pairs: Sequence[CasePair]) -> None:
        """Add the logits or probabilities that the user named.

        Raise InputError if no case has any of them.
        """
        for method, path in self.options.probabilities:
            cases = CaseList(CaseFiles(pair.case_id, ()) for pair in pairs)
            Files(LOGITS, path).add_to(cases)
            self.notes += cases.notes
            for pair, files in zip(pairs, cases, strict=True):
                pair.named[method] = files
            without = [case.case_id for case in cases if case.missing]
            if cases and len(without) == len(cases):
                raise InputError(
                    f"{path}: has no logits or probabilities of any case; expected names such as "
                    f"{without[0]} with one of {', '.join(LOGITS_SUFFIXES)}"
                )
            consequence = f"the calibration of {method} covers the others"
            self._note_lacking(f"no probabilities in {path}", without, len(pairs), consequence)

    def add_images(self, pairs: list[CasePair], references: Mapping[str, CaseFiles]) -> None:
        """Add the images that the report shows, with the names of their modalities."""
        source = self.options.images
        labels = self.options.labels
        if source is None:
            return
        if holds_many(source):
            # Label maps of another pattern are no modalities.
            others = labels if is_pattern(labels) and not names_part(labels, "label") else None
            cases = find_cases(Sources([source], labels=others))
            if cases.found:
                self.found.append(cases.found)
            images = {case.case_id: case for case in cases}
        else:
            _file_of_only_case(source, references, VOLUME_SUFFIXES)
            images = {case_id: CaseFiles(case_id, (source,)) for case_id in references}
        descriptions = read_descriptions([source, labels], self.notes)
        described = next(descriptions, DatasetDescription(source)).channel_names
        without = [pair.case_id for pair in pairs if pair.case_id not in images]
        for number, pair in enumerate(pairs):
            shown = images.get(pair.case_id, pair.reference)
            names = shown.modalities or described
            reference = replace(
                pair.reference, images=shown.images, modalities=names, unnamed=shown.unnamed
            )
            pairs[number] = pair._replace(reference=reference)
        consequence = "the report shows them without"
        self._note_lacking(f"no image in {source}", without, len(pairs), consequence)

    def _note_lacking(
        self, reason: str, without: Sequence[str], num_cases: int, consequence: str
    ) -> None:
        """Note the cases that are measured although they lack a file."""
        for case_id in without:
            self.lacking.setdefault(case_id, []).append(reason)
        if without:
            note = NoteKind.MISSING_FILES(
                what=reason,
                lacking=len(without),
                cases=num_cases,
                first=without[0],
                consequence=consequence,
            )
            self.notes.append(note)


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
