"""The cases that the parameters of a method were learned on, by the record that `infer` leaves beside its label maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crfrefine.base.text import printable
from crfrefine.evaluate.pairing import CasePair
from crfrefine.io.paths import stem_of
from crfrefine.parameters.model import TRAINED_ON
from crfrefine.runs.infer.records import records_in
from crfrefine.runs.infer.summary_reading import NotASummaryError, RecordedCase, read_summary


def cases_learned_on(pairs: Sequence[CasePair], notes: list[str]) -> dict[str, tuple[str, ...]]:
    """Return the cases of each method that its parameters were learned on, by their names.

    A method without a record, or without cases of this kind, is left out. A record that cannot be read is noted.
    """
    records: dict[Path, dict[str, RecordedCase]] = {}
    learned: dict[str, list[str]] = {}
    for pair in pairs:
        for method, files in pair.methods.items():
            if files.label_map is None:
                continue
            path = files.label_map.resolve()
            if path.parent not in records:
                records[path.parent] = _read_records(path.parent, notes)
            record = records[path.parent].get(path.name if path.is_dir() else stem_of(path))
            if record is not None and printable(record.case_id) in (record.parameters.get(TRAINED_ON) or ()):
                learned.setdefault(method, []).append(pair.case_id)
    return {method: tuple(cases) for method, cases in learned.items()}


def _read_records(folder: Path, notes: list[str]) -> dict[str, RecordedCase]:
    """Return the newest record of each label map in a folder, by the name of the file without its suffix."""
    runs = []
    for path in records_in(folder):
        try:
            runs += read_summary(path)
        except NotASummaryError as error:
            notes.append(f"{error}; which cases its parameters were learned on is not known")
    cases = [case for run in sorted(runs, key=lambda run: run.started) for case in run.all_cases()]
    return {stem_of(Path(case.values["output"])): case for case in cases if isinstance(case.values.get("output"), str)}
