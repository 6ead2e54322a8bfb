"""What is left of folder runs, as their records tell: which cases are done, failed or missing, and the commands that do the rest.

`infer/summary_reading.py` reads the records, and `report.py` has what is found.
"""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from crfrefine.base.inputs import identities
from crfrefine.base.text import counted, listed, shorten
from crfrefine.errors import InputError
from crfrefine.io.json import read_json, require_usable
from crfrefine.io.paths import is_there, suffix_of
from crfrefine.runs.execution.records import FAILED
from crfrefine.runs.infer.records import LINES_SUFFIX, RECORD_FOLDER, note_on_num_labels, records_in, time_of_change
from crfrefine.runs.infer.summary_reading import MAX_BYTES, NotASummaryError, RecordedCase, RecordedRun, read_summary
from crfrefine.runs.status.report import DONE, MISSING, CaseStatus, PartStatus, RunStatus, StatusReport, go_there, quote, rest_command

SUFFIXES = (".json", LINES_SUFFIX)

_OUTPUTS = ("output", "probabilities", "logits", "preview", "structures")


def find_status(paths: Sequence[Path]) -> StatusReport:
    """Merge summaries.

    Args:
        paths: output folders of runs, summaries, and folders that hold some.

    Raises:
        InputError: a file is not a summary, or a folder holds none.
    """
    report = StatusReport()
    others: list[RunStatus] = []
    groups: dict[tuple[str, tuple[str, ...]], list[RecordedRun]] = {}
    seen: set[Path | tuple[int, int]] = set()
    for path in paths:
        for file, runs in _summaries_in(path, report.notes).items():
            if identities(file) & seen:
                continue
            seen |= identities(file)
            if isinstance(runs, RunStatus):
                others.append(runs)
                continue
            for run in runs:
                require_cases(run)
                # Where results are now: a later run may have found the folder under another name.
                named_by = runs[-1] if file.parent.name == RECORD_FOLDER else run
                key = str(named_by.head.get("output_folder")), tuple(map(str, run.head["inputs"]))
                groups.setdefault(key, []).append(run)
    for (output_folder, _), group in groups.items():
        # By the second in which they began, then by the time of the last record.
        report.runs.append(_merge(output_folder, sorted(group, key=lambda run: (run.started, run.path.stat().st_mtime_ns))))
    report.runs += others
    return report


