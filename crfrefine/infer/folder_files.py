"""Files of a run that are of no case: its summary, and what others need beside its results."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from crfrefine.base.inputs import add_inputs
from crfrefine.base.notes import Note, NoteKind
from crfrefine.cases.case_files import CaseFiles
from crfrefine.cases.dataset_description import read_dataset_description
from crfrefine.cases.plans import DATASET, PLANS, file_of_network
from crfrefine.errors import InputError
from crfrefine.infer.outputs import OutputFiles
from crfrefine.io.paths import files_written, suffix_of
from crfrefine.io.writing import check_replaceable
from crfrefine.records.records import RECORD_FOLDER

Files = list[tuple[Path, bytes]]  # to write, with their contents


def plan_ensemble_files(
    cases: Sequence[CaseFiles], all_outputs: Sequence[OutputFiles], output: Path, notes: list[Note]
) -> Files:
    """Return the files that `nnUNetv2_ensemble` needs in the output folder, and their contents.

    Notes name files that are not there to be copied. Raise InputError if files of these names with
    other contents are in the output folder.
    """
    sources = []
    lacking = []
    for files, outputs in zip(cases, all_outputs, strict=True):
        if outputs.archive is not None:
            sources.append(files.network[0])
            if outputs.properties is None:
                lacking.append(f"{files.case_id}.pkl")
    if not sources:
        return []
    copies = []
    for name in (DATASET, PLANS):
        found = file_of_network(sources[0].parent, name)
        if found is None:
            lacking.append(name)
            continue
        add_inputs(found)
        target = output / name
        content = found.read_bytes()
        if not os.path.lexists(target):
            check_replaceable(target)
            copies.append((target, content))
        elif target.read_bytes() != content:
            raise InputError(
                f"{target}: differs from {found}, of which nnUNetv2_ensemble needs a copy here; "
                "choose another output folder, or remove the file"
            )
    if lacking:
        notes.append(NoteKind.NOTHING_TO_COPY(str(sources[0].parent), names=lacking))
    return copies


def plan_names_file(structures: Mapping[str, int], output: Path) -> Files:
    """Return the file for the names of structures in the output folder, and its content.

    Nothing if the same names are there.
    """
    path = output / "dataset.json"
    labels = {"background": 0, **structures}
    if not os.path.lexists(path):
        check_replaceable(path)
        return [(path, (json.dumps({"labels": labels}, indent=1) + "\n").encode())]
    description = read_dataset_description(output)
    expected = {name: (number,) for name, number in labels.items()}
    if description is not None and description.labels == expected:
        return []
    raise InputError(
        f"{path}: has other labels than the {len(structures)} structures of this run, which would "
        "write their names there; choose another output folder, or remove the file"
    )


def check_summary_path(path: Path, all_outputs: Sequence[OutputFiles]) -> list[Note]:
    """Return a note if the folder of a summary has to be made.

    Raise InputError if it would replace something else. It must not be among the records of runs,
    replace an output, or have the suffix of a volume.
    """
    if path.parent.name == RECORD_FOLDER:
        raise InputError(
            f"{path}: the folder {RECORD_FOLDER} is for the records that runs keep themselves; "
            "choose another folder"
        )
    check_replaceable(path)
    places: set[str] = set()
    for outputs in all_outputs:
        for written in outputs.all():
            places.update(map(os.path.realpath, files_written(written)))
    if suffix_of(path) or os.path.realpath(path) in places:
        raise InputError(
            f"{path}: the summary would replace an output of this run, or has a volume's suffix; "
            "choose another name in .json"
        )
    if path.parent.exists():
        return []
    return [NoteKind.NEW_FOLDER(folder=str(path.parent))]
