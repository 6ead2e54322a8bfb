"""The files of a case, a list of cases with notes, and cases that lack files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import counted, listed
from crfrefine.errors import InputError


@dataclass(frozen=True)
class CaseFiles:
    """The files of a case."""

    case_id: str  # its name
    images: tuple[Path, ...]  # one per modality, in order, or a single file with all of them
    # one with all labels, or one per label in order; empty if no logits were requested
    logits: tuple[Path, ...] = ()
    mask: Path | None = None  # where the model applies, if given
    labels: Path | None = None  # the reference, if given
    strokes: tuple[Path, ...] = ()  # files of voxels that somebody drew to correct the result
    lack: str = ""  # what its names show to be wrong; reading the case raises it
    # the missing files of the case, such as "no logits in study/logits"
    missing: tuple[str, ...] = ()
    # the names of structures, if the logits are binary masks, one file for each
    structures: tuple[str, ...] = ()
    # where the label map goes, in the output folder or absolute; None: by the name of the case
    output: Path | None = None
    # mm, one per grid axis, if given; None means the image's
    spacing: tuple[float, ...] | None = None
    modalities: tuple[str, ...] = ()  # the names that a pattern gives the images, if any

    @property
    def problem(self) -> str | None:
        """What is wrong, with the name of the case."""
        if not self.lack:
            return None
        return f"case {self.case_id!r}: {self.lack}"

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files of the case."""
        paths = (*self.images, *self.logits, self.mask, self.labels, *self.strokes)
        return tuple(path for path in paths if path is not None)

    def lacking(self, lack: str, *missing: str) -> CaseFiles:
        """Return the case with more missing files, and a problem unless it has one already."""
        return replace(self, lack=self.lack or lack, missing=self.missing + missing)

    def with_several(
        self, expected: str, paths: Collection[Path], place: Path, after: str = ""
    ) -> CaseFiles:
        """Return the case, which has files in a place that are too many, or not all of some."""
        found = listed([path.name for path in sorted(paths)])
        if len({path.parent for path in paths}) > 1:
            found = listed(sorted(paths))
        return self.lacking(f"{expected}, found {found} in {place}{after}")


class CaseList(list[CaseFiles]):
    """The cases found, sorted by name; `notes` says which files were ignored and why."""

    found = ""  # how many cases a pattern has, with an example; "" for folders
    is_single = False  # whether the images are files of one case

    def __init__(self, cases: Iterable[CaseFiles] = (), notes: Iterable[Note] = ()) -> None:
        super().__init__(cases)
        self.notes = list(notes)

    @property
    def advice(self) -> tuple[str, ...]:
        """How to make what folds of a network lack, one sentence per fold."""
        return tuple(str(note) for note in self.notes if note.kind is NoteKind.FOLD_LACKS)


_MAX_NAMED = 3

# The missing files of each case that lacks one, by its name. It is left out and is no failure.
Incomplete: TypeAlias = Mapping[str, Sequence[str]]


def left_out_entries(incomplete: Incomplete) -> list[dict[str, Any]]:
    """Return the entries of a summary."""
    return [{"case": case_id, "reasons": list(reasons)} for case_id, reasons in incomplete.items()]


def note_on_left_out(incomplete: Incomplete, num_found: int) -> Note:
    """Return how many cases are left out, and how many and which for each reason."""
    reasons = "; ".join(_by_reason(incomplete, _MAX_NAMED))
    return Note.of(NoteKind.LEFT_OUT, left_out=len(incomplete), cases=num_found, reasons=reasons)


def require_complete(
    incomplete: Incomplete,
    num_found: int,
    expected: str,
    advice: Sequence[str],
    *,
    at_least: int = 1,
    is_strict: bool = False,
) -> None:
    """Raise InputError for too few complete cases, or, with `--strict`, for any incomplete one.

    `expected` is a clause, `advice` are sentences on what to do.
    """
    num_complete = num_found - len(incomplete)
    if is_strict and incomplete:
        verb = "is" if len(incomplete) == 1 else "are"
        found = counted(num_found, "case")
        lines = [f"{len(incomplete)} of {found} {verb} incomplete, which --strict refuses:"]
        lines += _by_reason(incomplete, len(incomplete))
        advice = [*advice, "Add the missing files, or run without --strict."]
    elif num_complete < at_least:
        there = "no case is complete"
        if num_complete:
            there = f"only {num_complete} of {counted(num_found, 'case')} is complete"
        lines = [f"{there}; expected {expected}", *_by_reason(incomplete, _MAX_NAMED)]
    else:
        return
    raise InputError("\n  ".join([*lines, *advice]))


def _by_reason(incomplete: Incomplete, max_named: int) -> list[str]:
    """Return the number of cases for each reason, and the first names."""
    groups: dict[str, list[str]] = {}
    for case_id, reasons in incomplete.items():
        for reason in reasons:
            groups.setdefault(reason, []).append(case_id)
    return [
        f"{reason} ({len(names)}): {listed(names, max_named)}" for reason, names in groups.items()
    ]
