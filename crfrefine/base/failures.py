"""The failures of single cases in a run.

An exception in the processing of a case fails only this case; an interrupt ends the run.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from crfrefine.base.text import MAX_LISTED, MAX_OF_A_REASON, counted, listed, shorten
from crfrefine.errors import CapacityError, CrfRefineError, InputError, UnexpectedError


@dataclass(frozen=True)
class Failure:
    """Why a case failed."""

    # Expected, found, in which file; for a bug, the exception and the request to report it.
    message: str
    kind: str  # class name of the error
    traceback: str | None = None  # where an unexpected exception was raised
    # The part of the case that failed, such as a method that `evaluate` measures; None means all.
    part: str | None = None


@dataclass
class _Cause:
    """Failures of several cases with one cause."""

    line: str  # the first line of the first case's message
    cases: list[str] = field(default_factory=list)


def without_names(case_id: str, line: str) -> str:
    """Return a line without what differs between cases: their name in those of files, numbers."""
    name_in_file_names = rf"(?<!\w){re.escape(case_id)}(?=['._/\\])"
    return re.sub(r"[0-9]+", "0", re.sub(name_in_file_names, "CASE", line))


class Causes:
    """The failures of many cases, grouped by their cause, such as logits on another grid.

    The first failure of a cause is printed in full; one line names the other cases.
    """

    def __init__(self) -> None:
        self._causes: dict[str, _Cause] = {}

    def is_new(self, case_id: str, message: str) -> bool:
        """Record the failure of a case; return whether it is the first one with its cause."""
        line, _, _ = message.partition("\n")  # Lines after the first are such as grids.
        key = without_names(case_id, line)
        cause = self._causes.setdefault(key, _Cause(line.removeprefix(f"case {case_id!r}: ")))
        cause.cases.append(case_id)
        return len(cause.cases) == 1

    def others(self) -> list[str]:
        """Return a line for each cause of several failures, with the cases after the first."""
        lines = []
        for cause in self._causes.values():
            first, *others = cause.cases
            if others:
                number = counted(len(others), "more case")
                names = f"{shorten(first)!r} ({listed(others)})"
                lines.append(f"{number} failed like {names}: {cause.line}")
        return lines


def expected_error(error: BaseException, *paths: Path | None) -> CrfRefineError:
    """Return the error itself if its message is meant for users, else one that describes it.

    The new error names these files, unless the old one names its own; a bug asks for a report.
    """
    if isinstance(error, CrfRefineError):
        return error
    names = [str(path) for path in paths if path is not None]
    files = ""
    if names:
        files = f"{', '.join(names[:MAX_LISTED])}: "
    reason = ""
    if str(error):
        reason = f" ({shorten(error, MAX_OF_A_REASON)})"

    described: CrfRefineError
    if isinstance(error, MemoryError):
        described = CapacityError(f"{files}there is not enough memory{reason}")
    elif isinstance(error, OSError):
        if error.filename:
            files = f"{error.filename}: "
        described = InputError(f"{files}{error.strerror or error}")
    else:
        described = UnexpectedError(
            f"{files}unexpected {type(error).__name__}{reason}: "
            "a bug, please report it, with what -v shows"
        )
    described.__cause__ = error
    return described


def describe_failure(error: BaseException, *paths: Path | None) -> Failure:
    """Return the failure to report for an error; it names these files if the error names none."""
    kind = type(error).__name__
    described = expected_error(error, *paths)
    shown_traceback = None
    if isinstance(described, UnexpectedError):
        cause = described.__cause__ or described
        shown_traceback = "".join(traceback.format_exception(cause))
    return Failure(str(described) or kind, kind, shown_traceback)


@contextmanager
def failing_alone(fail: Callable[[Failure], object], *paths: Path | None) -> Generator[None]:
    """Surround the processing of a case, so that an exception fails only this case.

    An exception is passed to `fail` as a failure that names these files; interrupts propagate.
    """
    try:
        yield
    except Exception as error:
        fail(describe_failure(error, *paths))


@contextmanager
def reading(path: Path) -> Generator[None]:
    """Turn a reader's exceptions, which damaged files cause, into errors that name the file."""
    try:
        yield
    except CrfRefineError:
        raise
    except Exception as error:
        raise expected_error(error, path) from error
