"""The records of a run and of its cases, lines of a file per part in the output folder.

docs/reference/summary.md describes them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from crfrefine.base.failures import Failure
from crfrefine.base.text import MAX_OF_A_REASON, counted, listed, shorten, shorten_value
from crfrefine.cases.case_files import CaseFiles
from crfrefine.errors import ConfigError, InputError
from crfrefine.io.json import parse_line, to_json
from crfrefine.io.paths import require_file
from crfrefine.parameters.model import CrfParameters
from crfrefine.version import __version__

SCHEMA = 2

# The note on labels that a case has lost begins with it; the advice follows a semicolon.
VANISHED = "labels that vanished"
RECORD_FOLDER = ".crfrefine"

# Options that change results beside the parameters.
READING = ("network_spacing", "mapping", "strokes_background", "strokes_ignore")

OTHER_VALUES = "refined with other values of"
OTHER_STROKES = "refined with other strokes"
NO_RECORD = "no record of its label map, as after a kill"
CHANGED = "its label map was changed since it was recorded"
OTHER_INPUTS = "refined from other inputs"
# The consequence for --continue of each doubt about a case that is done.
ADVICE = {
    NO_RECORD: "skipped if it is complete, though other parameters may have made it",
    CHANGED: "skipped if it is complete, and its record left out",
    OTHER_INPUTS: "skipped if it is complete; omit --continue to refine all cases again",
}


@dataclass
class Record:
    """The outcome of a case, common to all commands."""

    case_id: str
    status: str = "failed"  # "failed", or another one of the command
    # seconds of each stage; "stage.part" is a part of a stage
    times: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # assumptions about its files
    failures: list[Failure] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds spent on the case; its stages may have overlapped with other cases."""
        return sum(seconds for stage, seconds in self.times.items() if "." not in stage) + 0.0

    def fail(self, failure: Failure) -> None:
        """Mark the case as failed."""
        self.status = "failed"
        self.failures.append(failure)

    def has_failed_by(self, kind: type[Exception]) -> bool:
        """Return whether one of the failures is of this kind."""
        return any(failure.kind == kind.__name__ for failure in self.failures)


@dataclass
class CaseRecord(Record):
    """The outcome of a case: "done", "skipped" (its output existed) or "failed".

    Fields that it did not reach keep their defaults.
    """

    output: Path | None = None  # the label map
    written: str | None = None  # time of its last change, UTC
    probabilities: Path | None = None
    logits: Path | None = None
    preview: Path | None = None
    structures: Path | None = None
    grid_shape: tuple[int, ...] | None = None  # voxels along each axis
    spacing: tuple[float, ...] | None = None  # mm, one per grid axis
    num_labels: int | None = None  # L, background included
    num_modalities: int | None = None  # channels of the image
    mapped_values: tuple[int, ...] = ()  # of its label map, to which --map gave new labels
    num_voxels_in_mask: int | None = None
    # in the mask, but left out: all labels had the same logit
    num_padding_voxels: int | None = None
    voxels_removed: int | None = None  # of components that the small-object rules removed
    voxels_filled: int | None = None  # of holes that they filled
    input_type: str | None = None  # "logits", "probabilities" or "labels"
    # of the sigmoid channels; None means that channels are labels
    regions: dict[str, Any] | None = None
    # the time of the last change of each file of strokes, by its name
    strokes: dict[str, str | None] = field(default_factory=dict)
    device: str | None = None
    num_iterations: int | None = None
    converged: bool | None = None
    energy: tuple[float, ...] = ()  # free energy per iteration
    filters: tuple[str, ...] = ()  # how each kernel was computed
    voxels_changed: int | None = None
    voxels_before: tuple[int, ...] = ()  # per label, background first
    voxels_after: tuple[int, ...] = ()
    # in the network's result, but not in the refined label map
    vanished_labels: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of the JSON file."""
        fields = dict(vars(self))
        for name in ("times", "notes"):  # They go to the end.
            fields[name] = fields.pop(name)
        failure = Failure("", "")
        if self.failures:
            failure = self.failures[0]
        del fields["failures"]
        fields["error"] = failure.message or None
        fields["error_kind"] = failure.kind or None
        fields["error_traceback"] = failure.traceback
        return fields

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Restore a record from its JSON.

        Raise TypeError or KeyError if a field has a value of another kind or is missing.
        """
        check_kinds(cls, values, ("case_id", "status"))
        fields: dict[str, Any] = {}
        for each in dataclasses.fields(cls):
            value = values.get(each.name)
            if value is not None:
                fields[each.name] = value
        for name in _PATHS:
            if name in fields:
                fields[name] = Path(fields[name])
        fields["failures"] = []
        error = values.get("error")
        if isinstance(error, str):
            fields["failures"].append(Failure(error, str(values.get("error_kind"))))
        return cls(**fields)


