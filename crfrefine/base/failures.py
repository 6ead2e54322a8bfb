"""Why a case of a run failed: exceptions of its processing fail it alone; interrupts and others end the run."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crfrefine.base.text import MAX_LISTED, MAX_OF_A_REASON, counted, listed, shorten
from crfrefine.errors import CapacityError, CrfRefineError, InputError, UnexpectedError


@dataclass(frozen=True)
class Failure:
    """Why a case failed."""

    message: (
        str  # expected, found, in which file; for a bug, the exception and the request to report it
    )
    kind: str  # class name of the error
    traceback: str | None = None  # where an unexpected exception was raised
    part: str | None = (
        None  # the part of the case that failed, such as a method that `evaluate` measures; None for the whole case
    )


class Causes:
    """Failures of many cases with one cause, such as logits on another grid: the first is printed in full, one line names the others."""

    def __init__(self) -> None:
        self._cases: dict[
            str, tuple[str, list[str]]
        ] = {}  # by cause: the message of the first case, and all cases

    def is_new(self, case_id: str, message: str) -> bool:
        """Record the failure of a case; return whether it is the first one with its cause."""
        # Messages of one cause differ by names of the case and its files, by numbers, and by the lines after the first, such as grids.
        line = message.partition("\n")[0]
        cause = re.sub(
            r"[0-9]+", "0", re.sub(rf"(?<!\w){re.escape(case_id)}(?=['._/\\])", "CASE", line)
        )
        _, cases = self._cases.setdefault(cause, (line.removeprefix(f"case {case_id!r}: "), []))
        cases.append(case_id)
        return len(cases) == 1

    def others(self) -> list[str]:
        """Return a line for each cause of several failures: how many cases failed like the first, and which."""
        return [
            f"{counted(len(more), 'more case')} failed like {shorten(first)!r} ({listed(more)}): {line}"
            for line, (first, *more) in self._cases.values()
            if more
        ]


def expected_error(error: BaseException, *paths: Path | None) -> CrfRefineError:
    """Return the error itself if its message is meant for users, else one that describes it, with these files, or asks for a bug report."""
    if isinstance(error, CrfRefineError):
        return error
    named = ", ".join([str(path) for path in paths if path is not None][:MAX_LISTED])
    files = f"{named}: " if named else ""
    reason = f" ({shorten(error, MAX_OF_A_REASON)})" if str(error) else ""
    described: CrfRefineError
    if isinstance(error, MemoryError):
        described = CapacityError(f"{files}there is not enough memory{reason}")
    elif isinstance(error, OSError):
        described = InputError(
            f"{f'{error.filename}: ' if error.filename else files}{error.strerror or error}"
        )
    else:
        described = UnexpectedError(
            f"{files}unexpected {type(error).__name__}{reason}: a bug, please report it, with what -v shows"
        )
    described.__cause__ = error
    return described


def describe_failure(error: BaseException, *paths: Path | None) -> Failure:
    """Return the failure to report for an error that ended the work on a case; it names these files if its message names none."""
    known, kind = expected_error(error, *paths), type(error).__name__
    is_bug, cause = isinstance(known, UnexpectedError), known.__cause__ or known
    return Failure(
        str(known) or kind, kind, "".join(traceback.format_exception(cause)) if is_bug else None
    )


@contextmanager
def failing_alone(fail: Callable[[Failure], object], *paths: Path | None) -> Generator[None]:
    """Surround the processing of a case: every exception is passed to `fail`, and fails only this case; interrupts propagate."""
    try:
        yield
    except Exception as error:
        fail(describe_failure(error, *paths))


@contextmanager
def reading(path: Path) -> Generator[None]:
    """Turn exceptions of a reader into errors that name the file: a damaged file can make libraries raise anything."""
    try:
        yield
    except CrfRefineError:
        raise
    except Exception as error:
        raise expected_error(error, path) from error
