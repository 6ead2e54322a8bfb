"""The cases that the parameters of a method were learned on, by the record that `infer` leaves beside its label maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crfrefine.base.text import printable
from crfrefine.evaluate.pairing import CasePair
from crfrefine.io.paths import stem_of
from crfrefine.parameters.model import TRAINED_ON
from crfrefine.runs.store import Entry, read_records


def cases_learned_on(pairs: Sequence[CasePair], notes: list[str]) -> dict[str, tuple[str, ...]]:
    """Return the cases of each method that its parameters were learned on, by their names.

    A method without a record, or without cases of this kind, is left out. A record that cannot be read is noted.
    """
    records: dict[Path, dict[str, Entry]] = {}
    learned: dict[str, list[str]] = {}
    for pair in pairs:
        for method, files in pair.methods.items():
            if files.label_map is None:
                continue
            path = files.label_map.resolve()
            if path.parent not in records:
                records[path.parent] = _read_records(path.parent, notes)
            entry = records[path.parent].get(path.name if path.is_dir() else stem_of(path))
            if entry is not None and printable(entry.record.case_id) in (entry.run.settings.get(TRAINED_ON) or ()):
                learned.setdefault(method, []).append(pair.case_id)
    return {method: tuple(cases) for method, cases in learned.items()}


def _read_records(folder: Path, notes: list[str]) -> dict[str, Entry]:
    """Return the newest record of each label map in a folder, by the name of the file without its suffix."""
    recorded = read_records(folder)
    notes += [f"{note}; its parameters may have been learned on more cases than are known" for note in recorded.notes]
    return {stem_of(entry.record.output): entry for entry in recorded.entries if entry.record.output is not None}
