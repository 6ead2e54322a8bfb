"""The tables of `--statistics` of the parts of a job array, as one table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from crfrefine.base.text import csv_text, for_spreadsheet, listed
from crfrefine.errors import InputError
from crfrefine.io.paths import require_file
from crfrefine.io.writing import write_small_file
from crfrefine.records.records import path_of_part
from crfrefine.records.states import CaseState

STATISTICS_NAME = "statistics.csv"


def merge_statistics(folder: Path, states: Sequence[CaseState]) -> Path:
    """Write the rows of all parts of the last run into a folder to one table; return its path.

    It is the table that the run has without parts. The tables of the parts stay. Raise InputError
    if there are no parts, one has no table yet, or columns differ.
    """
    numbers = {state.num_parts for state in states}
    if len(numbers) > 1:
        raise InputError(
            f"{folder}: runs into it have {listed(sorted(numbers))} parts; --merge takes one run"
        )
    num_parts = numbers.pop() if numbers else 1
    if num_parts == 1:
        raise InputError(f"{folder}: its run has no parts, whose statistics --merge would join")
    target = folder / STATISTICS_NAME
    part_ids = sorted({state.part_id for state in states})  # of parts that have a case
    paths = [path_of_part(target, num_parts, part_id) for part_id in part_ids]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise InputError(
            f"{folder}: --merge needs the table of each part, and lacks {listed(missing)}: run "
            "these parts with --statistics --continue"
        )
    columns: list[str] = []
    rows_of: dict[str, list[list[str]]] = {}
    for path in paths:
        require_file(path)
        try:
            lines = list(csv.reader(io.StringIO(path.read_bytes().decode())))
        except (ValueError, csv.Error) as error:
            raise InputError(f"{path}: not a table of --statistics: {error}") from None
        if not lines or any(len(line) != len(lines[0]) for line in lines):
            raise InputError(f"{path}: not a table of --statistics: lines have unlike columns")
        head, *rows = lines
        if not rows:
            columns = columns or head
            continue
        if rows_of and head != columns:
            raise InputError(
                f"{path}: has the columns {listed(head)}; expected those of the other parts, "
                f"{listed(columns)}; run all parts with the same names of modalities"
            )
        columns = head
        for row in rows:
            rows_of.setdefault(row[0], []).append(row)

    merged = [columns]
    for state in states:
        merged += rows_of.pop(for_spreadsheet(state.case_id), [])
    for rows in rows_of.values():  # Cases of an earlier run, which this one does not have.
        merged += rows
    write_small_file(target, csv_text(merged).encode())
    return target
