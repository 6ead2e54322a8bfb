"""Records of earlier runs for the cases of this run, for `infer --continue`.

`summary_reading.py` reads them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crfrefine.arrays.label_maps import LabelChanges
from crfrefine.base.text import MAX_OF_A_REASON, listed, shorten
from crfrefine.engines.base import MeanFieldReport
from crfrefine.errors import InputError
from crfrefine.runs.infer.records import RECORD_FOLDER, CaseRecord, records_in, time_of_change
from crfrefine.runs.infer.summary_reading import NotASummaryError, RecordedCase, as_read, read_summary, text, whole


@dataclass(frozen=True)
class EarlierRecords:
    """The records of earlier runs that this run takes up."""

    of_outputs: Mapping[str, CaseRecord] = field(default_factory=dict)  # by case, those whose label map is unchanged
    all: Sequence[CaseRecord] = ()  # those of failures, too, in the order of the cases' names
    notes: Sequence[str] = ()
    damaged: Sequence[Path] = ()  # records in the output folder that cannot be read


def read_earlier(
    summary: Path | None,
    label_maps: Mapping[str, Path],
    parameters: Mapping[str, Any],
    part: tuple[int, int],
    *,
    folder: Path | None = None,
    inputs: Sequence[str] = (),
) -> EarlierRecords:
    """Read what earlier runs left: the records in the output folder, and a summary."""
    found: list[RecordedCase] = []
    damaged: list[Path] = []
    notes: list[str] = []
    for path in () if folder is None else records_in(folder):
        try:
            found += _read(path)
        except NotASummaryError as error:
            damaged.append(path)
            notes.append(f"{error}; continuing without it")
    place = None if folder is None else folder / RECORD_FOLDER
    if summary is not None and summary.exists() and summary.stat().st_size > 0:
        of_summary = _read_summary(summary, label_maps, part)
        if others := [case_id for case_id in dict.fromkeys(one.case_id for one in of_summary) if case_id not in label_maps]:
            notes.append(f"{summary}: the records of cases that are not in this run are left out: {listed(others)}")
        found += of_summary
        place = summary
    by_case: dict[str, list[RecordedCase]] = {}
    for one in sorted(found, key=lambda one: one.run.started):
        by_case.setdefault(one.case_id, []).append(one)
    now = as_read(parameters)
    outputs, failures, without = {}, {}, {}
    from_elsewhere = []
    for case_id, label_map in label_maps.items():
        written, records = time_of_change(label_map), by_case.get(case_id, [])
        if true := [one for one in records if one.describes(written)]:
            tables = true[-1].other_tables(now)
            outputs[case_id] = replace(_record(true[-1].values), other_parameters=tables or None)
            origin = next((one.run for one in reversed(true) if one.values["status"] == "done"), None)
            if not tables and origin is not None and list(origin.head.get("inputs", inputs)) != list(inputs):
                from_elsewhere.append(case_id)
        elif records and records[-1].has_failed:
            failures[case_id] = _record(records[-1].values)
        elif written is not None:
            # A record of a label map in another format is not about this one.
            recorded = [Path(str(one.values.get("output"))).name for one in records if one.values["written"] is not None]
            without[case_id] = label_map.name in recorded
    if place is not None:
        notes += _notes_on_missing(place, without)
    if from_elsewhere:
        notes.append(
            f"{_count(from_elsewhere, 'case')} refined from inputs other than those given now: {listed(from_elsewhere)}; "
            "--continue keeps these results; omit it to refine all cases again"
        )
    if again := [case_id for case_id, record in outputs.items() if record.other_parameters]:
        keys = dict.fromkeys(key for case_id in again for key in _differing(outputs[case_id].other_parameters, now))
        notes.append(
            f"{_count(again, 'case')} refined with other parameters: {listed(again)} (other values of {listed(keys)}); "
            f"--continue refines {'it' if len(again) == 1 else 'them'} again"
        )
    taken_up = sorted([*outputs.values(), *failures.values()], key=lambda record: record.case_id)
    return EarlierRecords(outputs, taken_up, notes, damaged)


def _notes_on_missing(place: Path, without: Mapping[str, bool]) -> list[str]:
    """Return the note on label maps without a record; by case, whether its record is of an earlier state of the label map."""
    notes = []
    if changed := [case_id for case_id, was_recorded in without.items() if was_recorded]:
        notes.append(f"{place}: {_count(changed, 'label map')} changed since it was written: {listed(changed)}; their records are left out")
    if unrecorded := [case_id for case_id, was_recorded in without.items() if not was_recorded]:
        have = "label map has" if len(unrecorded) == 1 else "label maps have"
        notes.append(
            f"{place}: {len(unrecorded)} existing {have} no record in it, as after a kill: {listed(unrecorded)}; "
            "cases that are skipped without a record have null fields, and may have been refined with other parameters"
        )
    return notes


def _read_summary(path: Path, label_maps: Mapping[str, Path], part: tuple[int, int]) -> list[RecordedCase]:
    """Return the records of a summary that this run will replace; raise InputError if it must not."""
    try:
        found = _read(path)
    except NotASummaryError as error:
        raise InputError(
            f"{error}\n  --continue takes up the summary of the earlier run and replaces it; name another file, or remove this one."
        ) from None
    case_ids = dict.fromkeys(one.case_id for one in found)
    others = [case_id for case_id in case_ids if case_id not in label_maps]
    if others and ((found[-1].run.num_parts, found[-1].run.part_id) != part or len(others) == len(case_ids)):
        run = found[-1].run
        raise InputError(
            f"{path}: is the summary of other cases ({listed(others)}; part {run.part_id} of {run.num_parts})\n"
            "  --continue would replace it; name another file, one for each part."
        )
    return found


def note_on_other_part(path: Path, output: Path, part: tuple[int, int]) -> str | None:
    """Return a note for the user if a new run of a part replaces the summary of another part, as where all parts name one file."""
    if part[0] == 1 or not path.exists():
        return None
    try:
        run = read_summary(path)[-1]
    except NotASummaryError:
        return None
    if run.num_parts != part[0] or run.part_id == part[1] or run.head.get("output_folder") != os.path.realpath(output):
        return None
    return f"{path}: replaces the summary of part {run.part_id} of the same run; name another file for each part, or leave --summary out"


def _differing(one: Any, other: Any, key: str = "") -> list[str]:
    """Return the dotted keys whose values differ; of whole parameters, only those of the tables in `one`."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = {**one, **other} if key else one
        return [found for name in names for found in _differing(one.get(name), other.get(name), f"{key}.{name}" if key else name)]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other) == 1:
        return _differing(one[0], other[0], key)
    return [] if one == other else [key]


