"""The cases of a manifest: a table that names the files of each case, for archives whose names follow no rule.

`manifest_table.py` reads the table. Everything that names can tell is checked here, for all cases, before the first one is read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from crfrefine.base.geometry import is_plausible
from crfrefine.base.text import counted, shorten, shorten_value
from crfrefine.cases.case_files import CaseFiles, CaseList
from crfrefine.cases.label_files import discover_network_cases
from crfrefine.cases.manifest_table import SEPARATOR, Row, read_rows
from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io.paths import WRITTEN_SUFFIXES, is_there, require_file, stem_of, suffix_of
from crfrefine.io.recognition import suffix_to_write

_MAX_NAMED = 20
_MAX_OF_A_PATH = 4096  # Characters; the limit of Linux.
_MAX_NAME = 255  # Bytes; the limit of usual file systems.
_MAX_OF_A_NAME = 200
_MAX_OF_A_PROBLEM = 1000
_MAX_AXES = 3
_COMPANIONS = ("_probabilities", "_logits", "_preview")
"""Endings of the files that `infer` writes beside a label map."""


def read_manifest(path: Path, output: Path, *, input_type: str = "auto") -> CaseList:
    """Return the cases of a manifest, sorted by name; raise InputError that names all its problems, up to a limit.

    Relative paths begin in its folder, relative outputs in `output`. With the input type "labels", several files, and the files of a
    folder, are structures.
    """
    if suffix_of(output) and not output.is_dir():
        raise InputError(f"{output}: with a manifest, the output must be a folder, not a file name")
    rows = read_rows(path)
    if not rows:
        raise InputError(f"{path}: has no cases, only names of columns")
    problems: list[str] = []
    cases: list[tuple[Row, CaseFiles]] = []
    for row in rows:
        wrong = [row.problem] if row.problem else _cell_problems(row)
        files = None
        if not wrong:
            files, wrong = _files_of(row, path.parent, input_type)
        problems += [f"{row.place}: {text}" for text in wrong]
        if files is not None:
            cases.append((row, files))
    problems += _clashes(cases, output)
    if problems:
        more = f"\n  and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        lines = "".join("\n  " + shorten(line, _MAX_OF_A_PROBLEM) for text in problems[:_MAX_NAMED] for line in text.split("\n"))
        raise InputError(f"{path}: {counted(len(problems), 'problem')}; no case is refined{lines}{more}")
    return CaseList(sorted((files for _, files in cases), key=lambda files: files.case_id))


def _cell_problems(row: Row) -> list[str]:
    """Return the fault in the texts of a row."""
    problems = [f"no {name}" for name in ("case", "images", "logits") if name not in row.cells]
    problems += [f"{name}: an empty name beside {SEPARATOR!r}" for name, parts in row.cells.items() if "" in parts]
    problems += [
        f"{name}: expected one, found {len(row.cells[name])} separated by {SEPARATOR!r}"
        for name in ("case", "mask", "output")
        if len(row.cells.get(name, ())) > 1
    ]
    problems += [f"{name}: a path cannot hold the character NUL" for name, parts in row.cells.items() if "\0" in "".join(parts)]
    problems += [
        f"{name}: {shorten(text)} is too long: a path has at most {_MAX_OF_A_PATH} characters, and each of its names {_MAX_NAME} bytes"
        for name in ("images", "logits", "mask", "output")
        for text in row.cells.get(name, ())
        if len(text) > _MAX_OF_A_PATH or any(len(part.encode(errors="replace")) > _MAX_NAME for part in Path(text).parts)
    ]
    if problems:
        return problems
    (name,) = row.cells["case"]
    if "/" in name or "\\" in name or name.startswith(".") or shorten(name, _MAX_OF_A_NAME) != name:
        problems.append(
            f"case: {shorten_value(name)} cannot name a file: it must be printable, without '/', '\\' and a dot in front, and have at most "
            f"{_MAX_OF_A_NAME} characters"
        )
    problems += _spacing_problems(row.cells.get("spacing", ()))
    for text in row.cells.get("output", ()):
        if suffix_of(Path(text)) not in WRITTEN_SUFFIXES:
            problems.append(f"output: {shorten(text)} does not end in one of {', '.join(WRITTEN_SUFFIXES)}")
        elif Path(text).name.startswith("."):
            problems.append(f"output: {shorten(text)} has a dot in front: it would be hidden")
        if not Path(text).is_absolute() and Path(os.path.normpath(text)).parts[:1] == (os.pardir,):
            problems.append(f"output: {shorten(text)} leaves the output folder; give a file outside of it as an absolute path")
    return problems


def _spacing_problems(parts: Sequence[str]) -> list[str]:
    try:
        usable = is_plausible([float(part) for part in parts])
    except ValueError:
        usable = False
    if usable and len(parts) <= _MAX_AXES and len(parts) != 1:
        return []
    return [f"spacing: expected mm along each axis, such as 1{SEPARATOR}1{SEPARATOR}2.5; got {shorten_value(SEPARATOR.join(parts))}"]


def _files_of(row: Row, folder: Path, input_type: str) -> tuple[CaseFiles | None, list[str]]:
    """Return the files of a case, or their fault."""
    images, logits, masks = ([folder / part for part in row.cells.get(name, ())] for name in ("images", "logits", "mask"))
    problems = []
    for name, paths in (("images", images), ("logits", logits), ("mask", masks)):
        for path in paths:
            if name == "logits" and input_type == "labels" and len(paths) == 1 and is_there(path) and path.is_dir():
                continue
            try:
                require_file(path)
            except InputError as error:
                problems.append(f"{name}: {error}")
    if problems:
        return None, problems
    try:
        (found,) = discover_network_cases(images, logits, masks[0] if masks else None, input_type=input_type)
        if found.problem is not None:
            return None, [found.problem]
    except CrfRefineError as error:
        return None, [str(error)]
    outputs = row.cells.get("output", ())
    return replace(
        found,
        case_id=row.cells["case"][0],
        output=Path(os.path.normpath(outputs[0])) if outputs else None,
        spacing=tuple(map(float, row.cells["spacing"])) if "spacing" in row.cells else None,
    ), []


def _clashes(cases: Sequence[tuple[Row, CaseFiles]], output: Path) -> list[str]:
    """Return which cases have one name, would write one file, or would replace an input of any case."""
    problems = []
    names: dict[str, Row] = {}
    stems: dict[str, Row] = {}
    structures: dict[str, Row] = {}  # by the folder that `--save-structures` writes them to
    inputs = {
        os.path.realpath(path): row for row, files in cases for path in (*files.images, *files.logits, files.mask) if path is not None
    }
    for row, files in cases:
        if files.case_id in names:
            problems.append(f"{row.place}: case {files.case_id!r} is also on {names[files.case_id].place}")
            continue
        names[files.case_id] = row
        label_map = output / (files.output or f"{files.case_id}{suffix_to_write(files.images[0])}")
        folder = os.path.realpath(label_map.parent)
        stem = os.path.join(folder, stem_of(label_map) if files.output else files.case_id)  # noqa: PTH118
        # Files beside the label map have its name without the suffix, so two label maps that differ only there would share them.
        if stem in stems:
            problems.append(f"{row.place}: the output {label_map} has the name of the output of {stems[stem].place}")
        stems.setdefault(stem, row)
        if files.are_structures:
            structures[stem] = row
        target = os.path.realpath(label_map)
        if target in inputs:
            problems.append(f"{row.place}: the output {label_map} would replace an input of {inputs[target].place}")
    for stem, row in stems.items():
        owner = structures.get(os.path.dirname(stem))  # noqa: PTH120
        if owner is not None:
            problems.append(f"{row.place}: the output {stem} is in the folder of the structures of {owner.place}")
        for ending in _COMPANIONS:
            if stem.endswith(ending) and stem.removesuffix(ending) in stems:
                other = stems[stem.removesuffix(ending)]
                problems.append(f"{row.place}: the output {stem} has the name of a file beside the output of {other.place}")
    return problems
