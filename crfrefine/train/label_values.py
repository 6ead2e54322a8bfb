"""The numbers in the label maps of labeled cases, for which every file is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from crfrefine import io
from crfrefine.arrays.interpolated import note_on_interpolated
from crfrefine.arrays.label_maps import foreground_labels, map_labels
from crfrefine.base.failures import expected_error
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.option import note_on_values
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.reading_options import DeclaredLabels, ReadingOptions
from crfrefine.errors import CrfRefineError, InputError, UnexpectedError
from crfrefine.train.workers import Result, Workers

_MAX_NAMED = 3  # cases that an error names, at most


def require_all(
    work: Callable[[CaseFiles, int], Result],
    files: Sequence[CaseFiles],
    folder: Path,
    workers: Workers | None = None,
    *,
    one_by_one: bool = False,
) -> list[Result]:
    """Return `work(case, threads)` of all cases.

    Raise the error of a single bad case, or an error that names the first few. A training without
    the bad cases would have to be repeated once they are fixed.
    """
    errors: dict[str, CrfRefineError] = {}

    def attempt(case: CaseFiles, threads: int) -> Result | None:
        try:
            return work(case, threads)
        except Exception as error:
            named = expected_error(error, *case.paths)
            named.case_id = case.case_id
            errors[case.case_id] = named
            return None

    results = (workers or Workers(1)).run(attempt, files, one_by_one=one_by_one)
    failed = [errors[case.case_id] for case in files if case.case_id in errors]
    if not failed:
        return [result for result in results if result is not None]
    if len(failed) == 1:
        raise failed[0]
    lines = [f"{folder}: {len(failed)} of {len(files)} cases cannot be trained on:"]
    for error in failed[:_MAX_NAMED]:
        lines.append(str(error))
    if len(failed) > _MAX_NAMED:
        lines.append(f"and {len(failed) - _MAX_NAMED} more")
    message = "\n  ".join(lines)
    for error in failed:
        if isinstance(error, UnexpectedError):
            raise UnexpectedError(message) from error
    raise InputError(message)


def largest_label(
    files: Sequence[CaseFiles], folder: Path, reading: ReadingOptions
) -> tuple[DeclaredLabels, list[Note]]:
    """Return the labels up to the largest one of all label maps and references.

    With them come notes if the borders of one were interpolated, as its labels are none then, and
    if label maps and references seem to have other numbers.
    Call this if nothing else says how many labels there are: it reads every file.
    """

    def labels_of(case: CaseFiles, _: int) -> tuple[set[int], set[int], Note | None]:
        in_maps = set[int]()
        in_reference = set[int]()
        note: Note | None = None
        for path, mapping in _label_maps_of(case, reading):
            labels, _found = map_labels(io.read_labels(path).data, mapping)
            found = in_reference if path == case.labels else in_maps
            found.update(foreground_labels(labels))
            note = note or note_on_interpolated(labels.T, str(path))
        return in_maps, in_reference, note

    of_cases = require_all(labels_of, files, folder)
    in_maps = set[int]().union(*(found for found, _, _ in of_cases))
    in_references = set[int]().union(*(found for _, found, _ in of_cases))
    notes = [note for _, _, note in of_cases if note is not None][:1]
    predicted = sorted(in_maps - in_references)
    missed = sorted(in_references - in_maps)
    if predicted and missed:
        option = "OLD=NEW"
        if len(predicted) == len(missed) == 1:
            option = f"{predicted[0]}={missed[0]}"
        kind = NoteKind.OTHER_LABELS
        notes.append(Note.of(kind, predicted=predicted, missed=missed, option=option))
    largest = max(1, *in_maps, *in_references)
    declared = DeclaredLabels(tuple(range(largest + 1)), "the label maps and references")
    return declared, notes


def _label_maps_of(
    case: CaseFiles, reading: ReadingOptions
) -> Iterator[tuple[Path, Mapping[int, int]]]:
    """Yield the network's label map and the reference, each with the new labels of its values."""
    for path in case.logits:
        yield path, reading.mapping
    if case.labels is not None:
        yield case.labels, reading.reference_mapping


def notes_on_mapping(
    files: Sequence[CaseFiles], folder: Path, reading: ReadingOptions
) -> list[Note]:
    """Return notes on values of --map that no file has, for which the files are read."""

    def found_in(case: CaseFiles, _: int) -> list[tuple[int, ...]]:
        found = []
        for path, mapping in _label_maps_of(case, reading):
            values: tuple[int, ...] = ()
            if mapping:
                values = map_labels(io.read_labels(path).data, mapping)[1]
            found.append(values)
        return found

    of_maps, of_references = zip(*require_all(found_in, files, folder), strict=True)
    notes = (
        note_on_values(reading.mapping, chain.from_iterable(of_maps), "no label map"),
        note_on_values(
            reading.reference_mapping, chain.from_iterable(of_references), "no reference"
        ),
    )
    return [note for note in notes if note is not None]
