"""The record of runs in their output folder: `OUTPUT/.crfrefine/record.jsonl`, a line per run and per case.

A part of a job array has a file of its own, so that no storage mixes the lines of two machines.
Lines are only ever added; the last line of a case counts.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from crfrefine.base.text import MAX_OF_A_REASON, counted, listed, shorten
from crfrefine.errors import ConfigError, InputError
from crfrefine.io.atomic import cannot_write
from crfrefine.io.json import append_lines, open_lines, parse_line, without_nonfinite
from crfrefine.io.paths import is_there, require_file
from crfrefine.parameters.model import CrfParameters
from crfrefine.runs.records import FAILED, SCHEMA, CaseRecord, RunSummary, check_kinds, to_json

RECORD_FOLDER = ".crfrefine"

NOT_REACHED = "not reached"
OTHER_VALUES = "refined with other values of"
NO_RECORD = "no record of its label map, as after a kill"
CHANGED = "its label map was changed since it was recorded"
OTHER_INPUTS = "refined from other inputs"
ADVICE = {
    NO_RECORD: "skipped, though other parameters may have made it",
    CHANGED: "skipped, and its record left out",
    OTHER_INPUTS: "skipped; omit --continue to refine all cases again",
}
"""What --continue does with a case that is done, but for a doubt."""


class RecordFile:
    """Adds the lines of a run to the record of its part."""

    def __init__(self, path: Path, summary: RunSummary) -> None:
        self._path = path
        self._run = uuid.uuid4().hex[:12]
        self._waiting = b""  # what the disk has not taken
        self._file = open_lines(path)
        try:
            self.append(summary.head())
        except BaseException:
            os.close(self._file)
            raise

    def append(self, *lines: Mapping[str, Any]) -> None:
        """Add lines, after those that the disk did not take before; raise CrfRefineError if it does not take them now."""
        self._waiting += b"".join(to_json({"run": self._run, **line}).encode() for line in lines)
        try:
            append_lines(self._file, self._waiting, sync=True)
        except OSError as error:
            raise cannot_write(self._path, error) from error
        self._waiting = b""

    def close(self) -> None:
        """Write what is left, and close the file."""
        try:
            if self._waiting:
                self.append()
        finally:
            os.close(self._file)


def record_path(output: Path, num_parts: int = 1, part_id: int = 0) -> Path:
    """Return the record of a part in its output folder."""
    return output / RECORD_FOLDER / (f"record-{part_id}-of-{num_parts}.jsonl" if num_parts > 1 else "record.jsonl")


@dataclass(frozen=True)
class RecordedRun:
    """The line of a run."""

    head: Mapping[str, Any]  # as `RunSummary.head` returns it
    started: datetime

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that the results of its cases depend on."""
        return settings_of(self.head["parameters"], self.head.get("network_spacing"))


@dataclass(frozen=True)
class Entry:
    """The line of a case."""

    record: CaseRecord
    run: RecordedRun


class CaseState(NamedTuple):
    """The state of a case, for `--continue` and for `status`."""

    case_id: str
    state: str  # "done", "failed" or "missing"
    label_map: Path
    reason: str = ""  # why it is not done; the reason of a case that is done is a doubt
    record: CaseRecord | None = None  # of a case that is done, if it describes the label map


@dataclass
class RecordedRuns:
    """All runs into a folder."""

    runs: list[RecordedRun] = field(default_factory=list)  # in the order in which they began
    entries: list[Entry] = field(default_factory=list)  # in the order of their runs
    notes: list[str] = field(default_factory=list)  # lines that cannot be used

    @cached_property
    def _begun(self) -> dict[str, datetime]:
        """When the last run without --continue began, by case."""
        begun = {}
        for run in self.runs:
            if not run.head["resumed"]:
                own = list(run.head["all_cases"])[run.head["part_id"] :: run.head["num_parts"]]
                begun.update(dict.fromkeys(own, run.started))
        return begun

    @cached_property
    def latest(self) -> dict[str, Entry]:
        """The last line of each case that no later run has begun anew."""
        pairs = ((entry.record.case_id, entry) for entry in self.entries)
        return {case_id: entry for case_id, entry in pairs if entry.run.started >= self._begun.get(case_id, entry.run.started)}

    def state_of(
        self, case_id: str, label_map: Path, others: Sequence[Path], settings: Mapping[str, Any], inputs: Sequence[str] = ()
    ) -> CaseState:
        """Return whether a case is done, without opening a file.

        Args:
            case_id: its name.
            label_map: its output.
            others: its other outputs.
            settings: what its result depends on, as `settings_of` returns it.
            inputs: the folders and files that it is refined from; empty means that they do not matter.
        """
        entry, written = self.latest.get(case_id), time_of_change(label_map)
        if entry is not None and entry.record.output is not None and entry.record.output.name != label_map.name:
            entry = None  # It describes a label map in another format.
        if entry is not None and entry.record.status == FAILED:
            failures = entry.record.failures
            return CaseState(case_id, "failed", label_map, failures[0].message if failures else "no reason is recorded")
        gone = next((path for path in (label_map, *others) if not is_there(path)), None)
        begun = self._begun.get(case_id)
        # Files of an earlier run are not results of the run that is continued.
        is_older = entry is None and written is not None and begun is not None and datetime.fromisoformat(written) < begun
        if written is None or gone is not None or is_older:
            is_new = is_older or (entry is None and gone == label_map)
            return CaseState(case_id, "missing", label_map, NOT_REACHED if is_new else f"{gone} is gone")
        if entry is None or entry.record.written != written:
            return CaseState(case_id, "done", label_map, NO_RECORD if entry is None else CHANGED)
        if keys := _differing(entry.run.settings, settings):
            return CaseState(case_id, "missing", label_map, f"{OTHER_VALUES} {listed(keys)}")
        is_same = not inputs or entry.run.head["inputs"] == list(inputs)
        return CaseState(case_id, "done", label_map, "" if is_same else OTHER_INPUTS, entry.record)