def _summaries_in(path: Path, notes: list[str]) -> dict[Path, list[RecordedRun] | RunStatus]:
    """Return the content of a summary, or of all summaries and records of runs in a folder; damaged ones there become notes."""
    if not path.is_dir():
        if suffix_of(path):
            raise InputError(f"{path}: is no record: a run whose output is a file keeps none; name the file that --summary wrote")
        try:
            return {path: read_summary(path)}
        except NotASummaryError:
            other = evaluation_status(path)
            if other is None:
                raise
            return {path: other}
    try:
        files = sorted(file for file in path.iterdir() if file.name.lower().endswith(SUFFIXES) and not file.name.startswith("."))
        files += records_in(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be listed: {error.strerror or error}") from error
    found: dict[Path, list[RecordedRun] | RunStatus] = {}
    for file in files:
        try:
            found[file] = read_summary(file)
        except NotASummaryError as error:
            if error.is_damaged:
                notes.append(f"{error}; continuing without it")
            elif (other := evaluation_status(file)) is not None:
                found[file] = other
    if not found and not notes:
        raise InputError(
            f"{path}: holds no record of `infer`\n  Name the output folder of a run, or the files that --summary wrote. A run whose output "
            "is a file keeps no record,\n  nor did earlier versions: run the command again with --continue; what is done is skipped and "
            "recorded."
        )
    return found


def _merge(output_folder: str, group: Sequence[RecordedRun]) -> RunStatus:
    """Return what is left of a run."""
    last = group[-1]
    label_maps = {str(case_id): _resolve(path, last) for case_id, path in last.head["all_cases"].items()}
    records = _last_records(group)
    num_parts = last.num_parts
    own = {run.part_id: run for run in group if run.num_parts == num_parts}  # The last run of each part.
    num_used = max(1, min(num_parts, len(label_maps)))  # The others have no cases.
    starts = [_first_start(own.get(part_id), group) for part_id in range(num_used)]
    wanted = [(own.get(part_id) or last).parameters for part_id in range(num_used)]
    cases = [
        _case_status(case_id, number % num_parts, path, records.get(case_id), starts[number % num_parts], wanted[number % num_parts])
        for number, (case_id, path) in enumerate(label_maps.items())
    ]
    parts = [_part(part_id, own.get(part_id), last, cases[part_id::num_parts]) for part_id in range(num_used)]
    notes = _notes(output_folder, group, cases, records)
    return RunStatus(output_folder, cases, parts, notes)


def _last_records(group: Sequence[RecordedRun]) -> dict[str, RecordedCase]:
    """Return the last record of each case. A run without --continue does all of its cases again: older records of these are void."""
    records: dict[str, RecordedCase] = {}
    begun = None
    for run in group:
        # A run may have left two files: its record, and its summary.
        if not run.head.get("resumed") and (run.started, run.num_parts, run.part_id) != begun:
            for case_id in list(run.head["all_cases"])[run.part_id :: run.num_parts]:
                records.pop(case_id, None)
        begun = (run.started, run.num_parts, run.part_id)
        for values in run.not_reached:
            records.setdefault(values["case_id"], RecordedCase(values, run))
        for values in run.cases:
            records[values["case_id"]] = RecordedCase(values, run)
    return records


def _with_labels(values: Mapping[str, Any], names: object) -> str:
    """Return the name of a case with the labels that vanished in it."""
    known = names if isinstance(names, dict) else {}
    labels = values["vanished_labels"] if isinstance(values["vanished_labels"], list) else []
    return f"{shorten(values['case_id'], 40)} ({listed([str(known.get(str(label), label)) for label in labels])})"


def _case_status(
    case_id: str, part_id: int, label_map: Path, record: RecordedCase | None, first_start: str, parameters: Mapping[str, Any]
) -> CaseStatus:
    """Return what is known of a case. Files are not opened: `infer --continue` reads them to their end.

    Args:
        case_id: its name.
        part_id: the part that has it.
        label_map: where its label map goes.
        record: its last record, if it has any.
        first_start: time, UTC, from which on a label map without a record is a result of this run; "": any.
        parameters: of the last run of its part.
    """
    changed = time_of_change(label_map)
    there = changed is not None
    if record is None:
        if changed is not None and (not first_start or datetime.fromisoformat(changed) >= datetime.fromisoformat(first_start)):
            return CaseStatus(case_id, part_id, DONE, label_map)
        reason = "not reached; the label map that is there is from before the run" if there else "not reached"
        return CaseStatus(case_id, part_id, MISSING, label_map, reason, has_old_output=there)
    values = record.values
    if record.has_failed:
        reason = str(values.get("error") or "no reason is recorded")
        return CaseStatus(case_id, part_id, FAILED, label_map, reason, has_old_output=there)
    named = [label_map, *(_resolve(values[name], record.run) for name in _OUTPUTS if values.get(name))]
    gone = next((path for path in named if not is_there(path)), None)
    if gone is not None:
        return CaseStatus(case_id, part_id, MISSING, label_map, f"{gone} is gone")
    if record.other_tables(parameters):
        return CaseStatus(case_id, part_id, MISSING, label_map, "refined with other parameters than those of the last run")
    is_changed = values.get("written") is not None and not record.describes(changed)
    return CaseStatus(case_id, part_id, DONE, label_map, is_changed=is_changed)


def _resolve(path: object, run: RecordedRun) -> Path:
    """Return a path as a run has named it: relative ones begin in its working folder."""
    return Path(str(run.head["working_folder"])) / str(path)


def _first_start(own: RecordedRun | None, group: Sequence[RecordedRun]) -> str:
    """Return the time from which on a label map without a record is a result of a part; "": always, as --continue keeps older ones."""
    if own is None:
        return group[0].started
    return "" if own.head.get("resumed") else own.started


def _part(part_id: int, own: RecordedRun | None, last: RecordedRun, cases: Sequence[CaseStatus]) -> PartStatus:
    """Return what is left of a part with these cases; `own` is its last run, and `last` that of any part."""
    counts = Counter(case.state for case in cases)
    like = own or last
    command = None
    if counts[FAILED] + counts[MISSING] and like.head["command"]:
        command = rest_command(like.head["command"], last.num_parts, part_id, of_part=like.part_id, folder=like.head["working_folder"])
    state = "not started" if own is None else "interrupted" if own.is_interrupted else "ended"
    return PartStatus(part_id, counts, state, None if own is None else own.path, command)


def _notes(output_folder: str, group: Sequence[RecordedRun], cases: Sequence[CaseStatus], records: Mapping[str, RecordedCase]) -> list[str]:
    notes = []
    if not is_there(Path(output_folder)):
        notes.append(f"there is no {output_folder} here: paths are those that the run saw; ask where it ran, or put the folder back")
    now = group[-1].head["all_cases"].keys()
    gone = sorted({case_id for run in group for case_id in run.head["all_cases"]} - now)
    added = sorted(now - set(group[0].head["all_cases"]))
    if gone:
        notes.append(
            f"{counted(len(gone), 'case')} of earlier runs or other parts not in the last run, and not counted here: {listed(gone)}"
        )
    if added:
        notes.append(f"{counted(len(added), 'case')} of the last run not in the first one: {listed(added)}; parts share cases anew")
    if unrecorded := [case.case_id for case in cases if case.state == DONE and case.case_id not in records]:
        notes.append(f"{counted(len(unrecorded), 'label map')} without a record, as after a kill: {listed(unrecorded)}")
    if changed := [case.case_id for case in cases if case.is_changed]:
        notes.append(f"{counted(len(changed), 'label map')} changed since it was recorded: {listed(changed)}")
    if kept := [case.case_id for case in cases if case.has_old_output]:
        notes.append(
            f"{counted(len(kept), 'case')} not done, with a label map of an earlier run, which --continue keeps: {listed(kept)}; "
            "to refine these cases again, remove these label maps first"
        )
    with_record = [records[case.case_id] for case in cases if case.state == DONE and case.case_id in records]
    done = [record.values for record in with_record]
    if vanished := [_with_labels(values, group[-1].head.get("label_names")) for values in done if values.get("vanished_labels")]:
        notes.append(f"labels vanished in {counted(len(vanished), 'case')}: {listed(vanished)}")
    if (note := note_on_num_labels(done)) is not None:
        notes.append(note)
    kinds = {json.dumps(record.parameters, sort_keys=True) for record in with_record}
    if len(kinds) > 1:
        notes.append(f"the cases that are done were refined with {len(kinds)} different sets of parameters")
    if not any(run.head["command"] for run in group) and any(case.state != DONE for case in cases):
        notes.append("the run was started from Python, so there is no command to repeat: call run_inference with resume=True")
    return notes


# What is left of an evaluation, as its `summary.json` tells, for `crfrefine status`.

_KEYS = {"settings", "cases", "failures", "left_out"}


def evaluation_status(path: Path) -> RunStatus | None:
    """Return which cases an evaluation has measured, which failed, and which lack a file; None if the file is no summary of one."""
    try:
        content = read_json(path, MAX_BYTES)
        require_usable(content, "")
        if not isinstance(content, dict) or not content.keys() >= _KEYS:
            return None
        cases = _cases(content, path)
        command = _command(content["settings"])
    except (InputError, ValueError, TypeError, KeyError, AttributeError):
        return None
    counts = Counter(case.state for case in cases)
    left = command if counts[DONE] < len(cases) else None
    notes = []
    if counts[MISSING]:
        notes.append("missing cases lack a file: add it first")
    return RunStatus(os.path.realpath(path.parent), cases, [PartStatus(0, counts, "ended", path, left)], notes)


def _cases(content: Mapping[str, Any], path: Path) -> list[CaseStatus]:
    errors: dict[str, str] = {}
    for failure in content["failures"]:
        method = f"{failure['method']}: " if failure["method"] else ""
        errors.setdefault(str(failure["case"]), f"{method}{failure['error']}")
    cases = []
    for values in content["cases"]:
        case_id = str(values["case"])
        state = FAILED if case_id in errors or values["status"] == FAILED else DONE
        cases.append(CaseStatus(case_id, 0, state, path, errors.get(case_id)))
    cases += [CaseStatus(str(values["case"]), 0, MISSING, path, "; ".join(values["reasons"])) for values in content["left_out"]]
    return sorted(cases, key=lambda case: case.case_id)


def _command(settings: Mapping[str, Any]) -> str | None:
    """Return the command that measures again what failed, and what has come since; None if it was not started from a command line."""
    words = shlex.split(settings["command_line"] or "")
    if not words:
        return None
    if not {"--continue", "--resume"} & set(words):
        words[2:2] = ["--continue"]  # Behind a "--" it would be a folder.
    return go_there(str(settings.get("working_folder") or ""), " ".join(map(quote, words)))


# A run as `status` needs it: its summary must say which cases it has, and where its relative paths begin.


def require_cases(run: RecordedRun) -> None:
    """Raise InputError if a run does not say which cases it has."""
    head = run.head
    if not {"all_cases", "inputs", "command", "output_folder", "working_folder", "started"} <= head.keys():
        raise InputError(
            f"{run.path}: does not say which cases the run has: it is of an earlier version of crfrefine\n"
            "  Run `infer --continue` again: what is done is skipped and recorded."
        )
    texts = [head["output_folder"], head["working_folder"], *head["inputs"], *head["command"]] if _are_lists(head) else [None]
    if not all(map(_can_be_a_name, texts)) or _time(head["started"]) is None:
        raise InputError(
            f"{run.path}: expected a summary of `infer`: all_cases, inputs, command, folders and started are not as it writes them"
        )


def _are_lists(head: Mapping[str, Any]) -> bool:
    cases = head["all_cases"]
    usable = isinstance(cases, dict) and all(map(_can_be_a_name, cases.values()))
    return usable and isinstance(head["inputs"], list) and isinstance(head["command"], list)


def _can_be_a_name(text: object) -> bool:
    """Return whether a system can be given a text as the name of a file, or as a word of a command."""
    try:
        return isinstance(text, str) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _time(text: object) -> datetime | None:
    """Return a time of a summary; None if it is none, or without its time zone."""
    try:
        time = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return time if time.tzinfo is not None else None
