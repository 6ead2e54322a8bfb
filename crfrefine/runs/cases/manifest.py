"""The cases of a manifest: a CSV table that names the files of each case, for archives whose names follow no rule."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from crfrefine.base.geometry import SPACING_RANGE
from crfrefine.base.text import counted, listed, shorten, shorten_value
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.paths import WRITTEN_SUFFIXES, require_file, suffix_of
from crfrefine.runs.cases.case_files import CaseFiles, CaseList
from crfrefine.runs.cases.discovery import discover_cases

REQUIRED = ("case", "images", "logits")
OPTIONAL = ("mask", "output", "spacing")
SEPARATOR = ";"
COLUMNS = (*REQUIRED, *OPTIONAL)

MAX_BYTES = 1 << 28  # largest manifest that is read: a million cases with long paths
_MAX_NAMED = 20
_MAX_OF_A_NAME = 200
_MAX_OF_A_PROBLEM = 1000


def read_manifest(path: Path, *, input_type: str = "auto") -> CaseList:
    """Return the cases of a manifest, sorted by name.

    Raise InputError that names the problem of each row, up to a limit.
    """
    # Relative paths begin in its folder. With "labels", several files or a folder are structures.
    require_file(path)
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InputError(
            f"{path}: {size / 1e6:.0f} MB are too much for a manifest; at most {MAX_BYTES / 1e6:.0f} MB are read"
        )
    problems: list[str] = []
    cases: dict[str, tuple[int, CaseFiles]] = {}
    for line, row in _rows(path):
        try:
            files = _read_row(row, path.parent, input_type)
            if files.case_id in cases:
                raise InputError(
                    f"case {files.case_id!r} is also on line {cases[files.case_id][0]}"
                )
            cases[files.case_id] = line, files
        except CrfRefineError as error:
            problems.append(f"line {line}: {error}")
    if problems:
        more = f"\n  and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        lines = "".join(
            "\n  " + shorten(part, _MAX_OF_A_PROBLEM)
            for text in problems[:_MAX_NAMED]
            for part in text.split("\n")
        )
        raise InputError(
            f"{path}: {counted(len(problems), 'problem')}; no case is refined{lines}{more}"
        )
    if not cases:
        raise InputError(f"{path}: has no cases, only names of columns")
    return CaseList(cases[name][1] for name in sorted(cases))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number of each line, and its cells by the names of the columns.

    Surplus cells have the name None, missing ones are None.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            if not set(REQUIRED) <= {*names} <= set(COLUMNS) or len({*names}) < len(names):
                raise InputError(
                    f"{path}: expected a line of names: {', '.join(REQUIRED)}, and optionally {', '.join(OPTIONAL)}, each once, separated "
                    f"by commas; found {listed([*map(shorten_value, names)], 10) or 'an empty file'}"
                )
            yield from ((reader.line_num, row) for row in reader if any(row.values()))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path}: cannot be read as CSV in UTF-8 after line {reader.line_num}: {error}; save it in this format"
        ) from None


def _read_row(row: Mapping[str, str], folder: Path, input_type: str) -> CaseFiles:
    """Return the files of a case.

    Raise InputError or another CrfRefineError for a row that cannot be used.
    """
    if None in row or None in row.values():
        raise InputError(f"expected {len([*filter(None, row)])} cells, as in the line of names")
    cells = {
        name: [part.strip() for part in cell.split(SEPARATOR)]
        for name, cell in row.items()
        if cell.strip()
    }
    if absent := [name for name in REQUIRED if name not in cells]:
        raise InputError(f"no {absent[0]}")
    for name, parts in cells.items():
        is_single = name in ("case", "mask", "output")
        if "" in parts or "\0" in "".join(parts) or (is_single and len(parts) > 1):
            expected = "one name" if is_single else f"names separated by {SEPARATOR!r}"
            raise InputError(
                f"{name}: expected {expected}, none of them empty or with the character NUL; found {len(parts)}"
            )
    (case_id,) = cells["case"]
    spacing = cells.get("spacing", [])
    output = None
    if (
        "/" in case_id
        or "\\" in case_id
        or case_id.startswith(".")
        or shorten(case_id, _MAX_OF_A_NAME) != case_id
    ):
        rule = f"it must be printable, without '/', '\\' and a dot in front, and have at most {_MAX_OF_A_NAME} characters"
        raise InputError(f"case: {shorten_value(case_id)} cannot name a file: {rule}")
    try:
        steps = tuple(map(float, spacing))
    except ValueError:
        steps = (0.0,)
    if steps and not (
        len(steps) in (2, 3) and all(SPACING_RANGE[0] <= step <= SPACING_RANGE[1] for step in steps)
    ):
        raise InputError(
            f"spacing: expected mm along each axis, such as 1;1;2.5; got {shorten_value(SEPARATOR.join(spacing))}"
        )
    if "output" in cells:
        output = Path(os.path.normpath(cells["output"][0]))
        leaves = not output.is_absolute() and output.parts[:1] == (os.pardir,)
        if suffix_of(output) not in WRITTEN_SUFFIXES or output.name.startswith(".") or leaves:
            rule = f"it must end in one of {', '.join(WRITTEN_SUFFIXES)}, without a dot in front, and stay in the output folder"
            raise InputError(
                f"output: {shorten(cells['output'][0])} cannot be written: {rule} unless it is absolute"
            )
    paths = {
        name: [folder / part for part in cells.get(name, ())]
        for name in ("images", "logits", "mask")
    }
    for name, path in ((name, path) for name, several in paths.items() for path in several):
        if (
            name == "logits"
            and input_type == "labels"
            and len(paths[name]) == 1
            and os.path.isdir(path)  # noqa: PTH112 - no exception for odd names
        ):
            continue  # the folder of structures
        try:
            require_file(path)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    (found,) = discover_cases(
        paths["images"], paths["logits"], *paths["mask"], input_type=input_type
    )
    if found.problem is not None:
        raise InputError(found.problem)
    return replace(found, case_id=case_id, output=output, spacing=steps or None)