def read_records(folder: Path) -> RecordedRuns:
    """Read the records of all runs into a folder; a line that cannot be used is left out, with a note."""
    result = RecordedRuns()
    runs: dict[str, RecordedRun] = {}
    for path in sorted((folder / RECORD_FOLDER).glob("record*.jsonl")):
        bad: list[str] = []
        try:
            require_file(path)
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    try:
                        _read_line(parse_line(line), runs, result.entries)
                    except (ValueError, TypeError, KeyError) as error:
                        # A kill leaves a line without its end, which the next run removes.
                        if line.endswith(b"\n"):
                            bad.append(f"line {number}: {shorten(error, MAX_OF_A_REASON)}")
        except OSError as error:
            bad.append(error.strerror or str(error))
        except InputError as error:
            result.notes.append(str(error))
        if bad:
            result.notes.append(f"{path}: {counted(len(bad), 'line')} of the record cannot be used: {bad[0]}")
    result.runs = sorted(runs.values(), key=lambda run: run.started)
    result.entries.sort(key=lambda entry: entry.run.started)
    return result


_HEAD = ("started", "num_parts", "part_id", "parameters", "all_cases", "resumed", "inputs")
"""Fields of the line of a run that are read again."""


def _read_line(values: Any, runs: dict[str, RecordedRun], entries: list[Entry]) -> None:
    """Add a line to the runs or to the entries; raise ValueError, TypeError or KeyError if it is neither."""
    if not isinstance(values, dict):
        raise ValueError("expected a JSON table")
    if "case_id" in values:
        if values["run"] not in runs:
            raise ValueError("its run has no line")
        entries.append(Entry(CaseRecord.from_dict(values), runs[values["run"]]))
        return
    if values["schema"] != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA}, which this version of crfrefine writes")
    check_kinds(RunSummary, {name: values[name] for name in _HEAD}, _HEAD)
    if not all(isinstance(text, str) for text in (*values["inputs"], *values["all_cases"].values())):
        raise TypeError("inputs and all_cases: expected texts")
    if not 0 <= values["part_id"] < values["num_parts"]:
        raise ValueError(f"part {values['part_id']} of {values['num_parts']}: parts are numbered from 0")
    started = datetime.fromisoformat(values["started"])
    if started.tzinfo is None:
        raise ValueError("started: expected a time zone")
    runs[values["run"]] = RecordedRun(values, started)


def settings_of(parameters: Mapping[str, Any], network_spacing: object) -> dict[str, Any]:
    """Return the settings that results depend on, as JSON has them; keys that an older version lacked have their defaults."""
    with suppress(ConfigError):  # A newer version may have more keys.
        parameters = CrfParameters.from_dict(parameters).to_dict()
    settings: dict[str, Any] = json.loads(json.dumps(without_nonfinite({**parameters, "network_spacing": network_spacing}), default=str))
    return settings


def time_of_change(path: Path) -> str | None:
    """Return the time of a file's last change, UTC; None if it does not exist."""
    try:
        changed = path.stat().st_mtime_ns
    except (OSError, ValueError):  # A name in a record may be one that no system takes.
        return None
    return datetime.fromtimestamp(changed / 1e9, UTC).isoformat(timespec="microseconds")


def _differing(one: Any, other: Any, key: str = "") -> list[str]:
    """Return the dotted keys whose values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = dict.fromkeys((*one, *other))
        return [name for inner in names for name in _differing(one.get(inner), other.get(inner), f"{key}.{inner}" if key else inner)]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other) == 1:
        return _differing(one[0], other[0], key)
    return [] if one == other else [key]


def case_states(folder: Path, recorded: RecordedRuns) -> list[CaseState]:
    """Return the state of each case of the runs into a folder; of runs on the same inputs, the last one counts."""
    last = {tuple(run.head["inputs"]): run for run in recorded.runs}
    states: dict[str, CaseState] = {}
    for run in sorted(last.values(), key=lambda run: run.started):
        for case_id, name in run.head["all_cases"].items():
            entry, label_map = recorded.latest.get(case_id), folder / name
            others = [] if entry is None else [label_map.parent / path.name for path in entry.record.files]
            states[case_id] = recorded.state_of(case_id, label_map, others, run.settings)
    return list(states.values())
