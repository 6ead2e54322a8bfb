"""The failures of single cases in a run.

An exception in the processing of a case fails only this case; an interrupt ends the run.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crfrefine.base.text import MAX_LISTED, MAX_OF_A_REASON, counted, first_line, listed, shorten
from crfrefine.errors import CapacityError, CrfRefineError, InputError, UnexpectedError

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Failure:
    """Why a case failed."""

    # Expected, found, in which file, but not in which case; for a bug, the exception and the
    # request to report it.
    message: str
    kind: str  # class name of the error
    traceback: str | None = None  # where an unexpected exception was raised
    # The part of the case that failed, such as a method that `evaluate` measures; None means all.
    part: str | None = None
    case_id: str = ""  # the case that failed, if it is known
    # Its text in common with the same failure of other cases: by default the lines of the
    # program that raised it.
    cause: str = ""

    def __str__(self) -> str:
        text = self.message
        if self.part is not None:
            text = f"{self.part}: {text}"
        if self.case_id:
            text = f"case {self.case_id!r}: {text}"
        return text

    @property
    def headline(self) -> str:
        """The first line of the message."""
        return first_line(self.message)


class Causes:
    """The failures of many cases, grouped by their cause, such as logits on another grid.

    The first failure of a cause is printed in full; one line names the other cases.
    """

    def __init__(self) -> None:
        # The names of all cases that failed with a cause.
        self._alike: dict[tuple[str, ...], list[str]] = {}

    def is_new(self, name: str, failure: Failure) -> bool:
        """Record the failure of a case; return whether it is the first one with its cause."""
        key = (failure.kind, failure.part or "", failure.cause or failure.message)
        names = self._alike.setdefault(key, [])
        names.append(name)
        return len(names) == 1

    def others(self) -> list[str]:
        """Return a line for each cause of several failures, with the cases after the first.

        Their messages would name other files than that of the first one.
        """
        lines = []
        for first, *others in self._alike.values():
            if others:
                number = counted(len(others), "more case")
                lines.append(f"{number} failed like {shorten(first)!r}: {listed(others)}")
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

    # The last two lines of this package that the error came through, and its causes; and the folder
    # of a file that could not be opened: a missing image is not like missing logits.
    places = []
    links = []
    link: BaseException | None = error
    # An error that is raised a second time while it is handled is its own context.
    while link is not None and link not in links:
        links.append(link)
        frames = traceback.extract_tb(link.__traceback__)
        inside = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
        places += [f"{frame.filename}:{frame.lineno}" for frame in inside[-2:]]
        if isinstance(link, OSError) and link.filename:
            places.append(str(Path(os.fsdecode(link.filename)).parent))
        link = link.__cause__ or link.__context__
    return Failure(
        described.message or kind,
        kind,
        shown_traceback,
        case_id=described.case_id,
        cause=described.cause or " ".join(places),
    )


@contextmanager
def naming_case(case_id: str) -> Generator[None]:
    """Let errors name the case that is read or refined."""
    try:
        yield
    except CrfRefineError as error:
        error.case_id = case_id
        raise


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
def naming_file(path: Path) -> Generator[None]:
    """Let errors name the file that is read: a reader's exceptions, which damaged files cause."""
    try:
        yield
    except CrfRefineError:
        raise
    except Exception as error:
        raise expected_error(error, path) from error
