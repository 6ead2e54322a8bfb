"""Cases that cannot be trained on: all are named at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from crfrefine.base.failures import Causes, expected_error
from crfrefine.cases.case import CaseFiles
from crfrefine.errors import CrfRefineError, InputError, UnexpectedError

_MOST_NAMED = 3

Result = TypeVar("Result")


def attempt(work: Callable[[], Result], case: CaseFiles) -> Result | CrfRefineError:
    """Return the result of the work on a case, or its error, so that all bad cases can be named at once."""
    try:
        return work()
    except Exception as error:
        named = expected_error(error, *case.images, *case.logits, case.labels, case.mask)
        if repr(case.case_id) not in str(named):
            named.args = (f"case {case.case_id!r}: {named}",)
        return named


def raise_all(failed: Sequence[CrfRefineError], num_cases: int, folder: Path) -> None:
    """Raise if any case failed: a training without it would have to be repeated once it is fixed.

    Raises:
        InputError: several failed; the first few are named.
        CrfRefineError: the error of the one that failed.
        UnexpectedError: the error of one of them was not foreseen.
    """
    if len(failed) == 1:
        raise failed[0]
    if not failed:
        return
    message = describe_bad([str(error) for error in failed], num_cases, folder)
    unexpected = next((error for error in failed if isinstance(error, UnexpectedError)), None)
    if unexpected is not None:
        raise UnexpectedError(message) from unexpected
    raise InputError(message)


def describe_bad(problems: Sequence[str], num_cases: int, folder: Path) -> str:
    """Return the message about several cases: the first ones of the first few causes, and the others with one of these causes."""
    causes = Causes()
    first = [problem for problem in problems if causes.is_new(_case_of(problem), problem)]
    shown = "\n  ".join([*first[:_MOST_NAMED], *causes.others()])
    more = f"\n  and {len(first) - _MOST_NAMED} more" if len(first) > _MOST_NAMED else ""
    return f"{folder}: {len(problems)} of {num_cases} cases cannot be trained on:\n  {shown}{more}"


def _case_of(problem: str) -> str:
    """Return the name of the case that a message begins with; otherwise what it begins with, such as the name of a file."""
    found = re.match(r"case '([^']*)': ", problem)
    return problem.partition(":")[0] if found is None else found[1]
