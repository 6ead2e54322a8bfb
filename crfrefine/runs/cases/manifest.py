"""The cases of a manifest: a CSV table that names the files of each case, for archives whose names follow no rule."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from crfrefine.base.geometry import is_plausible
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
    """Return the cases of a manifest, sorted by name; raise InputError that names all its problems, up to a limit."""
    # Relative paths begin in its folder. With "labels", several files or a folder are structures.
    require_file(path)
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InputError(f"{path}: {size / 1e6:.0f} MB are too much for a manifest; at most {MAX_BYTES / 1e6:.0f} MB are read")
    problems: list[str] = []
    cases: dict[str, tuple[int, CaseFiles]] = {}
    for line, cells, wrong in _rows(path):
        files = None
        if not (wrong := wrong or _cell_problems(cells)):
            files, wrong = _files_of(cells, path.parent, input_type)
        if files is not None and cases.setdefault(files.case_id, (line, files))[0] != line:
            wrong = [f"case {files.case_id!r} is also on line {cases[files.case_id][0]}"]
        problems += [f"line {line}: {text}" for text in wrong]
    if problems:
        more = f"\n  and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        lines = "".join("\n  " + shorten(part, _MAX_OF_A_PROBLEM) for text in problems[:_MAX_NAMED] for part in text.split("\n"))
        raise InputError(f"{path}: {counted(len(problems), 'problem')}; no case is refined{lines}{more}")
    if not cases:
        raise InputError(f"{path}: has no cases, only names of columns")
    return CaseList(cases[name][1] for name in sorted(cases))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, tuple[str, ...]], list[str]]]:
    """Yield the line of each row, the parts of its cells that are not empty, by column, and why it cannot be used."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            rows = (row for row in reader if any(row))
            names = [name.strip() for name in next(rows, [])]
            unknown, missing = [name for name in names if name not in COLUMNS], [name for name in REQUIRED if name not in names]
            if unknown or missing or len({*names}) < len(names):
                raise InputError(
                    f"{path}: expected a line of names: {', '.join(REQUIRED)}, and optionally {', '.join(OPTIONAL)}, each once, separated "
                    f"by commas; found {listed([*map(shorten_value, names)], 10) or 'an empty file'}"
                )
            for row in rows:
                parts = (tuple(part.strip() for part in cell.split(SEPARATOR)) for cell in row)
                cells = {name: several for name, several in zip(names, parts, strict=False) if several != ("",)}
                wrong = [] if len(row) == len(names) else [f"has {len(row)} cells, expected {len(names)}, as in the line of names"]
                yield reader.line_num, cells, wrong
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: line {reader.line_num}: cannot be read as CSV in UTF-8: {error}") from None


def _cell_problems(cells: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the faults in the texts of a row."""
    problems = [f"no {name}" for name in REQUIRED if name not in cells]
    for name, parts in cells.items():
        is_single = name in ("case", "mask", "output")
        if "" in parts or "\0" in "".join(parts) or (is_single and len(parts) > 1):
            expected = "one name" if is_single else f"names separated by {SEPARATOR!r}"
            problems.append(f"{name}: expected {expected}, none of them empty or with the character NUL; found {len(parts)}")
    if problems:
        return problems
    (name,) = cells["case"]
    if "/" in name or "\\" in name or name.startswith(".") or shorten(name, _MAX_OF_A_NAME) != name:
        rule = f"it must be printable, without '/', '\\' and a dot in front, and have at most {_MAX_OF_A_NAME} characters"
        problems.append(f"case: {shorten_value(name)} cannot name a file: {rule}")
    spacing = cells.get("spacing", ())
    try:
        usable = len(spacing) in (0, 2, 3) and is_plausible(map(float, spacing))
    except ValueError:
        usable = False
    if not usable:
        problems.append(f"spacing: expected mm along each axis, such as 1;1;2.5; got {shorten_value(SEPARATOR.join(spacing))}")
    for text in cells.get("output", ()):
        path = Path(text)
        leaves = not path.is_absolute() and Path(os.path.normpath(text)).parts[:1] == (os.pardir,)
        if suffix_of(path) not in WRITTEN_SUFFIXES or path.name.startswith(".") or leaves:
            rule = f"it must end in one of {', '.join(WRITTEN_SUFFIXES)}, without a dot in front, and stay in the output folder"
            problems.append(f"output: {shorten(text)} cannot be written: {rule} unless it is absolute")
    return problems


def _files_of(cells: Mapping[str, Sequence[str]], folder: Path, input_type: str) -> tuple[CaseFiles | None, list[str]]:
    """Return the files of a case, or their faults."""
    paths = {name: [folder / part for part in cells.get(name, ())] for name in ("images", "logits", "mask")}
    problems = []
    for name, path in ((name, path) for name, several in paths.items() for path in several):
        if name == "logits" and input_type == "labels" and len(paths[name]) == 1 and os.path.isdir(path):  # noqa: PTH112 - no exception for odd names
            continue  # the folder of structures
        try:
            require_file(path)
        except InputError as error:
            problems.append(f"{name}: {error}")
    if problems:
        return None, problems
    try:
        (found,) = discover_cases(paths["images"], paths["logits"], *paths["mask"], input_type=input_type)
    except CrfRefineError as error:
        return None, [str(error)]
    if found.problem is not None:
        return None, [found.problem]
    output = next((Path(os.path.normpath(text)) for text in cells.get("output", ())), None)
    return replace(found, case_id=cells["case"][0], output=output, spacing=tuple(map(float, cells.get("spacing", ()))) or None), []
