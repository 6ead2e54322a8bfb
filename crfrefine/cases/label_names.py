"""Labels that are matched by their names, where a file and the run both name them.

Numbers may mean other structures from file to file: 3D Slicer numbers segments in the order in
which they were made.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from crfrefine.arrays.label_maps import foreground_labels, map_labels
from crfrefine.base.array_types import Labels, NamesOfLabels
from crfrefine.base.limits import MAX_LABEL
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import shorten
from crfrefine.errors import InputError
from crfrefine.io.volume import Segment

_SEPARATORS = re.compile(r"[\s_-]+")
# Names that programs make of numbers say nothing, such as "Segment_1" and "Label 2".
_OF_NUMBER = re.compile(r"(?:(?:segment|segmentation|label|class|region|structure|roi) ?)?[0-9]*")
BACKGROUND = "background"
MAP_OPTION = "--map "


def normalized(name: str) -> str:
    """Return a name as it is compared: without case, and any of space, `_` and `-` is a space."""
    composed = unicodedata.normalize("NFC", name)
    return _SEPARATORS.sub(" ", composed).strip().casefold()


def tells(name: str) -> bool:
    """Return whether a name says which structure a label is."""
    return _OF_NUMBER.fullmatch(normalized(name)) is None


def names_of(segments: Iterable[Segment]) -> dict[int, str]:
    """Return the names of labels in a file that say which structure a label is."""
    names = {}
    for segment in segments:
        if tells(segment.name):
            names[segment.label] = shorten(" ".join(segment.name.split()))
    return names


def differing_numbers(names_by_case: Iterable[tuple[str, NamesOfLabels]]) -> list[str]:
    """Return a text for each name that has another number in a later case than in the first."""
    first: dict[str, tuple[list[int], str]] = {}
    differing = {}
    for case_id, names in names_by_case:
        numbers: dict[str, list[int]] = {}
        for label, name in names.items():
            numbers.setdefault(normalized(name), []).append(label)
        for name, labels in numbers.items():
            known, first_case = first.setdefault(name, (labels, case_id))
            if known != labels and name not in differing:
                of_both = f"{known[0]} in {first_case}, {labels[0]} in {case_id}"
                differing[name] = f"{names[labels[0]]!r} is {of_both}"
    return [*differing.values()]


def without_mapped(names: NamesOfLabels, mapping: Mapping[int, int]) -> dict[int, str]:
    """Return names of labels without those of numbers in `--map`: the user says what these are."""
    given = {*mapping, *mapping.values()}
    return {label: name for label, name in names.items() if label not in given}


@dataclass(frozen=True)
class LabelNames:
    """The names of the labels of a run, by which those of each file are matched."""

    names: NamesOfLabels  # by number
    # The source of each label's name, for messages, such as "study/dataset.json".
    sources: Mapping[int, str]

    @classmethod
    def of(cls, names: NamesOfLabels, source: str) -> Self:
        """Return the names of one source."""
        return cls(names, dict.fromkeys(names, source))

    def __bool__(self) -> bool:
        return any(number and tells(name) for number, name in self.names.items())

    def numbers_of(self, name: str) -> list[int]:
        """Return the numbers of the labels with a name; only those of the same text, if any."""
        wanted = normalized(name)
        found = [number for number, one in self.names.items() if normalized(one) == wanted]
        same = [number for number in found if self.names[number] == name]
        if not found and wanted == BACKGROUND:
            return [0]
        return same or found

    def renumber(
        self,
        path: Path,
        names: NamesOfLabels,
        labels: Labels,
        notes: list[Note],
        option: str = MAP_OPTION,
    ) -> tuple[Labels, dict[int, int]]:
        """Return (*grid) labels with the numbers that their names have in the run.

        With them comes the new number of each label that had another one, and `notes` gets a note
        on these. Arguments are as of `match`.
        """
        moved: dict[int, int] = {}
        telling = [(label, name) for label, name in names.items() if tells(name)]
        if self and any(self.numbers_of(name) != [label] for label, name in telling):
            moved = self.match(path, names, foreground_labels(labels), option)
        if moved:
            notes.append(self.note(path, names, moved))
            labels, _ = map_labels(labels, moved)
        return labels, moved

    def match(
        self,
        path: Path,
        names: NamesOfLabels,
        present: Collection[int],
        option: str = MAP_OPTION,
    ) -> dict[int, int]:
        """Return the new number of each label of a file whose name has another number in the run.

        Args:
            path: the file, for errors.
            names: names of its labels, by number.
            present: the labels that occur in it; others cannot contradict.
            option: the text before OLD=NEW where the user explains a number.

        Raises:
            InputError: names contradict those of the run, or do not tell two labels apart.

        """
        named = {label: name for label, name in names.items() if label in present and tells(name)}
        if not self:
            return {}
        label_of: dict[int, int] = {}
        for label, name in sorted(named.items()):
            targets = self.numbers_of(name)
            if len(targets) > 1:
                raise InputError(
                    f"{path}: label {label} is named {name!r}, as are labels {targets[0]} and "
                    f"{targets[1]} of {self.sources[targets[0]]}; name these apart"
                    f"{_or_by_number(label, option)}"
                )
            if not targets:
                # The number must not be that of another name in the run.
                other = self.names.get(label, "")
                if tells(other):
                    raise InputError(
                        f"{path}: label {label} is named {name!r}, but {other!r} in "
                        f"{self.sources[label]}, and nothing is named {name!r} there; labels are "
                        "matched by their names: give a structure the same one"
                        f"{_or_by_number(label, option)}"
                    )
                continue
            target = targets[0]
            if target in label_of and target:
                advice = f", or make them one with {option}{label}={label_of[target]}"
                raise InputError(
                    f"{path}: labels {label_of[target]} and {label} are both named {name!r}, and "
                    f"labels are matched by their names; name them apart{advice if option else ''}"
                )
            label_of[target] = label

        moved = self.moves(named)
        for label, target in moved.items():
            if target and target in present and target not in named:
                raise InputError(
                    f"{path}: label {label} is named {named[label]!r}, which is label {target} of "
                    f"{self.sources[target]}, but the file also has a label {target} without a "
                    "name; name it"
                )
        return moved

    def moves(self, names: NamesOfLabels) -> dict[int, int]:
        """Return the result of `match` for a file in which all labels occur, without its errors."""
        moved = {}
        for label, name in names.items():
            targets = self.numbers_of(name) if self and tells(name) else []
            if len(targets) == 1 and targets != [label]:
                moved[label] = targets[0]
        return moved

    def note(self, path: Path, names: NamesOfLabels, moved: Mapping[int, int]) -> Note:
        """Return the note on labels of a file that got other numbers."""
        labels = []
        for label, target in sorted(moved.items()):
            labels.append(f"{names[label]!r} is {target} there and {label} here")
        # The background needs no source.
        named = [self.sources[target] for target in moved.values() if target in self.sources]
        sources = list(dict.fromkeys(named or self.sources.values()))
        return NoteKind.MATCHED_BY_NAME(path.name, sources=sources, labels=labels)

    def with_names(
        self, names: NamesOfLabels, source: str, *, are_distinct: bool = False
    ) -> LabelNames:
        """Return the names with further ones, which keep their numbers if these are free.

        A name whose number has another meaning gets the next free number, if the other name is
        among `names` as well, or names are of one source and so of structures that `are_distinct`.
        Else the two may be one structure, and files with it are refused.
        """
        further = dict(self.names)
        sources = dict(self.sources)
        here = {normalized(name) for name in names.values()}
        for number, name in sorted(names.items()):
            if not number or not tells(name) or self.numbers_of(name):
                continue
            if number in further and not (are_distinct or normalized(further[number]) in here):
                continue
            if number in further:
                number = 1 + max(*further, *names)
            if number <= MAX_LABEL:
                further[number] = name
                sources[number] = source
        return LabelNames(further, sources)


def _or_by_number(label: int, option: str) -> str:
    """Return the advice to let the number count; "" if no option gives numbers."""
    if not option:
        return ""
    return f", or say that its number counts, with {option}{label}={label}"


NO_NAMES = LabelNames({}, {})
