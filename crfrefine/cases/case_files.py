"""The files of a case, and a list of cases with what was noticed on the way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CaseFiles:
    """The files of a case."""

    case_id: str  # its name
    images: tuple[Path, ...]  # one per modality, in order, or a single file with all of them
    logits: tuple[Path, ...] = ()  # one with all labels, or one per label in order; empty if no logits were requested
    mask: Path | None = None  # where the model applies, if given
    labels: Path | None = None  # the reference, if given
    problem: str | None = None  # the error of the case as far as names tell; reading the case raises it
    missing: tuple[str, ...] = ()  # the missing files of the case, such as "no logits in study/logits"
    are_structures: bool = False  # whether the logits are binary masks, one file per structure, which has the name of its file
    output: Path | None = None  # where the label map goes, in the output folder or absolute; None: by the name of the case
    spacing: tuple[float, ...] | None = None  # mm, one per grid axis, in place of the image's; None: the image's


class CaseList(list[CaseFiles]):
    """The cases found, sorted by name; `notes` says which files were ignored and why, one sentence each."""

    def __init__(self, cases: Iterable[CaseFiles] = (), notes: Iterable[str] = ()) -> None:
        super().__init__(cases)
        self.notes = list(notes)
