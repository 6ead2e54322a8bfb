"""Labels whose numbers differ between a method and the reference, such as 255 and 1.

Each Dice is 0 then, although the masks may agree.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import chain

from crfrefine import io
from crfrefine.base.label_options import REFERENCE, notes_on_values
from crfrefine.base.notes import Note, NoteKind
from crfrefine.cases.label_names import NO_NAMES, LabelNames, differing_numbers, names_of
from crfrefine.errors import CrfRefineError
from crfrefine.evaluate.measured import CasePair, MeasuredRegions
from crfrefine.evaluate.measuring import CaseResult

_COVERED = 0.5  # A label is rather another one with more than this share of its voxels,
_SELDOM = 0.1  # if less than this share of the voxels of both has the right number.

Pairs = Mapping[tuple[int, int], int]


def notes_on_numbers(results: Sequence[CaseResult], measured: MeasuredRegions) -> list[Note]:
    """Return a note for each method whose labels seem to have other numbers, over all cases.

    Where the method names its labels, these have other names than in the reference.
    """
    pairs_of: dict[str, Counter[tuple[int, int]]] = {}
    from_channels: set[str] = set()
    for result in results:
        from_channels |= result.from_channels
        for method, pairs in result.pairs.items():
            pairs_of.setdefault(method, Counter()).update(pairs)
    options_of = _find_options(pairs_of, from_channels, measured.options.name)

    notes = []
    for method, pairs in pairs_of.items():
        names: Mapping[int, str] = {}
        if _names_labels(method, results, measured):
            names = measured.names.names
        covered = []
        for label, wanted in other_numbers(pairs).items():
            size = sum(count for (_, other), count in pairs.items() if other == wanted)
            share = f"{pairs[label, wanted] / size:.0%} of the voxels of label"
            covered.append(f"label {_titled(label, names)} is at {share} {_titled(wanted, names)}")
        if not covered:
            continue
        if names:
            notes.append(NoteKind.OTHER_NAMES(what=method, labels=covered))
        elif options_of[method]:
            options = " ".join(options_of[method])
            notes.append(
                NoteKind.OTHER_NUMBERS_WITH_MAP(what=method, labels=covered, options=options)
            )
        else:
            notes.append(NoteKind.OTHER_NUMBERS(what=method, labels=covered))
    return notes


def notes_on_mapping(results: Sequence[CaseResult], measured: MeasuredRegions) -> list[Note]:
    """Return notes on values of --map that no label map of a method, or no reference, has."""
    notes = []
    for method, reading in measured.readings.items():
        where = f"no label map of {method}"
        if method == REFERENCE:
            where = "no reference"
        in_files = [result.mapped[method] for result in results if method in result.mapped]
        if in_files:
            notes += notes_on_values(reading.mapping, chain(*in_files), where)
    return notes


def notes_on_copies(results: Sequence[CaseResult], measured: MeasuredRegions) -> list[Note]:
    """Return a note for each method, no ceiling, that is the reference itself in all cases."""
    notes = []
    for method in measured.options.methods:
        if method == measured.options.ceiling:
            continue
        of_method = [result.pairs[method] for result in results if method in result.pairs]
        pairs = set(chain(*of_method))
        are_equal = all(label == wanted for label, wanted in pairs)
        if are_equal and any(label for label, _ in pairs):  # Empty label maps are alike, too.
            notes.append(NoteKind.EQUALS_REFERENCE(what=method, cases=len(of_method)))
    return notes


def _titled(label: int, names: Mapping[int, str]) -> str:
    """Return a label with its name, if it has one."""
    if label not in names:
        return str(label)
    return f"{label} ({names[label]})"


def _names_labels(method: str, results: Sequence[CaseResult], measured: MeasuredRegions) -> bool:
    """Return whether a method names labels, apart from those that `--map` numbers."""
    if measured.readings[method].label_names:
        return True
    return any(result.names.get(method) for result in results)


def names_of_run(measured: MeasuredRegions, pairs: Sequence[CasePair]) -> LabelNames:
    """Return the labels of the run by their names; none if methods or references have no names.

    Numbers are those of the `dataset.json` of the reference, or else of the first method that has
    one, or else those of the references, case by case.
    """
    options = measured.options
    names = NO_NAMES
    places = {REFERENCE: options.labels, **options.methods}
    for method, reading in measured.readings.items():
        names = names.with_names(reading.label_names, f"the dataset.json of {places[method]}")
    are_described = bool(names)
    if not are_described and not _has_names(pairs[0]):
        return names
    are_named = bool(measured.readings[REFERENCE].label_names)
    for pair in pairs:
        path = pair.reference.labels
        with suppress(CrfRefineError, OSError):
            if path is not None:
                of_file = measured.names_in_file(io.read_header(path), REFERENCE)
                names = names.with_names(of_file, str(path), are_distinct=not are_described)
                are_named = are_named or bool(of_file)
    return names if are_named else NO_NAMES


def _has_names(pair: CasePair) -> bool:
    """Return whether the file of a method of a case names its labels."""
    for method in pair.methods:
        for path in pair.files_of(method)[:1]:
            with suppress(CrfRefineError, OSError):
                if names_of(io.read_header(path).segments):
                    return True
    return False


def notes_on_names(results: Sequence[CaseResult], measured: MeasuredRegions) -> list[Note]:
    """Return notes on names that files of one side give other numbers from case to case.

    Names count where the other side has some as well: the notes are about those that do not.
    """
    # Where the numbers are from that labels of references got by their names.
    numbers_from: list[str] = []
    for result in results:
        for note in result.warnings:
            if note.kind is NoteKind.MATCHED_BY_NAME and note.part == REFERENCE:
                numbers_from = numbers_from or list(note.values["sources"])
    notes = []
    for method, reading in measured.readings.items():
        by_file = [(result.case_id, result.names.get(method, {})) for result in results]
        differing = [] if measured.names else differing_numbers(by_file)
        if method == REFERENCE:
            if differing:
                notes.append(NoteKind.NUMBERS_DIFFER_BY_FILE(labels=differing))
            if reading.label_names:  # They say what numbers mean on their side.
                numbers_from = []
        elif differing:
            notes.append(NoteKind.NUMBERS_DIFFER_BY_PREDICTION(what=method, labels=differing))
        elif numbers_from and not _names_labels(method, results, measured):
            notes.append(NoteKind.NUMBERS_OF_FIRST(what=method, sources=numbers_from))
    return notes


def other_numbers(pairs: Pairs) -> dict[int, int]:
    """Return the label of the reference that each label of a method rather is, if it is another.

    Args:
        pairs: the voxels of each pair of a label of the method and one of the reference.

    Returns:
        By a label of the method, that of the reference.
    """
    of_method: Counter[int] = Counter()
    of_reference: Counter[int] = Counter()
    for (label, wanted), count in pairs.items():
        of_method[label] += count
        of_reference[wanted] += count

    covers: dict[int, list[int]] = {}
    for (label, wanted), count in pairs.items():
        if 0 in (label, wanted) or count <= _COVERED * of_reference[wanted]:
            continue
        is_right = pairs.get((label, label), 0) >= _SELDOM * of_method[label]
        is_found = pairs.get((wanted, wanted), 0) >= _SELDOM * of_reference[wanted]
        if not is_right and not is_found:
            covers.setdefault(label, []).append(wanted)
    # A label that covers several ones is their union.
    return {label: wanted[0] for label, wanted in sorted(covers.items()) if len(wanted) == 1}


def _find_options(
    pairs_of: Mapping[str, Pairs], from_channels: Collection[str], own: str
) -> dict[str, list[str]]:
    """Return the options that give each method and the reference the same numbers."""
    # The numbers of channels cannot change: labels of the reference get those of the first method
    # with others.
    of_reference: dict[int, int] = {}
    for method, pairs in pairs_of.items():
        if method not in from_channels or of_reference:
            continue
        numbers = {wanted: label for label, wanted in other_numbers(pairs).items()}
        in_reference = {wanted for _, wanted in pairs}
        for old, new in numbers.items():
            if new in numbers or new not in in_reference:
                of_reference[old] = new
    options_of: dict[str, list[str]] = {method: [] for method in pairs_of}
    for method, pairs in pairs_of.items():
        if method in from_channels:
            continue
        renumbered: Counter[tuple[int, int]] = Counter()
        for (label, wanted), count in pairs.items():
            renumbered[label, of_reference.get(wanted, wanted)] += count
        mapping = other_numbers(renumbered)
        predicted = {label for label, _ in pairs}
        for wanted in [*mapping.values()]:
            if wanted in predicted:  # It would be one with the label that gets its number.
                mapping.setdefault(wanted, 0)
        source = "" if method == own else f"{method}:"
        for old, new in mapping.items():
            options_of[method].append(f"--map {shlex.quote(f'{source}{old}={new}')}")
    if not of_reference:
        return options_of
    # The reference has one numbering, which all methods then need.
    options = [f"--map {REFERENCE}:{old}={new}" for old, new in of_reference.items()]
    options += chain(*options_of.values())
    return dict.fromkeys(pairs_of, options)
