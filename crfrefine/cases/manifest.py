"""The cases of a manifest, a CSV table with the files of each, where names follow no rule."""

from __future__ import annotations

import codecs
import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from crfrefine.base.geometry import SPACING_RANGE
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import counted, listed, shorten, shorten_value
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.discovery import discover_cases
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.paths import WRITTEN_SUFFIXES, is_folder, require_file, suffix_of

REQUIRED = ("case", "images", "logits")
OPTIONAL = ("mask", "output", "spacing")
SEPARATOR = ";"  # of several names in a cell
COLUMN_SEPARATORS = ",;\t"  # as spreadsheets write them in one country or another
COLUMNS = (*REQUIRED, *OPTIONAL)
_WITH_ONE_NAME = ("case", "mask", "output")
MAX_BYTES = 1 << 28  # largest manifest that is read: a million cases with long paths
_MAX_NAMED = 20
_MAX_OF_A_NAME = 200
_MAX_OF_A_PROBLEM = 1000


def read_manifest(path: Path, *, input_type: str = "auto") -> CaseList:
    """Return the cases of a manifest, sorted by name.

    Relative paths begin in its folder. With the input type "labels", several files or a folder are
    structures. Raises InputError that names the problem of each row, up to a limit.
    """
    notes: list[Note] = []
    text = _read_text(path, notes)
    problems: list[str] = []
    cases = CaseList(notes=notes)
    lines: dict[str, int] = {}  # of the cases
    for line, row in _rows(path, text):
        try:
            case = _read_row(row, path.parent, input_type)
            if case.case_id in lines:
                raise InputError(f"case {case.case_id!r} is also on line {lines[case.case_id]}")
            cases.append(case)
            lines[case.case_id] = line
        except CrfRefineError as error:
            problems.append(f"line {line}: {error}")

    if problems:
        text = f"{path}: {counted(len(problems), 'problem')}; no case is refined"
        for problem in problems[:_MAX_NAMED]:
            for part in problem.split("\n"):
                text += f"\n  {shorten(part, _MAX_OF_A_PROBLEM)}"
        if len(problems) > _MAX_NAMED:
            text += f"\n  and {len(problems) - _MAX_NAMED} more"
        raise InputError(text)
    if not cases:
        raise InputError(f"{path}: has no cases, only names of columns")
    cases.sort(key=lambda case: case.case_id)
    return cases


