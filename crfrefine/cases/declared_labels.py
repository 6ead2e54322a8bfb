"""The labels that the label maps of a run may hold, and the file or option that declares them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crfrefine.base.labels import MAX_LABEL
from crfrefine.base.text import shorten
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.dataset_description import description_or_note
from crfrefine.errors import InputError
from crfrefine.io.paths import stem_of

RESERVED_NAMES = ("background", "ignore")
"""Names with a meaning in `dataset.json`: no structure may have them."""


@dataclass(frozen=True)
class DeclaredLabels:
    """The labels that label maps may hold."""

    numbers: tuple[int, ...]  # ascending, background first
    source: str  # the source, for messages: "study/dataset.json"
    structures: Mapping[str, int] = field(default_factory=dict)  # number of each by its name, if each has its own file

    @property
    def num_labels(self) -> int:
        """L: one more than the largest label, and at least two."""
        return max(2, self.numbers[-1] + 1)


def declared_labels(
    cases: Iterable[CaseFiles], folders: Sequence[Path], num_labels: int | None
) -> tuple[DeclaredLabels | None, tuple[str, ...]]:
    """Return the labels that the label maps of a run may hold (None: nothing says), and notes.

    Structures with a file each are numbered from 1 in the order of their names, over all cases of the run. Otherwise `dataset.json`
    decides, then the parameters.
    """
    found = list(cases)
    if any(case.are_structures for case in found):
        return number_structures(found), ()
    notes: list[str] = []
    for folder in folders:
        description = description_or_note(folder, notes)
        if description is not None and description.labels:
            values = {
                number
                for name, value in description.labels.items()
                if name != "ignore"
                for number in (value if isinstance(value, tuple) else (value,))
            }
            return DeclaredLabels(tuple(sorted({0, *values})), str(description.path)), tuple(notes)
    if num_labels is not None:
        return DeclaredLabels(tuple(range(num_labels)), "the parameters, which have values per label"), tuple(notes)
    return None, tuple(notes)


def number_structures(cases: Sequence[CaseFiles]) -> DeclaredLabels:
    """Return the numbers of the structures of all cases: from 1, in the order of their names.

    Raise InputError if one has a reserved name, or if only some cases have a file per structure.
    """
    other = next((case for case in cases if case.logits and not case.are_structures), None)
    if other is not None:
        raise InputError(
            f"{other.logits[0]}: a label map, but other cases have one file per structure, whose numbers follow from their names; "
            "refine the two kinds in separate runs"
        )
    by_name = {stem_of(path): path for case in cases if case.are_structures for path in case.logits}
    reserved = next((path for name, path in by_name.items() if name in RESERVED_NAMES), None)
    if reserved is not None:
        raise InputError(
            f"{reserved}: a structure cannot have the name {stem_of(reserved)!r}, which has a meaning in dataset.json; "
            "background is where no structure is. Rename the file or leave it out"
        )
    if len(by_name) > MAX_LABEL:
        raise InputError(f"{next(iter(by_name.values())).parent}: {len(by_name)} structures; label maps hold at most {MAX_LABEL}")
    for name, path in by_name.items():
        if shorten(name, 200) != name:
            raise InputError(f"{shorten(path, 300)}: the name of a structure must be printable and have at most 200 characters")
    numbers = {name: number for number, name in enumerate(sorted(by_name), start=1)}
    return DeclaredLabels(tuple(range(len(numbers) + 1)), "the names of the structures", numbers)
