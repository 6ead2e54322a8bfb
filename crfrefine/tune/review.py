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
from crfrefine.tune.drawing import stamp_of_file

TO_DO = "to do"
STATES = (TO_DO, "done", "to discuss")
_HEADINGS = ("case", "state", "note")
_MAX_NOTE = 500  # characters


class Review(NamedTuple):
    """The notes on a case."""

    state: str = TO_DO
    note: str = ""


class Reviews:
    """The notes of all cases, in `reviews.csv` of a folder; without one only in memory.

    Another program may change the table meanwhile: its rows are taken, with its own columns.
    """

    def __init__(self, case_ids: Sequence[str]) -> None:
        self._case_ids = [for_spreadsheet(case_id) for case_id in case_ids]
        self._headings: Sequence[str] = _HEADINGS
        self._rows: dict[str, dict[str, str]] = {}  # of the table, by their cases
        self._unwritten: dict[str, dict[str, str]] = {}  # notes that the table lacks so far
        self._path: Path | None = None
        self._stamp: object = None  # of the table when it was read or written
        self.problem = ""  # why the table cannot be read or written

    def keep_in(self, folder: Path) -> None:
        """Read the notes in a folder, and write there from now on.

        Earlier notes in memory are written at once.
        """
        self._path = folder / "reviews.csv"
        self.problem = ""
        self.read_again()
        if self._unwritten:
            self._write()

    def read_again(self) -> None:
        """Read the table if another program has written it; a damaged one is reported."""
        if self._path is None or stamp_of_file(self._path) in (None, self._stamp):
            return
        stamp = stamp_of_file(self._path)
        rows = {}
        try:
            table = csv.DictReader(io.StringIO(self._path.read_text(encoding="utf-8-sig")))
            for row in table:
                present = {heading: value or "" for heading, value in row.items() if heading}
                rows[row["case"]] = present | {name: present[name] for name in _HEADINGS}
        except (OSError, ValueError, KeyError, csv.Error):
            self.problem = (
                f"{self._path}: expected a table with the columns {', '.join(_HEADINGS)}; "
                "move it away to begin anew"
            )
            return
        self._headings = list(dict.fromkeys([*(table.fieldnames or ()), *_HEADINGS]))
        self._rows = rows
        for case_id, noted in self._unwritten.items():
            self._rows[case_id] = self._rows.get(case_id, {}) | noted
        self._stamp = stamp
        self.problem = ""

    def of_case(self, case_id: str) -> Review:
        """Return the notes on a case."""
        row = self._rows.get(for_spreadsheet(case_id), {})
        return Review(row.get("state") or TO_DO, row.get("note", ""))

    def note(self, case_id: str, state: str | None, note: str | None) -> None:
        """Note a state and a text, and write the table; raise InputError for others.

        None leaves the present one.
        """
        self.read_again()
        noted = {"case": for_spreadsheet(case_id)}
        if state is not None:
            if state not in STATES:
                raise InputError(f"{state}: expected {', '.join(STATES)}")
            noted["state"] = state
        if note is not None:
            noted["note"] = for_spreadsheet(note)  # It may be longer, and comes back.
            if len(noted["note"]) > _MAX_NOTE:
                raise InputError(f"expected at most {_MAX_NOTE} characters")
        name = noted["case"]
        self._unwritten[name] = self._unwritten.get(name, {}) | noted
        self._rows[name] = self._rows.get(name, {"state": TO_DO, "note": ""}) | noted
        self._write()

    def _write(self) -> None:
        """Write the table, with the rows of cases that only an earlier run had.

        On a full disk, notes stay in memory until it can be written.
        """
        if self._path is None or stamp_of_file(self._path) not in (None, self._stamp):
            return
        table = io.StringIO()
        writer = csv.DictWriter(table, self._headings)
        writer.writeheader()
        for name in dict.fromkeys([*self._case_ids, *self._rows]):
            untouched = {"case": name, "state": TO_DO}
            writer.writerow(self._rows.get(name, untouched))
        self.problem = ""
        try:
            write_small_file(self._path, table.getvalue().encode("utf-8", "replace"))
            self._stamp = stamp_of_file(self._path)
            self._unwritten = {}
        except CrfRefineError as error:
            self.problem = str(error)
