"""The files of a case by their paths, and the cases that were found."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from crfrefine.base.array_types import Spacing
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import listed
from crfrefine.cases.patterns import Match


@dataclass(frozen=True)
class CaseFiles:
    """The files of a case."""

    case_id: str  # its name
    images: tuple[Path, ...]  # one per modality, in order, or a single file with all of them
    # The network's output, also a label map: one file with all labels, or one per label in order,
    # or one per structure; empty if none was requested.
    network: tuple[Path, ...] = ()
    mask: Path | None = None  # where the model applies, if given
    labels: Path | None = None  # the reference, if given
    strokes: tuple[Path, ...] = ()  # files of voxels that somebody drew to correct the result
    # Problem with the names of its files; reading the case raises it. "" if nothing.
    problem: str = ""
    # the missing files of the case, such as "no logits in study/logits"
    missing: tuple[str, ...] = ()
    # the names of structures, if the network's output is a binary mask for each
    structures: tuple[str, ...] = ()
    # where the label map goes, in the output folder or absolute; None: by the name of the case
    output: Path | None = None
    # mm, one per grid axis, if given; None means the image's
    spacing: Spacing | None = None
    modalities: tuple[str, ...] = ()  # the names that a pattern gives the images, if any
    # the images that a folder or a pattern brought, and that the user has not named
    unnamed: tuple[Path, ...] = ()

    @property
    def named_problem(self) -> str:
        """The problem, of a case that has one, with the name of the case."""
        return f"case {self.case_id!r}: {self.problem}"

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files of the case."""
        paths = (*self.images, *self.network, self.mask, self.labels, *self.strokes)
        return tuple(path for path in paths if path is not None)

    def with_problem(self, problem: str, *missing: str) -> CaseFiles:
        """Return the case with more missing files, and this problem unless it has one already."""
        problem = self.problem or problem
        return replace(self, problem=problem, missing=self.missing + missing)

    def with_several(
        self, expected: str, paths: Collection[Path], place: Path, after: str = ""
    ) -> CaseFiles:
        """Return the case with its problem: a place has too many files, or not those expected."""
        found = listed([path.name for path in sorted(paths)])
        if len({path.parent for path in paths}) > 1:
            found = listed(sorted(paths))
        return self.with_problem(f"{expected}, found {found} in {place}{after}")

    def with_structures(self, matches: Sequence[Match]) -> CaseFiles:
        """Return the case with its structures by name; 0 among numbers is the background."""
        named = sorted((match.label, match.path) for match in matches)
        named = [(name, path) for name, path in named if path not in self.images]
        if len(named) > 1 and all(name.isascii() and name.isdecimal() for name, _ in named):
            named = [(name, path) for name, path in named if int(name)]
        names = tuple(name for name, _ in named)
        case = replace(self, network=tuple(path for _, path in named), structures=names)
        twice = [str(path) for name, path in named if names.count(name) > 1]
        if twice:
            return case.with_problem(f"expected one file per structure, found {listed(twice)}")
        return case


class CaseList(list[CaseFiles]):
    """The cases found, sorted by name; `notes` says which files were ignored and why."""

    found = ""  # a sentence on how many cases a pattern has, with an example; "" for folders
    is_single = False  # whether the images are the files of one case, and no folder or pattern

    def __init__(self, cases: Iterable[CaseFiles] = (), notes: Iterable[Note] = ()) -> None:
        super().__init__(cases)
        self.notes = list(notes)

    @property
    def advice(self) -> tuple[str, ...]:
        """How to make the probabilities that a network's folds lack, one sentence per fold."""
        return tuple(str(note) for note in self.notes if note.kind is NoteKind.FOLD_LACKS)