# Fields of a record that are paths.
_PATHS = ("output", "probabilities", "logits", "preview", "structures")

# Types of fields, to those of JSON; all others are texts.
_KINDS: dict[str, type] = {"int": int, "bool": bool, "dict": dict, "list": list, "tuple": list}


def check_kinds(cls: type, values: Mapping[str, Any], required: Sequence[str]) -> None:
    """Raise TypeError or KeyError unless the values of a line fit the fields of a dataclass.

    Each has the kind of its field, and none of `required` is missing.
    """
    for each in dataclasses.fields(cls):
        value = values.get(each.name)
        if value is None:
            if each.name in required:
                raise KeyError(each.name)
            continue
        kind = _KINDS.get(re.split(r"\W", str(each.type))[0], str)
        if type(value) is not kind:
            raise TypeError(f"{each.name}: expected {kind.__name__}, got {shorten_value(value)}")
    times = values.get("times") or {}
    if not all(isinstance(seconds, int | float) for seconds in times.values()):
        raise TypeError("times: expected numbers")


@dataclass
class RunSummary:
    """The outcome of a run."""

    device: str
    threads: int
    parameters: dict[str, Any]  # as `CrfParameters.to_dict` returns them
    network_spacing: float | tuple[float, ...] | str | None = None
    mapping: dict[int, int] = field(default_factory=dict)  # the label of each value by --map
    strokes_background: int | None = None
    strokes_ignore: int = 0
    # how `-c auto` chose the parameters; None means that they were given
    choice: Mapping[str, Any] | None = None
    requested_device: str = "auto"
    max_memory: int | None = None  # bytes that the run could take at its start, if a limit is known
    max_memory_source: str = ""  # what sets this limit, a phrase
    num_parts: int = 1
    part_id: int = 0  # from 0
    # by number, where each structure has its own file
    label_names: dict[int, str] = field(default_factory=dict)
    num_cases: int = 0  # of this part
    # label map of each case of all parts, in the output folder
    all_cases: dict[str, str] = field(default_factory=dict)
    output_folder: str = ""  # or for one case a file
    inputs: tuple[str, ...] = ()
    working_folder: str = ""  # where relative paths of this run begin
    command: tuple[str, ...] = ()  # the arguments of the command line, if it was started from there
    resumed: bool = False  # whether label maps that were there were kept
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    seconds: float = 0.0  # wall time
    interrupted: bool = False  # whether it was stopped before the end
    cases: list[CaseRecord] = field(default_factory=list)  # one per processed case, in order

    def count(self, status: str) -> int:
        """Return the number of cases that are "done", "skipped" or "failed"."""
        return sum(record.status == status for record in self.cases)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that the results depend on, as JSON has them.

        Parameters that an older version lacked have their defaults.
        """
        parameters = self.parameters
        with suppress(ConfigError):  # A newer version may have more keys.
            parameters = CrfParameters.from_dict(parameters).to_dict()
        reading = {name: getattr(self, name) for name in READING}
        return dict(json.loads(to_json({**parameters, **reading})))

    def head(self) -> dict[str, Any]:
        """Return plain values for a file, without the cases."""
        head: dict[str, Any] = {"schema": SCHEMA, "version": __version__}
        for each in dataclasses.fields(self):
            if each.name != "cases":
                head[each.name] = getattr(self, each.name)
        head["started"] = self.started.isoformat()
        return head

    def to_json(self) -> str:
        """Return the text of the file of `--summary`."""
        content = self.head()
        for status in ("done", "skipped", "failed"):
            content[f"num_{status}"] = self.count(status)
        content["cases"] = [record.to_dict() for record in self.cases]
        return to_json(content, indent=2)


def record_path(output: Path, num_parts: int = 1, part_id: int = 0) -> Path:
    """Return the record of a part in its output folder."""
    name = "record.jsonl"
    if num_parts > 1:
        name = f"record-{part_id}-of-{num_parts}.jsonl"
    return output / RECORD_FOLDER / name


class CaseState(NamedTuple):
    """The state of a case, for `--continue` and for `status`."""

    case_id: str
    state: str  # "done", "failed" or "missing"
    label_map: Path
    reason: str = ""  # why it is not done; the reason of a case that is done is a doubt
    record: CaseRecord | None = None  # of a case that is done, if it describes the label map


class RecordedRuns:
    """All runs into a folder, in the order in which they began.

    `notes` are on lines that cannot be used.
    """

    def __init__(self, runs: Iterable[RunSummary] = (), notes: Sequence[str] = ()) -> None:
        self.runs = sorted(runs, key=lambda run: run.started)
        self.notes = list(notes)
        # By case: when the last run without --continue began, and the last line that no later run
        # has begun anew.
        self._begun: dict[str, datetime] = {}
        self.latest: dict[str, RecordedCase] = {}
        for run in self.runs:
            if not run.resumed:
                for case_id in list(run.all_cases)[run.part_id :: run.num_parts]:
                    self._begun[case_id] = run.started
                    self.latest.pop(case_id, None)
            for record in run.cases:
                self.latest[record.case_id] = RecordedCase(record, run)

    def state_of(
        self, case_id: str, label_map: Path, others: Sequence[Path], now: RunSummary
    ) -> CaseState:
        """Return whether a case with these outputs is done, by the settings of a run."""
        recorded = self.latest.get(case_id)
        if recorded is not None and not recorded.describes(label_map):
            recorded = None
        if recorded is None:
            return self._unrecorded_state(case_id, label_map, others)
        record = recorded.record
        if record.status == "failed":
            reason = record.failures[0].message if record.failures else "no reason is recorded"
            return CaseState(case_id, "failed", label_map, reason)

        written = time_of_change(label_map)
        missing = _first_missing((label_map, *others))
        if written is None or missing is not None:
            return CaseState(case_id, "missing", label_map, f"{missing} is gone")
        if record.written != written:
            return CaseState(case_id, "done", label_map, CHANGED)
        keys = _differing(recorded.run.settings, now.settings)
        if keys:
            return CaseState(case_id, "missing", label_map, f"{OTHER_VALUES} {listed(keys)}")
        return CaseState(case_id, "done", label_map, "", record)

    def _unrecorded_state(self, case_id: str, label_map: Path, others: Sequence[Path]) -> CaseState:
        """Return the state of a case whose label map no record describes."""
        written = time_of_change(label_map)
        missing = _first_missing((label_map, *others))
        run_began = self._begun.get(case_id)
        # Files of an earlier run are not results of the run that is continued.
        is_older = (
            written is not None
            and run_began is not None
            and datetime.fromisoformat(written) < run_began
        )
        if is_older or missing == label_map:
            return CaseState(case_id, "missing", label_map, "not reached")
        if written is None or missing is not None:
            return CaseState(case_id, "missing", label_map, f"{missing} is gone")
        return CaseState(case_id, "done", label_map, NO_RECORD)


class RecordedCase(NamedTuple):
    """The record of a case, and the run that wrote it."""

    record: CaseRecord
    run: RunSummary

    def describes(self, label_map: Path) -> bool:
        """Return whether the record is not of a label map in another format."""
        return self.record.output is None or self.record.output.name == label_map.name


def _first_missing(paths: Iterable[Path]) -> Path | None:
    """Return the first path that does not exist; None if all do."""
    for path in paths:
        if not os.path.exists(path):  # noqa: PTH110 - no exception for odd names
            return path
    return None


def read_records(folder: Path) -> RecordedRuns:
    """Read the records of all runs into a folder.

    A line that cannot be used is left out, with a note.
    """
    runs: dict[str, RunSummary] = {}
    notes: list[str] = []
    for path in sorted((folder / RECORD_FOLDER).glob("record*.jsonl")):
        try:
            require_file(path)
            lines = path.read_bytes().splitlines(keepends=True)
        except (OSError, InputError) as error:
            notes.append(str(error))
            continue
        problems = []
        for number, line in enumerate(lines, start=1):
            try:
                _read_line(parse_line(line), runs)
            except (ValueError, TypeError, KeyError) as error:
                # A kill leaves a line without its end, which the next run removes.
                if line.endswith(b"\n"):
                    problems.append(f"line {number}: {shorten(error, MAX_OF_A_REASON)}")
        if problems:
            number_of_lines = counted(len(problems), "line")
            notes.append(f"{path}: {number_of_lines} of the record cannot be used: {problems[0]}")
    return RecordedRuns(runs.values(), notes)


# Fields of the line of a run that are read again.
_HEAD = ("started", "num_parts", "part_id", "parameters", "all_cases", "resumed", "inputs")


def _read_line(values: Any, runs: dict[str, RunSummary]) -> None:
    """Add a line to the runs, or to the cases of its run.

    Raise ValueError, TypeError or KeyError if it is neither.
    """
    if not isinstance(values, dict):
        raise ValueError("expected a JSON table")
    if "case_id" in values:
        if values["run"] not in runs:
            raise ValueError("its run has no line")
        runs[values["run"]].cases.append(CaseRecord.from_dict(values))
    else:
        runs[values["run"]] = _read_head(values)


def _read_head(values: dict[str, Any]) -> RunSummary:
    """Return the run of a line, without its cases; raises like `_read_line`."""
    if values["schema"] != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA}, which this version of crfrefine writes")
    check_kinds(RunSummary, {name: values[name] for name in _HEAD}, _HEAD)
    texts = (*values["inputs"], *values["all_cases"].values())
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("inputs and all_cases: expected texts")
    part_id = values["part_id"]
    if not 0 <= part_id < values["num_parts"]:
        raise ValueError(f"part {part_id} of {values['num_parts']}: parts are numbered from 0")
    started = datetime.fromisoformat(values["started"])
    if started.tzinfo is None:
        raise ValueError("started: expected a time zone")

    fields = {name: values[name] for name in (*_HEAD, *READING, "choice") if name in values}
    fields["started"] = started
    fields["inputs"] = tuple(values["inputs"])
    return RunSummary("", 0, **fields)


def time_of_change(path: Path) -> str | None:
    """Return the time of a file's last change, UTC; None if it does not exist."""
    try:
        changed = path.stat().st_mtime_ns
    except (OSError, ValueError):  # A record may hold a name that the system refuses.
        return None
    return datetime.fromtimestamp(changed / 1e9, UTC).isoformat(timespec="microseconds")


