"""Reports on cases that lack files: they are left out, and are no failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from crfrefine.base.notes import Note, NoteKind
from crfrefine.base.text import counted, listed
from crfrefine.errors import InputError

_MAX_NAMED = 3

# The missing files of each case that lacks one, by its name.
Incomplete: TypeAlias = Mapping[str, Sequence[str]]


def left_out_entries(incomplete: Incomplete) -> list[dict[str, Any]]:
    """Return the entries of a summary's JSON on the cases that are left out."""
    return [{"case": case_id, "reasons": list(reasons)} for case_id, reasons in incomplete.items()]


def note_on_left_out(incomplete: Incomplete, num_found: int) -> Note:
    """Return how many cases are left out, and how many and which for each reason."""
    reasons = "; ".join(_by_reason(incomplete, _MAX_NAMED))
    return NoteKind.LEFT_OUT(left_out=len(incomplete), cases=num_found, reasons=reasons)


def require_complete(
    incomplete: Incomplete,
    num_found: int,
    expected: str,
    advice: Sequence[str],
    *,
    at_least: int = 1,
    is_strict: bool = False,
) -> None:
    """Raise InputError for too few complete cases, or, with `--strict`, for any incomplete one.

    `expected` is a clause, `advice` are sentences on what to do.
    """
    num_complete = num_found - len(incomplete)
    if is_strict and incomplete:
        verb = "is" if len(incomplete) == 1 else "are"
        found = counted(num_found, "case")
        lines = [f"{len(incomplete)} of {found} {verb} incomplete, which --strict refuses:"]
        lines += _by_reason(incomplete, len(incomplete))
        advice = [*advice, "Add the missing files, or run without --strict."]
    elif num_complete < at_least:
        there = "no case is complete"
        if num_complete:
            there = f"only {num_complete} of {counted(num_found, 'case')} is complete"
        lines = [f"{there}; expected {expected}", *_by_reason(incomplete, _MAX_NAMED)]
    else:
        return
    raise InputError("\n  ".join([*lines, *advice]))


def _by_reason(incomplete: Incomplete, max_named: int) -> list[str]:
    """Return the number of cases for each reason, and the first names."""
    groups: dict[str, list[str]] = {}
    for case_id, reasons in incomplete.items():
        for reason in reasons:
            groups.setdefault(reason, []).append(case_id)
    return [
        f"{reason} ({len(names)}): {listed(names, max_named)}" for reason, names in groups.items()
    ]
