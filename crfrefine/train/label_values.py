"""The numbers in the label maps of labeled cases, for which every file is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

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


# The labels in some files, without background, the values that `--map` gives new labels, and notes
# on interpolated borders.
_Values: TypeAlias = tuple[set[int], set[int], list[Note]]


def find_labels(
    files: Sequence[CaseFiles], folder: Path, reading: ReadingOptions, *, is_map: bool
) -> tuple[DeclaredLabels, list[Note]]:
    """Return the declared labels, else those up to the largest one of all files, and notes.

    The notes say if the borders of one were interpolated, as its labels are none then, if label
    maps and references seem to have other numbers, and which values of `--map` no file has. Every
    file is read for it, once. Beside declared labels, or channels in place of label maps
    (`is_map`), only files to which `--map` applies are read, for the last of these notes.
    """
    are_declared = not is_map or reading.declared is not None

    def values_of(case: CaseFiles, _: int) -> tuple[_Values, _Values]:
        maps = case.logits if reading.mapping or not are_declared else ()
        references: list[Path] = []
        if case.labels is not None and (reading.reference_mapping or not are_declared):
            references.append(case.labels)
        return _values_in(maps, reading.mapping), _values_in(references, reading.reference_mapping)

    in_maps: _Values = (set(), set(), [])
    in_references: _Values = (set(), set(), [])
    notes = []
    for of_case in require_all(values_of, files, folder):
        for found, values in zip((in_maps, in_references), of_case, strict=True):
            found[0].update(values[0])
            found[1].update(values[1])
            notes += values[2]
    notes = [] if are_declared else notes[:1]
    predicted = sorted(in_maps[0] - in_references[0])
    missed = sorted(in_references[0] - in_maps[0])
    if predicted and missed and not are_declared:
        option = "OLD=NEW"
        if len(predicted) == len(missed) == 1:
            option = f"{predicted[0]}={missed[0]}"
        kind = NoteKind.OTHER_LABELS
        notes.append(Note.of(kind, predicted=predicted, missed=missed, option=option))
    for mapping, found, where in (
        (reading.mapping, in_maps, "no label map"),
        (reading.reference_mapping, in_references, "no reference"),
    ):
        note = note_on_values(mapping, found[1], where)
        if note is not None:
            notes.append(note)
    largest = max({1} | in_maps[0] | in_references[0])
    found_labels = DeclaredLabels(tuple(range(largest + 1)), "the label maps and references")
    return reading.declared or found_labels, notes


def _values_in(paths: Sequence[Path], mapping: Mapping[int, int]) -> _Values:
    all_labels = set[int]()
    all_mapped = set[int]()
    notes = []
    for path in paths:
        labels, mapped = map_labels(io.read_labels(path).data, mapping)
        all_labels.update(foreground_labels(labels))
        all_mapped.update(mapped)
        note = note_on_interpolated(labels.T, str(path))
        if note is not None:
            notes.append(note)
    return all_labels, all_mapped, notes
