"""What somebody notes of each case: a state and a text, in a table beside the corrections."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from crfrefine.base.text import for_spreadsheet
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.writing import write_small_file

TO_DO = "to do"
STATES = (TO_DO, "done", "to discuss")
_HEADINGS = ("case", "state", "note")
_MAX_NOTE = 500  # characters


class Review(NamedTuple):
    """What is noted of a case."""

    state: str = TO_DO
    note: str = ""


class Reviews:
    """The notes of all cases, in `reviews.csv` of a folder; without one only in memory."""

    def __init__(self, case_ids: Sequence[str]) -> None:
        self._case_ids = case_ids
        self._noted: dict[str, Review] = {}
        self._path: Path | None = None
        self.problem = ""  # why the table cannot be written

    def keep_in(self, folder: Path) -> None:
        """Read what was noted in a folder, and write there from now on.

        What was noted before, in memory, is written at once.
        """
        noted_before = dict(self._noted)
        self._path = folder / "reviews.csv"
        try:
            if self._path.exists():
                table = self._path.read_text(encoding="utf-8-sig")
                for row in csv.DictReader(io.StringIO(table)):
                    state = row["state"] if row["state"] in STATES else TO_DO
                    self._noted[row["case"]] = Review(state, row["note"] or "")
        except (OSError, ValueError, KeyError, csv.Error) as error:
            raise InputError(
                f"{self._path}: expected a table with the columns {', '.join(_HEADINGS)}; "
                "move it away to begin anew"
            ) from error
        if noted_before:
            self._noted.update(noted_before)
            self._write()

    def of_case(self, case_id: str) -> Review:
        """Return what is noted of a case."""
        return self._noted.get(for_spreadsheet(case_id), Review())

    def note(self, case_id: str, state: str, note: str) -> None:
        """Note a state and a text, and write the table; raise InputError for others."""
        if state not in STATES:
            raise InputError(f"{state}: expected {', '.join(STATES)}")
        kept = for_spreadsheet(note)  # It may be longer, and comes back with the next state.
        if len(kept) > _MAX_NOTE:
            raise InputError(f"expected at most {_MAX_NOTE} characters")
        self._noted[for_spreadsheet(case_id)] = Review(state, kept)
        self._write()

    def _write(self) -> None:
        """Write the table, with the rows of cases that only an earlier run had.

        On a full disk, notes stay in memory until it can be written.
        """
        if self._path is None:
            return
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(_HEADINGS)
        for name in dict.fromkeys([*map(for_spreadsheet, self._case_ids), *self._noted]):
            writer.writerow((name, *self._noted.get(name, Review())))
        self.problem = ""
        try:
            write_small_file(self._path, table.getvalue().encode("utf-8", "replace"))
        except CrfRefineError as error:
            self.problem = str(error)
