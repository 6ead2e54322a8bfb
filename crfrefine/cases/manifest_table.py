"""Read the table of a manifest, CSV, as text; manifest.py knows the meaning of its cells."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crfrefine.base.text import listed, shorten_value
from crfrefine.errors import InputError
from crfrefine.io.paths import require_file

REQUIRED = ("case", "images", "logits")
OPTIONAL = ("mask", "output", "spacing")
SEPARATOR = ";"

MAX_BYTES = 1 << 28
"""Largest manifest that is read: a million cases with long paths."""


@dataclass(frozen=True)
class Row:
    """A row of a manifest."""

    place: str  # such as "line 3"
    cells: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by column; the parts of each that is not empty
    problem: str = ""  # why it cannot be used


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a manifest, CSV in UTF-8 with a line of names; its columns are checked."""
    require_file(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise InputError(f"{path}: {size / 1e6:.0f} MB are too much for a manifest; at most {MAX_BYTES / 1e6:.0f} MB are read")
    return list(_csv_rows(path))


def _csv_rows(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            names: list[str] | None = None
            for cells in reader:
                if not any(cells):
                    continue
                if names is None:
                    names = [name.strip() for name in cells]
                    _check_columns(path, names)
                elif len(cells) != len(names):
                    yield Row(f"line {reader.line_num}", problem=f"has {len(cells)} cells, expected {len(names)}, as in the line of names")
                else:
                    yield Row(f"line {reader.line_num}", _filled(zip(names, map(_parts, cells), strict=True)))
            if names is None:
                raise InputError(f"{path}: is empty; expected a line of names: {', '.join(REQUIRED)}, and {_optional()}")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start}); save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: not CSV: {error}") from None


def _check_columns(path: Path, names: Sequence[str]) -> None:
    """Raise InputError unless all columns are known, none is there twice, and the required ones are there."""
    unknown = [name for name in names if name not in (*REQUIRED, *OPTIONAL)]
    missing = [name for name in REQUIRED if name not in names]
    twice = [name for name, count in Counter(names).items() if count > 1 and name not in unknown]
    problems = [
        f"{what}: {listed([shorten_value(name) for name in found])}"
        for what, found in (("unknown columns", unknown), ("missing columns", missing), ("columns that are there twice", twice))
        if found
    ]
    if problems:
        hint = ""
        if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
            hint = "\n  Columns are separated by commas; semicolons separate several files in one cell."
        raise InputError(f"{path}: {'; '.join(problems)}\n  Expected {', '.join(REQUIRED)}, and {_optional()}.{hint}")


def _optional() -> str:
    return f"optionally {', '.join(OPTIONAL)}"


def _filled(cells: Any) -> dict[str, tuple[str, ...]]:
    return {name: parts for name, parts in cells if parts}


def _parts(cell: str) -> tuple[str, ...]:
    """Return what semicolons separate; nothing for an empty cell."""
    return tuple(part.strip() for part in cell.split(SEPARATOR)) if cell.strip() else ()
