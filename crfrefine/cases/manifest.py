"""The cases of a manifest, a CSV table with the files of each, where names follow no rule."""

from __future__ import annotations

import codecs
import csv
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from crfrefine.base.failures import expected_error
from crfrefine.base.geometry import SPACING_RANGE
from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import counted, listed, shorten, shorten_value
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.discovery import Sources, discover_cases
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.formats import WRITTEN_SUFFIXES
from crfrefine.io.paths import is_folder, require_file, suffix_of

REQUIRED = ("case", "images", "logits")
OPTIONAL = ("mask", "output", "spacing")
SEPARATOR = ";"  # of several names in a cell
COLUMN_SEPARATORS = ",;\t"  # as spreadsheets write them in one country or another
_WITH_ONE_NAME = ("case", "mask", "output")
MAX_BYTES = 1 << 28  # largest manifest that is read: a million cases with long paths
_MAX_NAMED = 20
_MAX_OF_A_PROBLEM = 1000
_NAME_OF_A_CASE = re.compile(r"[^./\\][^/\\]{,199}")
_NAMES = f"names separated by {SEPARATOR!r}, none of them empty"
# The content of a cell of each column, for messages.
_EXPECTED = {
    "case": (
        "one name, which can be that of a file: printable, without '/', '\\' and a dot in front, "
        "and of at most 200 characters"
    ),
    "images": _NAMES,
    "logits": _NAMES,
    "mask": "one name",
    "output": (
        f"one file that can be written: its name ends in one of {', '.join(WRITTEN_SUFFIXES)}, "
        "without a dot in front, and it is in the output folder unless it is absolute"
    ),
    "spacing": "mm along each axis, such as 1;1;2.5",
}
# Blank lines before the names of the columns, and Excel's own line with the separator.
_BEFORE_NAMES = re.compile(r"(?:\s*\n)?(?:sep=(.?).*\n(?:\s*\n)?)?", re.IGNORECASE)


def read_manifest(path: Path, *, input_type: str = "auto") -> CaseList:
    """Return the cases of a manifest, sorted by name.

    Relative paths begin in its folder. With the input type "labels", several files or a folder are
    structures. Raises InputError that names the problem of each row, up to a limit.
    """
    cases = CaseList()
    rows = _rows(path, cases.notes)
    _, names = next(rows, (0, []))
    columns = [name.strip().lower() for name in names]
    if not {*REQUIRED} <= {*columns} <= {*_EXPECTED} or len({*columns}) < len(columns):
        found = listed([shorten_value(name) for name in columns], 10) or "an empty file"
        raise InputError(
            f"{path}: expected a line of names: {', '.join(REQUIRED)}, and optionally "
            f"{', '.join(OPTIONAL)}, each once, separated by commas, semicolons or tabs; "
            f"found {found}"
        )
    problems = []
    lines: dict[str, int] = {}  # of the cases
    for line, row in rows:
        try:
            if len(row) != len(columns):
                raise InputError(
                    f"expected {len(columns)} cells, as in the line of names; in a table with "
                    "semicolons, a cell with several names is in quotes"
                )
            case = _read_row(dict(zip(columns, row, strict=True)), path.parent, input_type)
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


def _rows(path: Path, notes: list[Note]) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each line that is not blank, that of the names first.

    The encoding and the separator are those that spreadsheets write.
    """
    require_file(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise InputError(
            f"{path}: {size / 1e6:.0f} MB are too much for a manifest; "
            f"at most {MAX_BYTES / 1e6:.0f} MB are read"
        )
    try:
        content = path.read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        is_utf16 |= content[1:2] == b"\0"  # "c" of "case", without a byte order mark
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except OSError as error:
        raise expected_error(error, path) from error
    except UnicodeDecodeError as error:
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError:
            raise InputError(
                f"{path}: neither UTF-8, UTF-16 with its mark nor Windows-1252 (Latin-1): {error}; "
                "save it as CSV in UTF-8"
            ) from None
        notes.append(NoteKind.NOT_UTF8(path.name))

    text = StringIO(text, newline=None).read()  # Lines end in \n.
    before = _BEFORE_NAMES.match(text)
    assert before is not None
    num_skipped = before[0].count("\n")
    line = num_skipped
    table = text[before.end() :]
    separator = max(before[1] or COLUMN_SEPARATORS, key=table.partition("\n")[0].count)
    reader = csv.reader(StringIO(table), strict=True, delimiter=separator)
    try:
        for row in reader:
            line = reader.line_num + num_skipped
            if any(map(str.strip, row)):
                yield line, row
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read as CSV after line {line}: {error}") from None


def _read_row(cells: Mapping[str, str], folder: Path, input_type: str) -> CaseFiles:
    """Return the case of a row, whose paths begin in the folder of the manifest."""
    values = {}
    for column, cell in cells.items():
        if not cell.strip():
            if column in REQUIRED:
                raise InputError(f"no {column}")
            continue
        names = [part.strip() for part in cell.split(SEPARATOR)]
        # A cell of logits may name the folder of structures.
        may_be_folder = column == "logits" and input_type == "labels" and len(names) == 1
        try:
            values[column] = _value_of(column, names, folder, may_be_folder=may_be_folder)
        except ValueError:
            raise InputError(
                f"{column}: expected {_EXPECTED[column]}; got {shorten_value(cell.strip())}"
            ) from None
        except InputError as error:
            raise InputError(f"{column}: {error}") from None
    mask = next(iter(values.get("mask", ())), None)
    sources = Sources(values["images"], values["logits"], mask, input_type=input_type)
    (case,) = discover_cases(sources)
    if case.problem:
        raise InputError(case.named_problem)
    return replace(
        case, case_id=values["case"], output=values.get("output"), spacing=values.get("spacing")
    )


def _value_of(column: str, names: list[str], folder: Path, *, may_be_folder: bool) -> Any:
    """Return the meaning of the names in a cell: a name, a spacing, a path, or paths of files.

    Raises ValueError unless they are as expected in this column, or InputError for a missing file.
    """
    if column == "spacing":
        spacing = tuple(float(part.replace(",", ".")) for part in names)
        low, high = SPACING_RANGE
        if len(spacing) not in (2, 3) or not all(low <= step <= high for step in spacing):
            raise ValueError
        return spacing
    first = names[0]
    if "" in names or (column in _WITH_ONE_NAME and len(names) > 1):
        raise ValueError
    if column == "case":
        if not _NAME_OF_A_CASE.fullmatch(first) or not first.isprintable():
            raise ValueError
        return first
    if column == "output":
        output = Path(os.path.normpath(first.replace("\\", "/")))
        has_format = suffix_of(output) in WRITTEN_SUFFIXES and not output.name.startswith(".")
        if not has_format or os.pardir in output.parts or "\0" in first:
            raise ValueError
        return output
    paths = []
    for name in names:
        path = folder / name
        # Separators may be those of Windows. os.path.lexists raises no exception for odd names.
        if not os.path.lexists(path):
            path = folder / name.replace("\\", "/")
        if not may_be_folder or not is_folder(path):
            require_file(path)
        paths.append(path)
    return paths