def times_of_strokes(files: CaseFiles) -> dict[str, str | None]:
    """Return the time of the last change of each file of a case's strokes, by its name."""
    return {path.name: time_of_change(path) for path in files.strokes}


def _differing(one: Any, other: Any, key: str = "") -> list[str]:
    """Return the dotted keys whose values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = []
        for name in dict.fromkeys((*one, *other)):
            inner_key = f"{key}.{name}" if key else name
            keys += _differing(one.get(name), other.get(name), inner_key)
        return keys
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other) == 1:
        return _differing(one[0], other[0], key)
    if one == other:
        return []
    return [key]


def case_states(folder: Path, recorded: RecordedRuns) -> list[CaseState]:
    """Return the state of each case of the runs into a folder.

    Of runs on the same inputs, the last one counts.
    """
    last_runs = {run.inputs: run for run in recorded.runs}
    states: dict[str, CaseState] = {}
    for run in sorted(last_runs.values(), key=lambda run: run.started):
        for case_id, name in run.all_cases.items():
            label_map = folder / name
            others = []
            if case_id in recorded.latest:
                record = recorded.latest[case_id].record
                paths = (record.probabilities, record.logits, record.preview, record.structures)
                others = [label_map.parent / path.name for path in paths if path is not None]
            states[case_id] = recorded.state_of(case_id, label_map, others, run)
    return list(states.values())


def take_up(
    folder: Path | None, cases: Iterable[tuple[CaseFiles, Path, Sequence[Path]]], now: RunSummary
) -> tuple[dict[str, CaseRecord], list[str]]:
    """Return the records of the cases that earlier runs into a folder have done, for --continue.

    And notes on them. Each case has its label map and all outputs. Without a folder, only
    the files count.
    """
    recorded = RecordedRuns()
    if folder is not None:
        recorded = read_records(folder)
    done: dict[str, CaseRecord] = {}
    cases_of_reason: dict[str, list[str]] = {}
    for files, label_map, outputs in cases:
        case_id = files.case_id
        case = recorded.state_of(case_id, label_map, outputs, now)
        has_record = folder is not None
        if case.state == "done" and _has_other_strokes(files, case, has_record=has_record):
            cases_of_reason.setdefault(OTHER_STROKES, []).append(case_id)
        elif case.state == "done":
            done[case_id] = case.record or CaseRecord(case_id)
        reason = case.reason
        if case.record is not None and recorded.latest[case_id].run.inputs != now.inputs:
            reason = OTHER_INPUTS
        if reason in ADVICE or reason.startswith(OTHER_VALUES):
            cases_of_reason.setdefault(reason, []).append(case_id)
    if folder is None:
        return done, []
    notes = list(recorded.notes)
    for reason, names in cases_of_reason.items():
        advice = ADVICE.get(reason, "refined again")
        notes.append(f"{counted(len(names), 'case')} ({listed(names)}): {reason}; {advice}")
    return done, notes


def _has_other_strokes(files: CaseFiles, case: CaseState, *, has_record: bool) -> bool:
    """Return whether the strokes of a case that is done are not those it was refined with."""
    drawn = times_of_strokes(files)
    if case.record is not None:
        return case.record.strokes != drawn
    if has_record:
        return False
    # A single file has no record: only newer strokes show.
    written = time_of_change(case.label_map) or ""
    return any((time or "") > written for time in drawn.values())
