"""Which cases of folder runs are done, failed or missing, from the records of the runs; `crfrefine status` shows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from crfrefine.errors import InputError
from crfrefine.io.paths import suffix_of
from crfrefine.runs.infer.records import LINES_SUFFIX, RECORD_FOLDER, records_in, time_of_change
from crfrefine.runs.infer.summary_reading import NotASummaryError, RecordedCase, RecordedRun, read_summary

STATES = DONE, FAILED, MISSING = "done", "failed", "missing"
_OUTPUTS = ("output", "probabilities", "logits", "preview", "structures")


@dataclass(frozen=True)
class CaseStatus:
    """The state of a case."""

    case_id: str
    part_id: int
    state: str  # one of STATES
    output: str  # its label map
    reason: str | None = None  # the error of a failed case, or the missing file


@dataclass
class RunStatus:
    """The state of all runs into a folder, over all parts of job arrays."""

    output_folder: str
    cases: list[CaseStatus] = field(default_factory=list)
    num_parts: int = 1  # of the last run

    def of_state(self, state: str) -> list[CaseStatus]:
        """Return the cases that are "done", "failed" or "missing"."""
        return [case for case in self.cases if case.state == state]

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of the JSON output."""
        counts = {f"num_{state}": len(self.of_state(state)) for state in STATES}
        return {**asdict(self), "num_cases": len(self.cases), **counts, "is_complete": counts["num_done"] == len(self.cases)}


def find_status(paths: Sequence[Path]) -> tuple[list[RunStatus], list[str]]:
    """Merge the records of runs.

    Args:
        paths: output folders of runs, summaries, and folders that hold some.

    Returns:
        The state of each output folder, and notes on files that cannot be used.

    Raises:
        InputError: a file is no summary, or a folder holds none.
    """
    notes: list[str] = []
    groups: dict[tuple[str, tuple[str, ...]], list[RecordedRun]] = {}
    files = {file.resolve(): file for path in paths for file in _files(path)}
    for file in files.values():
        try:
            runs = read_summary(file)
        except NotASummaryError as error:
            if file in paths:
                raise
            notes += [f"{error}; continuing without it"] if error.is_damaged else []
            continue
        for run in runs:
            _require_cases(run)
            # A later run may have found the folder under another name.
            folder = str((runs[-1] if file.parent.name == RECORD_FOLDER else run).head["output_folder"])
            groups.setdefault((folder, tuple(map(str, run.head["inputs"]))), []).append(run)
    if not groups and not notes:
        raise InputError(
            f"{paths[0]}: holds no record of `infer`\n  Name the output folder of a run, or a file that --summary wrote. A run whose "
            "output is a file keeps no record."
        )
    found: dict[str, RunStatus] = {}
    for (folder, _), group in groups.items():
        status = found.setdefault(folder, RunStatus(folder))
        status.cases += _cases(sorted(group, key=lambda run: (run.started, run.path.stat().st_mtime_ns)), status)
    return list(found.values()), notes


def _files(path: Path) -> Iterator[Path]:
    """Yield the summaries and records of a folder, or the file itself."""
    if not path.is_dir():
        if suffix_of(path):
            raise InputError(f"{path}: is no record: a run whose output is a file keeps none; name the file that --summary wrote")
        yield path
        return
    try:
        yield from sorted(file for file in path.iterdir() if file.name.lower().endswith((".json", LINES_SUFFIX)) and file.name[0] != ".")
        yield from records_in(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be listed: {error.strerror or error}") from error


def _require_cases(run: RecordedRun) -> None:
    """Raise InputError if the head of a run is not as `infer` writes it."""
    cases, inputs = run.head.get("all_cases"), run.head.get("inputs")
    texts = [run.head.get(key) for key in ("output_folder", "working_folder", "started")]
    texts += [*cases.values(), *inputs] if isinstance(cases, dict) and isinstance(inputs, list) else [None]
    if not all(isinstance(text, str) and "\0" not in text for text in texts):
        raise InputError(f"{run.path}: does not tell which cases the run has; run `infer --continue` again, which records them")


def _cases(group: Sequence[RecordedRun], status: RunStatus) -> list[CaseStatus]:
    """Return the cases of the last run of a group; the last record of a case counts."""
    last = group[-1]
    status.num_parts = last.num_parts
    records: dict[str, RecordedCase] = {}
    for run in group:
        own = list(run.head["all_cases"])[run.part_id :: run.num_parts]
        if not run.head.get("resumed"):  # This run refines all of its cases again.
            for case_id in own:
                records.pop(case_id, None)
        records.update({case.case_id: case for case in run.all_cases()})
    # The last run of each part decides on parameters, and from when on a label map without a record is its own.
    by_part = {run.part_id: run for run in group if run.num_parts == last.num_parts}
    return [
        _case_status(case_id, number % last.num_parts, path, records.get(case_id), by_part.get(number % last.num_parts, last))
        for number, (case_id, path) in enumerate(last.head["all_cases"].items())
    ]


def _case_status(case_id: str, part_id: int, path: str, record: RecordedCase | None, run: RecordedRun) -> CaseStatus:
    """Return the state of a case; files are not opened, `infer --continue` reads them to their ends."""
    label_map = _resolved(path, run)
    changed = time_of_change(label_map)
    if record is None:
        is_own = changed is not None and (bool(run.head.get("resumed")) or changed >= run.started)
        reason = None if is_own else "not reached"
    elif record.has_failed:
        return CaseStatus(case_id, part_id, FAILED, str(label_map), str(record.values.get("error") or "no reason is recorded"))
    else:
        outputs = [label_map, *(_resolved(str(record.values[name]), record.run) for name in _OUTPUTS if record.values.get(name))]
        gone = next((output for output in outputs if time_of_change(output) is None), None)
        reason = None if gone is None else f"{gone} is gone"
        if reason is None and record.other_tables(run.parameters):
            reason = "refined with other parameters than those of the last run"
    return CaseStatus(case_id, part_id, MISSING if reason else DONE, str(label_map), reason)


def _resolved(path: str, run: RecordedRun) -> Path:
    """Return a path as a run has named it: relative ones begin in its working folder."""
    return Path(str(run.head["working_folder"])) / path
