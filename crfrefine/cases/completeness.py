"""Incomplete cases: which ones, what they lack, and the messages about them. `discovery` looks for the files.

An incomplete case is left out and is not a failure: half-finished cross-validations are common. An unusable file is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crfrefine.base.text import counted
from crfrefine.errors import InputError

_MOST_NAMED = 3


@dataclass(frozen=True)
class IncompleteCase:
    """A case that lacks at least one file."""

    case_id: str
    reasons: tuple[str, ...]  # what it lacks, such as "no logits in study/logits"

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of a summary."""
        return {"case": self.case_id, "reasons": list(self.reasons)}


def describe_left_out(incomplete: Sequence[IncompleteCase], num_found: int) -> str:
    """Return one line: the number of cases left out, and for each reason the number and the first few names."""
    count = len(incomplete)
    verb = "is" if count == 1 else "are"
    groups = [f"{reason} ({len(names)}): {_shortened(names)}" for reason, names in _by_reason(incomplete).items()]
    return f"{count} of {counted(num_found, 'case')} {verb} left out: {'; '.join(groups)}"


def require_all_complete(incomplete: Sequence[IncompleteCase], num_found: int, advice: Sequence[str] = ()) -> None:
    """Raise InputError with the name of every incomplete case, if there is one, as `--strict` requires."""
    if not incomplete:
        return
    verb = "is" if len(incomplete) == 1 else "are"
    groups = [f"  {reason} ({len(names)}): {', '.join(names)}" for reason, names in _by_reason(incomplete).items()]
    raise InputError(
        f"{len(incomplete)} of {counted(num_found, 'case')} {verb} incomplete, which --strict refuses:\n"
        + "\n".join(groups)
        + "".join(f"\n  {sentence}" for sentence in advice)
        + "\n  Add the missing files, or run without --strict to continue with the other cases."
    )


def too_few_complete(incomplete: Sequence[IncompleteCase], num_found: int, expected: str, what_to_do: str) -> InputError:
    """Return the error for a run with too few complete cases; `expected` is a clause, `what_to_do` a sentence."""
    num_complete = num_found - len(incomplete)
    found = "no case is complete" if num_complete == 0 else f"only {num_complete} of {counted(num_found, 'case')} is complete"
    groups = [f"  {reason} ({len(names)}): {_shortened(names)}" for reason, names in _by_reason(incomplete).items()]
    return InputError("\n".join([f"{found}; expected {expected}", *groups, f"  {what_to_do}"]))


def _by_reason(incomplete: Sequence[IncompleteCase]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for case in incomplete:
        for reason in case.reasons:
            groups.setdefault(reason, []).append(case.case_id)
    return groups


def _shortened(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
