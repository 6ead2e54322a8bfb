"""Files of earlier results of a case, which do not belong to its new result."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from crfrefine.base.inputs import check_no_input
from crfrefine.base.notes import Note, NoteKind
from crfrefine.cases.case_files import CaseFiles
from crfrefine.errors import InputError
from crfrefine.io.atomic import check_replaceable
from crfrefine.io.paths import suffix_of
from crfrefine.runs.contents import (
    FileBefore,
    checksums_of_inputs,
    content_of,
    contents_of_inputs,
)
from crfrefine.runs.records import CaseRecord
from crfrefine.runs.task import Task


def require_no_stale_input(files: CaseFiles, before: Mapping[Path, FileBefore]) -> None:
    """Raise InputError if `remove_stale` would remove an input, before the case is refined."""
    for path, (checksum, inputs) in before.items():
        try:
            check_no_input(path)
        except InputError:
            is_as_written = content_of([path])["checksum"] == checksum
            if is_as_written and inputs != checksums_of_inputs(contents_of_inputs(files)):
                raise


def remove_stale(task: Task, record: CaseRecord, kept: Collection[Path]) -> Iterator[Note]:
    """Remove files of a case that are of other parameters, options or inputs; yield notes.

    Such is the file of a label that has vanished; `kept` are those of the new result. Files that
    somebody has changed since an earlier run wrote them, and those that no record has, are only
    named.
    """
    outputs = task.outputs
    made_of = checksums_of_inputs(record.contents)
    left = {path for path in task.unknown if path.is_file()}
    if outputs.folder is not None:
        left.update(outputs.folder.glob(f"*{suffix_of(outputs.label_map)}"))
    stale = []
    for path, (checksum, inputs) in task.before.items():
        left.discard(path)
        if path in kept or inputs == made_of or not path.is_file():
            continue
        if content_of([path])["checksum"] != checksum:
            left.add(path)
            continue
        check_replaceable(path)
        if not os.access(path.parent, os.W_OK):  # Nothing is removed if a file cannot be.
            raise InputError(
                f"{path}: is of an earlier result of this case and cannot be removed: no right "
                f"to write to {path.parent}; remove it, or choose another output folder"
            )
        stale.append(path)
    for path in stale:
        path.unlink(missing_ok=True)
        if path.parent != outputs.label_map.parent:
            with suppress(OSError):  # It holds other files.
                path.parent.rmdir()
    if stale:
        yield Note.of(NoteKind.STALE_REMOVED, names=[path.name for path in stale])
    names = sorted(path.name for path in left.difference(kept))
    if names:
        yield Note.of(NoteKind.STALE_LEFT, names=names)