def _count(items: Sequence[str], noun: str) -> str:
    return f"{len(items)} {noun} was" if len(items) == 1 else f"{len(items)} {noun}s were"


def _read(path: Path) -> list[RecordedCase]:
    """Return the records of all runs of a summary, the last one of each case last; raise NotASummaryError for another file."""
    found = [one for run in read_summary(path) for one in run.all_cases()]
    try:
        for one in found:
            _record(one.values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise NotASummaryError(f"{path}: expected the summary of an earlier `infer`: {shorten(error, MAX_OF_A_REASON)}") from None
    return found


def _record(values: Mapping[str, Any]) -> CaseRecord:
    """Return a record from its JSON; raise ValueError, TypeError, KeyError or AttributeError if it is not one.

    The run only shows a few of its fields: the others are kept as they are, also those unknown to this version.
    """
    report = changes = None
    if values["num_iterations"] is not None:
        energy = tuple(math.nan if value is None else float(value) for value in values["energy"])
        report = MeanFieldReport(whole(values["num_iterations"]), bool(values["converged"]), energy, tuple(map(text, values["filters"])))
    if values["voxels_changed"] is not None:
        before, after = (tuple(map(whole, values[name])) for name in ("voxels_before", "voxels_after"))
        changes = LabelChanges(whole(values["voxels_changed"]), before, after)
    written = values["written"]
    return CaseRecord(
        text(values["case_id"]),
        text(values["status"]),
        {text(stage): float(seconds) for stage, seconds in values["times"].items()},
        written=None if written is None else text(written),
        report=report,
        changes=changes,
        other_parameters=values["other_parameters"],
        kept=dict(values),
    )
