"""The states of cases by the records of the runs into their folder: `--continue` and `status`."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC
from pathlib import Path
from typing import Any

from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.plain import Json
from crfrefine.base.text import MAX_OF_A_REASON, shorten
from crfrefine.errors import InputError
from crfrefine.io.json import parse_line
from crfrefine.io.paths import files_written, require_file, stem_of
from crfrefine.records.contents import LABEL_MAP, checksums_of_inputs, content_of, time_of_change
from crfrefine.records.records import (
    RECORD_FOLDER,
    CaseRecord,
    FileBefore,
    RunSummary,
    notes_on_cases,
)

# The reasons why it is doubtful that a case is done.
DOUBTS = (NoteKind.NO_RECORD, NoteKind.CHANGED)


class RecordedRuns:
    """All runs into a folder, in the order in which they began; none without a folder.

    A run without --continue refines all its cases anew: only the lines of a case since the last
    such run count. `notes` are on lines that cannot be used.
    """

    def __init__(
        self, folder: Path | None, runs: Iterable[RunSummary], notes: Sequence[Note]
    ) -> None:
        self.folder = folder
        self.runs = sorted(runs, key=lambda run: run.started)
        self.notes = list(notes)
        # Of each case: its lines, each with its run
        self._lines = defaultdict[str, list[tuple[CaseRecord, RunSummary]]](list)
        # when the last run without --continue began, and how many lines there were before
        self._begun = defaultdict[str, tuple[str, int]](lambda: ("", 0))
        for run in self.runs:
            if not run.resumed:
                began = run.started.astimezone(UTC).isoformat(timespec="microseconds")
                for case_id in list(run.all_cases)[run.part_id :: run.num_parts]:
                    self._begun[case_id] = (began, len(self._lines[case_id]))
            for record in run.cases:
                self._lines[record.case_id].append((record, run))

    def latest(
        self, case_id: str, label_map: Path
    ) -> tuple[CaseRecord, RunSummary] | tuple[None, None]:
        """Return the last line of a case on a label map of this format, with its run."""
        _, num_earlier = self._begun[case_id]
        for record, run in reversed(self._lines[case_id][num_earlier:]):
            if record.output is None or record.output.name == label_map.name:
                return record, run
        return None, None

    def is_older(self, case_id: str, label_map: Path) -> bool:
        """Return whether a label map without a line was made before the lines that count.

        Its time tells, or in a copy of the folder, which has other times, its content.
        """
        began, num_earlier = self._begun[case_id]
        if (time_of_change(label_map) or "") < began:
            return True
        checksums = set()
        for record, _ in self._lines[case_id][:num_earlier]:
            is_same_file = record.output is not None and record.output.name == label_map.name
            if is_same_file and LABEL_MAP in record.contents:
                checksums.add(record.contents[LABEL_MAP].get("checksum"))
        return bool(checksums) and content_of(files_written(label_map))["checksum"] in checksums


class CaseState:
    """The state of a case by the records of runs, for `--continue` and for `status`.

    It is seen from a run and its settings, `now`. `others` are the outputs beside the label map,
    None those of the last line, and `number` is that of the case in the run.
    """

    def __init__(
        self,
        recorded: RecordedRuns,
        case_id: str,
        label_map: Path,
        others: Sequence[Path] | None,
        now: RunSummary,
        number: int = 0,
    ) -> None:
        self.case_id = case_id
        self.label_map = label_map
        # the part of the run that the case belongs to, and the number of its parts
        self.part_id = number % now.num_parts
        self.num_parts = now.num_parts
        # why the case is not done, or why that is doubtful; None means that it is done
        self.reason: Note | None = None
        # the last line on the label map, if it is done without a doubt, and its run
        self.record: CaseRecord | None = None
        self.run: RunSummary | None = None
        record, run = recorded.latest(case_id, label_map)
        paths = [label_map, *(others or ())]
        if others is None and record is not None:
            for path in (record.probabilities, record.logits, record.preview, record.structures):
                if path is not None:
                    paths.append(label_map.parent / path.name)
        # No exception for odd names.
        gone = next((path for path in paths if not os.path.exists(path)), None)  # noqa: PTH110
        if record is not None and record.status == "failed":
            problem = "no reason is recorded"
            if record.failures:
                problem = record.failures[0].message
            self.reason = NoteKind.FAILED(problem=problem)
        # Files of an earlier run are not results of the run that is continued.
        elif record is None and (gone == label_map or recorded.is_older(case_id, label_map)):
            self.reason = NoteKind.NOT_REACHED()
        elif gone is not None:
            self.reason = NoteKind.GONE(path=str(gone))
        elif record is None or run is None:
            self.reason = NoteKind.NO_RECORD()
        elif not record.describes(label_map):
            self.reason = NoteKind.CHANGED()
        elif keys := _other_values(record, run, now):
            self.reason = NoteKind.WITH_OTHER_VALUES(keys=keys)
        else:
            self.record = record
            self.run = run

    @property
    def state(self) -> str:
        """Either "done", "failed" or "missing"."""
        if self.reason is None or self.reason.kind in DOUBTS:
            return "done"
        return "failed" if self.reason.kind is NoteKind.FAILED else "missing"

    def to_dict(self) -> Json:
        """Return the state for JSON; the reason may be empty."""
        reason_kind = None
        if self.reason is not None:
            reason_kind = self.reason.kind.name.lower()
        return {
            "case_id": self.case_id,
            "state": self.state,
            "label_map": str(self.label_map),
            "reason": str(self.reason or ""),
            "reason_kind": reason_kind,
            "part_id": self.part_id,
            "num_parts": self.num_parts,
        }


def read_records(folder: Path | None) -> RecordedRuns:
    """Read the records of all runs into a folder; None means that they write a file.

    A line that cannot be used is left out, with a note, and so are files that cannot be read.
    """
    runs = {}
    notes: list[Note] = []
    paths: list[Path] = []
    try:
        if folder is not None:
            place = folder / RECORD_FOLDER
            paths = sorted(path for path in place.iterdir() if path.match("record*.jsonl"))
    except (FileNotFoundError, NotADirectoryError):
        pass  # No run has left a record.
    except OSError as error:
        notes.append(NoteKind.UNREADABLE_RECORD(str(place), problem=error.strerror or str(error)))
    for path in paths:
        try:
            require_file(path)
            lines = path.read_bytes().splitlines(keepends=True)
        except InputError as error:
            notes.append(NoteKind.UNREADABLE_RECORD(problem=str(error)))
            continue
        except OSError as error:
            notes.append(
                NoteKind.UNREADABLE_RECORD(str(path), problem=error.strerror or str(error))
            )
            continue
        problems = []
        for number, line in enumerate(lines, start=1):
            try:
                values = parse_line(line)
                if not isinstance(values, dict):
                    raise ValueError("expected a JSON table")
                if "case_id" not in values:
                    runs[values["run"]] = RunSummary.from_dict(values)
                elif values["run"] in runs:
                    runs[values["run"]].cases.append(CaseRecord.from_dict(values))
                else:
                    raise ValueError("its run has no line")
            except (ValueError, TypeError, KeyError) as error:
                # A kill leaves a line without its end, which the next run removes.
                if line.endswith(b"\n"):
                    problems.append(f"line {number}: {shorten(error, MAX_OF_A_REASON)}")
        if problems:
            notes.append(NoteKind.UNUSABLE_LINES(str(path), lines=len(problems), first=problems[0]))
    return RecordedRuns(folder, runs.values(), notes)


def _differing(one: Any, other: Any, key: str = "") -> list[str]:
    """Return the dotted keys whose values differ; of the names of labels, how many do."""
    if one == other:
        return []
    if isinstance(one, dict) and isinstance(other, dict):
        keys = []
        for name in dict.fromkeys((*one, *other)):
            inner_key = f"{key}.{name}" if key else name
            keys += _differing(one.get(name), other.get(name), inner_key)
        if key == "label_names" and len(keys) > 1:
            return [f"{key} of {len(keys)} labels"]
        return keys
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other) == 1:
        return _differing(one[0], other[0], key)
    return [key]


def _other_values(record: CaseRecord, run: RunSummary, now: RunSummary) -> list[str]:
    """Return the keys of settings that differ between the run of a case's record and the run now.

    The device counts unless both runs let it be chosen, or asked for the same one.
    """
    keys = _differing(run.settings, now.settings)
    before = re.sub(r":\d+$", "", record.device or now.device)  # The GPU's number does not count.
    if run.requested_device != now.requested_device and before != re.sub(r":\d+$", "", now.device):
        keys.append("device")
    return keys


def case_states(folder: Path) -> tuple[list[CaseState], list[Note], bool]:
    """Return the state of each case of the runs into a folder, notes, and whether all are done.

    Of runs on the same inputs, the last one counts. Raise InputError if there is no record.
    """
    recorded = read_records(folder)
    if not recorded.runs:
        problem = f"{folder}: holds no record of `infer`; name the output folder of a run"
        raise InputError("\n  ".join([problem, *map(str, recorded.notes)]))
    last_runs = {run.inputs: run for run in recorded.runs}
    states = {}
    for run in sorted(last_runs.values(), key=lambda run: run.started):
        for number, (case_id, name) in enumerate(run.all_cases.items()):
            label_map = folder / name
            states[case_id] = CaseState(recorded, case_id, label_map, None, run, number)

    is_complete = not recorded.notes and all(case.state == "done" for case in states.values())
    notes = list(recorded.notes)
    done = [case.record for case in states.values() if case.record is not None]
    notes += notes_on_cases(done, {})
    vanished = [record.case_id for record in done if record.vanished_labels]
    if vanished:
        notes.append(NoteKind.LABELS_VANISHED_IN(cases=len(vanished), names=vanished))
    return list(states.values()), notes, is_complete


def files_before(recorded: RecordedRuns, now: RunSummary) -> dict[str, dict[Path, FileBefore]]:
    """Return the files that earlier runs into a folder have written, by the name of their case."""
    found: dict[str, dict[Path, FileBefore]] = {}
    folder = recorded.folder or Path()  # Without a folder there are no runs.
    for run in recorded.runs:
        for record in run.cases:
            if record.output is None or record.case_id not in run.all_cases:
                continue
            label_map = folder / run.all_cases[record.case_id]
            if not label_map.is_relative_to(folder) or ".." in label_map.relative_to(folder).parts:
                continue
            is_same = run.version == now.version and not _other_values(record, run, now)
            inputs = checksums_of_inputs(record.contents) if is_same else {}
            for written, checksum in record.files.items():
                name = Path(written)
                # With any record, no other file is taken for one of the case.
                is_of_case = name.parts[:1] and name.parts[0].startswith(stem_of(label_map))
                if is_of_case and len(name.parts) <= 2 and ".." not in name.parts:
                    path = label_map.parent / name
                    found.setdefault(record.case_id, {})[path] = (checksum, inputs)
    return found
