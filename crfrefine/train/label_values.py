"""The numbers in the label maps of labeled cases, for which every file is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from crfrefine import io
from crfrefine.arrays.interpolated import notes_on_labels
from crfrefine.arrays.label_maps import foreground_labels
from crfrefine.base.failures import expected_error
from crfrefine.base.label_options import notes_on_values
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import listed
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.case_headers import CaseHeaders
from crfrefine.cases.dataset_description import DatasetDescription
from crfrefine.cases.label_input import (
    CUT_REFERENCE,
    FOR_PROBABILITIES,
    names_in_reference,
    read_mapped,
    require_labels,
)
from crfrefine.cases.label_names import (
    NO_NAMES,
    LabelNames,
    differing_numbers,
    names_of,
    without_mapped,
)
from crfrefine.cases.reading_options import DeclaredLabels, ReadingOptions
from crfrefine.errors import InputError, UnexpectedError
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
    errors = {}

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


def names_of_run(
    descriptions: Sequence[DatasetDescription],
    headers: Sequence[CaseHeaders],
    reading: ReadingOptions,
) -> LabelNames:
    """Return the names by which the labels of files are matched.

    They are those of the first `dataset.json` that names labels, or else those in the network's
    files; without any, numbers count.
    """
    for description in descriptions:
        if description.label_names:
            return LabelNames.of(description.label_names, str(description.path))
    names = NO_NAMES
    for header in headers:
        for file in header.network.files[:1]:
            of_file = without_mapped(names_of(file.segments), reading.mapping)
            names = names.with_names(of_file, str(file.path), are_distinct=True)
    return names


def require_one_numbering(headers: Sequence[CaseHeaders], reading: ReadingOptions) -> None:
    """Raise InputError if references give names other numbers from case to case.

    They may where names count, as a `dataset.json` or the network's files name the labels, too.
    """
    if reading.names:
        return
    by_case = []
    first = None
    for header in headers:
        if header.labels is not None:
            first = first or header.labels.path
            by_case.append((header.files.case_id, names_in_reference(header.labels, reading)))
    differing = differing_numbers(by_case)
    if differing and first is not None:
        raise InputError(
            f"{first.parent}: expected references in which a number means one structure, found "
            f"names of labels with other numbers from file to file: {listed(differing, 4)}\n"
            '  A dataset.json beside the logits, with {"labels": {"background": 0, "liver": 1}}, '
            "tells the structure of each channel; labels are then matched by their names."
        )


def notes_on_names(headers: Sequence[CaseHeaders], reading: ReadingOptions) -> list[Note]:
    """Return a note for the label maps, and one for the references, that are matched by names."""
    notes: dict[str, list[Note]] = {}
    for header in headers:
        files = []
        if header.network.is_label_map:
            names = without_mapped(names_of(header.network.files[0].segments), reading.mapping)
            files.append(("label maps", header.network.files[0], names))
        if header.labels is not None:
            files.append(("references", header.labels, names_in_reference(header.labels, reading)))
        for what, file, names in files:
            moved = reading.names.moves(names)
            if moved:
                notes.setdefault(what, []).append(reading.names.note(file.path, names, moved))
    found = []
    for what, of_files in notes.items():
        first = of_files[0]
        found.append(NoteKind.MATCHED_BY_NAME_IN(what=what, files=len(of_files), first=str(first)))
    return found


def find_labels(
    files: Sequence[CaseFiles], folder: Path, reading: ReadingOptions, *, is_map: bool
) -> tuple[DeclaredLabels, list[Note]]:
    """Return the declared labels, else those up to the largest one of all files, and notes.

    The notes say if the borders of one were interpolated, as its labels are none then, if label
    maps and references seem to have other numbers, and which values of `--map` no file has. Every
    file is read for it, once. Beside declared labels, or channels instead of label maps
    (`is_map`), only files to which `--map` applies are read, for the last of these notes.
    """
    are_declared = not is_map or reading.declared is not None
    # The labels, without background, and the values that `--map` gives new labels, in label maps
    # and in references.
    in_maps, in_references = found = (set[int](), set[int]())
    mapped = (set[int](), set[int]())
    notes: list[Note] = []

    def look(case: CaseFiles, _: int) -> None:
        places = [(path, False) for path in case.network]
        if case.labels is not None:
            places.append((case.labels, True))
        for path, is_reference in places:
            mapping = reading.reference_mapping if is_reference else reading.mapping
            if are_declared and not mapping:
                continue
            header = io.read_header(path, io.VOLUME_SUFFIXES)
            labels, values = read_mapped(header, mapping)
            names = without_mapped(names_of(header.segments), mapping)
            if is_reference:
                require_labels(labels, path, CUT_REFERENCE)
                names = names_in_reference(header, reading)
            elif reading.input_type != "labels":
                require_labels(labels, path, FOR_PROBABILITIES)
            labels = reading.names.renumber(path, names, labels, [])[0]
            found[is_reference].update(foreground_labels(labels))
            mapped[is_reference].update(values)
            if not are_declared and not notes:
                notes.extend(notes_on_labels(labels, str(path)))

    require_all(look, files, folder)  # one after the other
    predicted = sorted(in_maps - in_references)
    missed = sorted(in_references - in_maps)
    if predicted and missed and not are_declared:
        option = "OLD=NEW"
        if len(predicted) == len(missed) == 1:
            option = f"{predicted[0]}={missed[0]}"
        notes.append(NoteKind.OTHER_LABELS(predicted=predicted, missed=missed, option=option))
    notes += notes_on_values(reading.mapping, mapped[0], "no label map")
    notes += notes_on_values(reading.reference_mapping, mapped[1], "no reference")
    largest = max({1} | in_maps | in_references)
    up_to_largest = tuple(range(largest + 1))
    declared = DeclaredLabels(up_to_largest, "the label maps and references")
    return reading.declared or declared, notes
