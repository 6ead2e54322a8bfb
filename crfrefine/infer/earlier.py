"""What the summary of an earlier run says of the cases of this one, for `infer --continue --summary`.

`records.py` defines the records, and `summary_file.py` writes them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crfrefine.arrays.label_maps import LabelChanges
from crfrefine.engines.base import MeanFieldReport
from crfrefine.errors import ConfigError, InputError
from crfrefine.infer.records import CaseRecord, time_of_change
from crfrefine.infer.summary_reading import NotASummaryError, RecordedRun, read_summary, text, whole
from crfrefine.io.json import without_nonfinite
from crfrefine.io.special_files import special_kind
from crfrefine.parameters.model import CrfParameters
from crfrefine.text import MOST_OF_A_REASON, listed, shorten


@dataclass(frozen=True)
class EarlierRecords:
    """The records of earlier runs that this run takes up.

    Attributes:
        of_outputs: by case, the records whose label map is unchanged.
        of_failures: by case, the records of cases that failed.
        notes: what the user should know of them.
    """

    of_outputs: Mapping[str, CaseRecord] = field(default_factory=dict)
    of_failures: Mapping[str, CaseRecord] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def all(self) -> list[CaseRecord]:
        """Return all records in the order of the cases' names."""
        return sorted([*self.of_outputs.values(), *self.of_failures.values()], key=lambda record: record.case_id)


def read_earlier(path: Path, label_maps: Mapping[str, Path], parameters: Mapping[str, Any], part: tuple[int, int]) -> EarlierRecords:
    """Read the summary that an earlier run left, if it left one.

    Args:
        path: the file.
        label_maps: output of each case of this run.
        parameters: of this run.
        part: number of parts, and the number of this one.

    Raises:
        InputError: the file is not a summary of `infer`, or is that of another part or of other cases: this run would replace it.
    """
    if special_kind(path) is not None or not path.exists() or path.stat().st_size == 0:
        return EarlierRecords()
    run, records = _read(path)
    others = [case_id for case_id in records if case_id not in label_maps]
    if others and ((run.num_parts, run.part_id) != part or len(others) == len(records)):
        raise InputError(
            f"{path}: is the summary of other cases ({listed(others)}; part {run.part_id} of {run.num_parts})\n"
            "  --continue would replace it; name another file, one for each part."
        )
    own = [found for case_id, found in records.items() if case_id in label_maps]
    now = _as_read(parameters)
    outputs, changed = {}, []
    for record, parameters_then in own:
        found = time_of_change(label_maps[record.case_id])
        if record.status == "failed" or record.written is None or found is None:
            continue
        if found == record.written:
            then = _as_read({**parameters_then, **(record.other_parameters or {})})
            tables = {name: then.get(name) for name in {**then, **now} if then.get(name) != now.get(name)}
            outputs[record.case_id] = replace(record, other_parameters=tables or None)
        else:
            changed.append(record.case_id)
    notes = []
    if others:
        notes.append(f"{path}: the records of cases that are not in this run are left out: {listed(others)}")
    if changed:
        notes.append(f"{path}: {_count(changed, 'label map')} changed since it was written: {listed(changed)}; their records are left out")
    # A killed run saved its records up to a second before.
    unrecorded = [case_id for case_id, output in label_maps.items() if case_id not in records and time_of_change(output) is not None]
    if unrecorded:
        have = "label map has" if len(unrecorded) == 1 else "label maps have"
        notes.append(
            f"{path}: {len(unrecorded)} existing {have} no record in it, as after a kill: {listed(unrecorded)}; "
            "what is skipped without a record has null fields"
        )
    refined_otherwise = [case_id for case_id, record in outputs.items() if record.other_parameters]
    if refined_otherwise:
        keys = dict.fromkeys(key for case_id in refined_otherwise for key in _differing(outputs[case_id].other_parameters, now))
        notes.append(
            f"{_count(refined_otherwise, 'case')} refined with other parameters: {listed(refined_otherwise)} (other values of "
            f"{listed(keys)}); --continue keeps these results; omit it to refine all cases again"
        )
    return EarlierRecords(outputs, {record.case_id: record for record, _ in own if record.status == "failed"}, notes)


def note_on_other_part(path: Path, output: Path, part: tuple[int, int]) -> str | None:
    """Return what the user should know if a new run of a part replaces the summary of another part, as where all parts name one file.

    Args:
        path: the summary.
        output: where the run writes.
        part: number of parts, and the number of this one.
    """
    if part[0] == 1 or special_kind(path) is not None or not path.exists():
        return None
    try:
        run = read_summary(path)[-1]
    except NotASummaryError:
        return None
    if run.num_parts != part[0] or run.part_id == part[1] or run.head.get("output_folder") != os.path.realpath(output):
        return None
    return (
        f"{path}: replaces the summary of part {run.part_id} of the same run; name another file for each part, or `status` cannot see them"
    )


def _as_read(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters as they stand in a summary: lists for tuples, and keys that an older version did not have at their defaults."""
    with suppress(ConfigError):  # A newer version may have more keys.
        parameters = CrfParameters.from_dict(parameters).to_dict()
    table: dict[str, Any] = json.loads(json.dumps(without_nonfinite(dict(parameters))))
    return table


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


def _read(path: Path) -> tuple[RecordedRun, dict[str, tuple[CaseRecord, Mapping[str, Any]]]]:
    """Return the last run of a summary, and its record of each case with the parameters of the run that wrote it."""
    try:
        runs = read_summary(path)
    except NotASummaryError as error:
        raise _not_a_summary(str(error)) from None
    records = {}
    try:
        for run in runs:
            for values in (*run.not_reached, *run.cases):
                records[values["case_id"]] = (_record(values), run.head["parameters"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _not_a_summary(f"{path}: expected the summary of an earlier `infer`: {shorten(error, MOST_OF_A_REASON)}") from None
    return runs[-1], records


def _not_a_summary(reason: str) -> InputError:
    return InputError(
        f"{reason}\n  --continue takes up the summary of the earlier run and replaces it; name another file, or remove this one."
    )


def _record(values: Mapping[str, Any]) -> CaseRecord:
    """Return a record from its JSON; raise ValueError, TypeError, KeyError or AttributeError if it is none.

    The run only shows a few of its fields: the others are kept as they are, also those of which this version knows nothing.
    """
    report = changes = None
    if values["num_iterations"] is not None:
        energy = tuple(math.nan if value is None else float(value) for value in values["energy"])
        report = MeanFieldReport(whole(values["num_iterations"]), bool(values["converged"]), energy, tuple(map(text, values["filters"])))
    if values["voxels_changed"] is not None:
        before, after = (tuple(map(whole, values[name])) for name in ("voxels_before", "voxels_after"))
        changes = LabelChanges(whole(values["voxels_changed"]), before, after)
    written, parameters = values["written"], values["other_parameters"]
    if parameters is not None and not isinstance(parameters, dict):
        raise TypeError("other_parameters: expected a table")
    return CaseRecord(
        text(values["case_id"]),
        text(values["status"]),
        {text(stage): float(seconds) for stage, seconds in values["times"].items()},
        written=None if written is None else text(written),
        report=report,
        changes=changes,
        other_parameters=parameters,
        kept=dict(values),
    )
