"""Read the records of runs again, for the next run and for `status`: JSON lines in the output folder, or the file of `infer --summary`.

`records.py` defines the records, and `summary_writing.py` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from crfrefine.base.text import MAX_OF_A_REASON, shorten, shorten_value
from crfrefine.errors import ConfigError, InputError
from crfrefine.io.json import read_json, require_usable, without_nonfinite
from crfrefine.io.lines import parse_line, unfinished_line
from crfrefine.io.paths import require_file
from crfrefine.parameters.model import CrfParameters
from crfrefine.runs.execution.records import FAILED
from crfrefine.runs.infer.records import SCHEMA, is_lines

MAX_BYTES = 1 << 30
"""Largest summary that is read: one of a hundred thousand cases with many labels has several hundred megabytes."""


class NotASummaryError(InputError):
    """A file that is not a summary of `infer`; `is_damaged` says whether it cannot be read at all."""

    def __init__(self, message: str, *, is_damaged: bool = True) -> None:
        super().__init__(message)
        self.is_damaged = is_damaged


class _OtherContentError(ValueError):
    """A file of another kind."""


@dataclass
class RecordedRun:
    """A run, as its summary has it."""

    path: Path
    head: Mapping[str, Any]
    num_parts: int
    part_id: int  # from 0
    cases: list[Mapping[str, Any]] = field(default_factory=list)  # in the order of the file; the last one of a case counts
    not_reached: list[Mapping[str, Any]] = field(default_factory=list)  # of runs before it, of cases that it did not reach
    is_interrupted: bool = True  # it was stopped or killed, or goes on

    @property
    def started(self) -> str:
        """When it began, UTC; empty if unknown."""
        return str(self.head.get("started", ""))

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """Its parameters, to be compared."""
        return as_read(self.head["parameters"])

    def all_cases(self) -> list[RecordedCase]:
        """Return its records of all cases, the last one of each case last."""
        return [RecordedCase(values, self) for values in (*self.not_reached, *self.cases)]


@dataclass(frozen=True)
class RecordedCase:
    """A record of a case, and the run that has it: whether the case is done, `infer --continue` and `status` ask here."""

    values: Mapping[str, Any]  # the fields as they are in the file
    run: RecordedRun

    @property
    def case_id(self) -> str:
        """The name of the case."""
        return str(self.values["case_id"])

    @property
    def has_failed(self) -> bool:
        """Whether the run could not refine the case."""
        return bool(self.values["status"] == FAILED)

    def describes(self, changed: str | None) -> bool:
        """Return whether the record is of the label map that was last changed then, and not of another one of its name."""
        return not self.has_failed and self.values.get("written") == changed is not None

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the case, to be compared."""
        other = self.values.get("other_parameters")
        return as_read({**self.run.head["parameters"], **other}) if other else self.run.parameters

    def other_tables(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the tables of its parameters, as they are read, that differ from others; none if it was refined with the same."""
        then = self.parameters
        return {name: then.get(name) for name in {**then, **parameters} if then.get(name) != parameters.get(name)}


def read_summary(path: Path) -> list[RecordedRun]:
    """Read a summary: one run; of JSON lines, all runs that wrote to the file, the first one first.

    A last line that a killed process left unfinished is left out.
    """
    try:
        return _read_lines(path) if is_lines(path) else [_read_table(path)]
    except InputError as error:
        raise NotASummaryError(str(error)) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        is_damaged = not isinstance(error, _OtherContentError)
        reason = shorten(error, MAX_OF_A_REASON)
        raise NotASummaryError(f"{path}: expected the summary of an earlier `infer`: {reason}", is_damaged=is_damaged) from None


def as_read(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters as they are in a summary: lists for tuples, and keys that an older version did not have at their defaults."""
    with suppress(ConfigError):  # A newer version may have more keys.
        parameters = CrfParameters.from_dict(parameters).to_dict()
    table: dict[str, Any] = json.loads(json.dumps(without_nonfinite(dict(parameters))))
    return table


def whole(value: Any) -> int:
    """Return a whole number; raise TypeError for another value."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected a whole number, got {shorten_value(value)}")
    return value


def text(value: Any) -> str:
    """Return a text; raise TypeError for another value."""
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {shorten_value(value)}")
    return value


def _read_table(path: Path) -> RecordedRun:
    content = read_json(path, MAX_BYTES)
    require_usable(content, "")
    if not isinstance(content, dict) or "cases" not in content:
        raise _OtherContentError("it has other content")
    run = _run_of(content, path)
    run.is_interrupted = bool(content.get("interrupted"))
    run.cases.extend(map(_checked, content["cases"]))
    run.not_reached.extend(map(_checked, content.get("not_reached", ())))
    return run


def _read_lines(path: Path) -> list[RecordedRun]:
    require_file(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: is too large for a summary; at most {MAX_BYTES / 1e6:.0f} MB are read")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    runs: list[RecordedRun] = []
    for number, entry in _entries(content[: len(content) - unfinished_line(content)]):
        if isinstance(entry, dict) and entry.get("run") == "started":
            runs.append(_run_of(entry, path))
        elif not runs or not isinstance(entry, dict):
            raise _OtherContentError(f"line {number} is not of a run that began on a line before")
        elif entry.get("run") == "ended":
            runs[-1].is_interrupted = bool(entry.get("interrupted"))
        else:
            runs[-1].cases.append(_checked(entry))
    if not runs:
        raise _OtherContentError("no run has begun in it")
    return runs


def _entries(content: bytes) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(content.splitlines(), start=1):
        entry = parse_line(line)
        if entry is None:
            raise ValueError(f"line {number} is not JSON")
        require_usable(entry, f"line {number}")
        yield number, entry


def _run_of(content: Mapping[str, Any], path: Path) -> RecordedRun:
    if not {"schema", "parameters", "num_parts", "part_id"} <= content.keys():
        raise _OtherContentError("it has other content")
    if content["schema"] != SCHEMA:
        raise ValueError(f"its schema is {shorten_value(content['schema'])}, this version writes schema {SCHEMA}")
    if not isinstance(content["parameters"], dict):
        raise ValueError("parameters: expected a table")
    if not isinstance(content.get("inputs", []), list):
        raise ValueError("inputs: expected a list")
    run = RecordedRun(path, content, whole(content["num_parts"]), whole(content["part_id"]))
    if not 0 <= run.part_id < run.num_parts:
        raise ValueError(f"part {run.part_id} of {run.num_parts}: parts are numbered from 0")
    return run


def _checked(values: Any) -> Mapping[str, Any]:
    text(values["case_id"]), text(values["status"])
    if not isinstance(values.get("other_parameters"), dict | None):
        raise TypeError("other_parameters: expected a table")
    return dict(values)
