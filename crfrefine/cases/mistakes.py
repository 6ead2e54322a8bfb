"""Recognizes files that were given in the wrong place and folders that lack files for a run, and reports it once.

Missing files of a single case are in `discovery` and `label_files`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from crfrefine.base.text import listed
from crfrefine.cases.case_files import CaseList
from crfrefine.cases.discovery import discover_cases, list_files, logits_named
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.paths import LOGITS_SUFFIXES, SCORES_SUFFIXES, suffix_of
from crfrefine.io.recognition import describe_others

if TYPE_CHECKING:
    from crfrefine.io.volume import VolumeHeader

EXCHANGED = "-i and -p seem to be exchanged: -i takes the images, -p the network's output."


def require_any_output(cases: CaseList, folder: Path) -> None:
    """Raise InputError if no case has a network's output, because the folder holds none."""
    lacking = [reason for case in cases for reason in case.missing if reason.startswith(("no logits", "no label map"))]
    if not cases or len(lacking) < len(cases):
        return
    names = [case.case_id for case in cases]
    message = f"{cases[0].problem}"
    if len(cases) > 1:
        what = lacking[0].partition(" in ")[0]
        message = f"{folder}: {what} of any of the {len(cases)} cases, {listed(names)}; expected names such as {logits_named(names[0])}"
        message += f"{cases[0].problem}".partition("or the like")[2]
    there = [path.name for path in list_files(folder, LOGITS_SUFFIXES)]
    found = f"\n  There are {listed(there)}." if there else describe_others(folder)
    raise InputError(message + (found if any(folder.iterdir()) else "\n  The folder is empty."))


def seem_exchanged(images: Sequence[Path], logits: Sequence[Path]) -> bool:
    """Return whether the cases of the two options are complete the other way round."""
    if not images or not logits:
        return False
    if not (images[0].is_dir() and logits[0].is_dir()):
        return suffix_of(images[0]) in SCORES_SUFFIXES and suffix_of(logits[0]) not in SCORES_SUFFIXES
    try:
        return any(case.logits for case in discover_cases(logits, images))
    except CrfRefineError:
        return False


@contextmanager
def naming_exchanged_files(images: Sequence[VolumeHeader], network: VolumeHeader) -> Generator[None]:
    """Add to an error about a case with a label map that `-i` and `-p` were exchanged, if its files seem so."""
    try:
        yield
    except InputError as error:
        if len(images) == 1 and images[0].num_channels > 1 and network.num_channels == 1:
            raise InputError(f"{error}\n  {EXCHANGED}") from error
        raise