def _rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number of each line, and its cells by column; missing or surplus ones are None."""
    lines = [*StringIO(text, newline="")]
    separators = COLUMN_SEPARATORS
    num_skipped = 0
    while lines and not lines[0].strip():
        lines.pop(0)
        num_skipped += 1
    if lines and lines[0].lower().startswith("sep="):  # Excel's own line
        separators = lines.pop(0)[4:5].strip("\r\n") or COLUMN_SEPARATORS
        num_skipped += 1
    # The names of columns have none of them.
    separator = max(separators, key=lines[0].count) if lines else COLUMN_SEPARATORS[0]
    reader = csv.DictReader(lines, strict=True, delimiter=separator)
    try:
        names = [name.strip().lower() for name in reader.fieldnames or ()]
        reader.fieldnames = names
        if not {*REQUIRED} <= {*names} <= {*COLUMNS} or len({*names}) < len(names):
            found = listed([shorten_value(name) for name in names], 10) or "an empty file"
            raise InputError(
                f"{path}: expected a line of names: {', '.join(REQUIRED)}, and optionally "
                f"{', '.join(OPTIONAL)}, each once, separated by commas, semicolons or tabs; "
                f"found {found}"
            )
        for row in reader:
            if any(row.values()):
                yield reader.line_num + num_skipped, row
    except csv.Error as error:
        raise InputError(
            f"{path}: cannot be read as CSV after line {reader.line_num + num_skipped}: {error}"
        ) from None


def _read_text(path: Path, notes: list[Note]) -> str:
    """Return the text of a manifest in an encoding that spreadsheets write."""
    require_file(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise InputError(
            f"{path}: {size / 1e6:.0f} MB are too much for a manifest; "
            f"at most {MAX_BYTES / 1e6:.0f} MB are read"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return content.decode("utf-16")
        if content[1:2] == b"\0":  # "c" of "case", without a byte order mark
            return content.decode("utf-16-le")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError:
            raise InputError(
                f"{path}: neither UTF-8, UTF-16 with its mark nor Windows-1252 (Latin-1): {error}; "
                "save it as CSV in UTF-8"
            ) from None
        notes.append(Note.of(NoteKind.NOT_UTF8, path.name))
        return text


def _read_row(row: Mapping[str, str], folder: Path, input_type: str) -> CaseFiles:
    """Return the case of a row, whose paths begin in the folder of the manifest."""
    cells = _split_cells(row)
    entries = _entries(cells)
    files: dict[str, list[Path]] = {}
    for column in ("images", "logits", "mask"):
        files[column] = []
        for name in cells.get(column, ()):
            path = folder / name
            # Separators may be those of Windows. os.path.lexists raises no exception for odd names.
            if not os.path.lexists(path):
                path = folder / name.replace("\\", "/")
            files[column].append(path)
            # A cell of logits may name the folder of structures.
            may_be_folder = input_type == "labels" and cells["logits"] == [name]
            if may_be_folder and is_folder(path):
                continue
            try:
                require_file(path)
            except InputError as error:
                raise InputError(f"{column}: {error}") from None

    mask = next(iter(files["mask"]), None)
    (case,) = discover_cases(files["images"], files["logits"], mask, input_type=input_type)
    if case.problem is not None:
        raise InputError(case.problem)
    return replace(case, **entries)


def _split_cells(row: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names in each cell that is not empty, by its column."""
    if None in row or None in row.values():
        num_columns = len(row) - (None in row)
        raise InputError(
            f"expected {num_columns} cells, as in the line of names; in a table with semicolons, "
            "a cell with several names is in quotes"
        )
    cells = {}
    for column, cell in row.items():
        if cell.strip():
            cells[column] = [part.strip() for part in cell.split(SEPARATOR)]
    for column in REQUIRED:
        if column not in cells:
            raise InputError(f"no {column}")
    for column, names in cells.items():
        is_single = column in _WITH_ONE_NAME
        if "" in names or "\0" in "".join(names) or (is_single and len(names) > 1):
            expected = "one name" if is_single else f"names separated by {SEPARATOR!r}"
            raise InputError(
                f"{column}: expected {expected}, none of them empty or with the character NUL; "
                f"found {len(names)}"
            )
    return cells


def _entries(cells: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return what a case has beside its files: its name, its output and its spacing, if given."""
    case_id = cells["case"][0]
    is_name = not case_id.startswith(".") and not {"/", "\\"} & {*case_id}
    if not is_name or shorten(case_id, _MAX_OF_A_NAME) != case_id:
        raise InputError(
            f"case: {shorten_value(case_id)} cannot name a file: it must be printable, without "
            f"'/', '\\' and a dot in front, and have at most {_MAX_OF_A_NAME} characters"
        )
    entries: dict[str, Any] = {"case_id": case_id}
    if "spacing" in cells:
        low, high = SPACING_RANGE
        try:
            spacing = tuple(float(part.replace(",", ".")) for part in cells["spacing"])
        except ValueError:
            spacing = ()
        if len(spacing) not in (2, 3) or not all(low <= step <= high for step in spacing):
            raise InputError(
                "spacing: expected mm along each axis, such as 1;1;2.5; "
                f"got {shorten_value(SEPARATOR.join(cells['spacing']))}"
            )
        entries["spacing"] = spacing
    if "output" in cells:
        (name,) = cells["output"]
        output = Path(os.path.normpath(name.replace("\\", "/")))
        leaves_folder = not output.is_absolute() and output.parts[:1] == (os.pardir,)
        has_format = suffix_of(output) in WRITTEN_SUFFIXES and not output.name.startswith(".")
        if leaves_folder or not has_format:
            raise InputError(
                f"output: {shorten(name)} cannot be written: it must end in one of "
                f"{', '.join(WRITTEN_SUFFIXES)}, without a dot in front, and stay in the output "
                "folder unless it is absolute"
            )
        entries["output"] = output
    return entries
