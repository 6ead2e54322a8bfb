"""Find the cases of a command and the files of each, wherever they are: for all commands."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from crfrefine.base.notes import NoteKind
from crfrefine.base.text import listed
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.conventions import (
    ARCHIVES,
    CALIBRATION,
    LABELS,
    OPTIONAL_LABELS,
    PREDICTION,
    STROKES,
    find_folders,
)
from crfrefine.cases.discovery import Sources, discover_cases
from crfrefine.cases.files_by_case import Files
from crfrefine.cases.plans import is_trained
from crfrefine.errors import InputError
from crfrefine.io.formats import VOLUME_SUFFIXES
from crfrefine.io.paths import holds_many, is_pattern, stem_of


def find_cases(sources: Sources) -> CaseList:
    """Find the cases with all their files, sorted by name; incomplete ones have a `problem`.

    Raises InputError: a path that does not exist, no case, or several where one is expected.
    """
    if sources.manifest is not None:
        from crfrefine.cases.manifest import read_manifest

        cases = read_manifest(sources.manifest, input_type=sources.input_type)
    elif sources.nnunet is not None:
        from crfrefine.cases.nnunet import find_cases_of_nnunet

        cases = find_cases_of_nnunet(sources)
    elif sources.images:
        cases = discover_cases(sources)
    else:
        assert sources.labels is not None
        return _cases_of_references(sources.labels)
    if sources.strokes:
        _add_strokes(cases, sources.strokes)
    if sources.labels is not None and not sources.needs_all:
        Files(OPTIONAL_LABELS, sources.labels).add_to(cases)
    return cases


def _cases_of_references(place: Path) -> CaseList:
    """Return the cases that references name, with a problem where a case has several.

    Raise InputError without any.
    """
    files = Files(LABELS, place)
    cases = CaseList(CaseFiles(case_id, ()) for case_id in files.by_case())
    if not cases:
        from crfrefine.cases.proposals import advise

        raise InputError(
            f"{place}: no label map found, with one of {', '.join(VOLUME_SUFFIXES)}"
            f"{advise(place, holds_images=False)}"
        )
    files.add_to(cases)
    taken = {match.path for case in cases for match in files.of(case.case_id)}
    beside = [path for path in files.cases_of if path not in taken]
    if beside:
        cases.notes.append(
            NoteKind.NOT_REFERENCES(str(place), files=len(beside), first=beside[0].name)
        )
    cases.found = files.described([case.case_id for case in cases])
    return cases


def find_predictions(source: Path, references: Collection[str], *, is_only_case: bool) -> CaseList:
    """Find the label maps and probabilities of a method, of cases with and without a reference.

    Those without one are left out, with a note, if the reference is that of the only case.
    """
    if is_trained(source):
        from crfrefine.cases.nnunet import TrainedNetwork

        return TrainedNetwork(source).predictions()
    files = Files(PREDICTION, source)
    others = list(files.by_case(references))
    names = [name for name in references if files.of(name)]
    notes = []
    if not is_only_case:
        names += others
    elif others:
        notes.append(NoteKind.NOT_MEASURED(str(source), cases=len(others), first=others[0]))
    cases = CaseList((CaseFiles(name, ()) for name in sorted(names)), notes)
    probabilities = CALIBRATION
    if is_pattern(source):  # Headers show the content of its other files.
        probabilities = CALIBRATION._replace(suffixes=ARCHIVES.suffixes)
    for kind_of_files in (OPTIONAL_LABELS, probabilities):
        Files(kind_of_files, source).add_to(cases)
    cases[:] = [case for case in cases if case.paths or case.problem]
    cases.found = files.described(names)
    return cases


def _add_strokes(cases: CaseList, sources: Sequence[Path]) -> None:
    """Add the strokes of each case that has some: a folder's, a pattern's, or single files.

    Raises InputError: no strokes, strokes of no case, or single files for several cases.
    """
    place = sources[0]
    if len(sources) > 1 and holds_many(place):
        raise InputError(f"{place}: give one folder of strokes, or the files of one case")
    files = Files(STROKES, *sources)
    files.add_to(cases)
    names = [case.case_id for case in cases]
    strays = [path for paths in files.by_case(names).values() for path in paths]
    number = sum(bool(case.strokes) for case in cases)
    if strays or not number:
        found = listed(sorted(map(stem_of, strays))) or "no file"
        raise InputError(
            f"{place}: {found}: strokes of no case; "
            f"expected names such as {names[0]}.nii.gz; the cases are {listed(names)}"
        )
    if number < len(cases):
        cases.notes.append(NoteKind.STROKES_OF_SOME(str(place), drawn=number, cases=len(cases)))


def locate_folders(
    folder: Path | None, nnunet: Path | None = None, **named: Path | None
) -> dict[str, Any]:
    """Return the folders of a training, as options: those in `folder`, unless named.

    With the folder of a trained nnU-Net, they are where it has them, unless named. Raise InputError
    if one is missing.
    """
    if nnunet is None:
        return locate(folder, ("images", "labels", "logits"), named)
    from crfrefine.cases.nnunet import TrainedNetwork

    trained = TrainedNetwork(nnunet)
    masks = locate(None, (), {"masks": named.get("masks")})
    images = trained.locate("images", named.get("images"))
    return {
        "images": images,
        "labels": trained.locate("labels", named.get("labels"), beside=images),
        "logits": trained.folder,
        **masks,
        "nnunet": trained.folder,
    }


def locate(
    folder: Path | None,
    needed: Sequence[str],
    named: Mapping[str, Path | None],
    *,
    takes_files: bool = False,
) -> dict[str, Path]:
    """Return where images, labels, logits and masks are: in `folder`, unless they are named.

    Raise InputError if one is missing.
    """
    places = {} if folder is None else find_folders(folder)
    places |= {kind: path for kind, path in named.items() if path is not None}
    for kind, path in places.items():
        if not holds_many(path) and not (takes_files and path.exists()):
            raise InputError(f"{path}: no such folder; --{kind} names the folder of {kind}")

    missing = [kind for kind in needed if kind not in places]
    if missing:
        from crfrefine.cases.proposals import propose

        options = " and ".join(f"--{kind}" for kind in missing)
        raise InputError(
            f"{folder or 'the data'}: no folder of {' and '.join(missing)}; "
            f"name the folder that holds all, or {options}{propose(folder) if folder else ''}"
        )
    return places
