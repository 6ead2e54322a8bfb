"""What `crfrefine status` reports of runs, of their parts and cases, also as JSON, and the commands that do the rest."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from crfrefine.runs.execution.records import FAILED

DONE, MISSING = "done", "missing"
STATES = (DONE, FAILED, MISSING)


@dataclass(frozen=True)
class CaseStatus:
    """What is known of a case."""

    case_id: str
    part_id: int
    state: str  # one of STATES
    output: Path  # its label map
    reason: str | None = None  # the error of a failed case, or what is not there
    has_old_output: bool = False  # it is not done, and a label map of an earlier run has its name
    is_changed: bool = False  # its label map was changed after it was recorded

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of the JSON output."""
        return {"case_id": self.case_id, "part_id": self.part_id, "state": self.state, "output": str(self.output), "reason": self.reason}


@dataclass(frozen=True)
class PartStatus:
    """What is left of a part."""

    part_id: int  # from 0
    counts: Mapping[str, int]  # number of its cases by state
    run: str  # "ended", "interrupted" (or still running), or "not started" where there is no record of it
    summary: Path | None  # that of its last run
    command: str | None  # does what is left

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of the JSON output."""
        summary = None if self.summary is None else str(self.summary)
        counts = {f"num_{state}": self.counts[state] for state in STATES}
        return {"part_id": self.part_id, "run": self.run, **counts, "summary": summary, "command": self.command}


@dataclass(frozen=True)
class RunStatus:
    """What is left of a folder run, over all its parts and all earlier runs of the same inputs into the same folder."""

    output_folder: str
    cases: Sequence[CaseStatus]  # in the order of their names
    parts: Sequence[PartStatus]  # all that have cases, those that never started too
    notes: Sequence[str]

    @property
    def is_complete(self) -> bool:
        """Whether all cases are done."""
        return all(case.state == DONE for case in self.cases)

    @property
    def commands(self) -> list[str]:
        """The commands that do the rest, one per part with cases left."""
        return [part.command for part in self.parts if part.command is not None]

    def of_state(self, state: str) -> list[CaseStatus]:
        """Return the cases that are "done", "failed" or "missing"."""
        return [case for case in self.cases if case.state == state]

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of the JSON output."""
        counts = {f"num_{state}": len(self.of_state(state)) for state in STATES}
        return {
            "output_folder": self.output_folder,
            "is_complete": self.is_complete,
            "num_cases": len(self.cases),
            **counts,
            "num_parts": len(self.parts),
            "parts": [part.to_dict() for part in self.parts],
            "cases": [case.to_dict() for case in self.cases],
            "notes": list(self.notes),
            "commands": self.commands,
        }


@dataclass
class StatusReport:
    """The runs of some summaries."""

    runs: list[RunStatus] = field(default_factory=list)  # by output folder and inputs, in the order of the summaries
    notes: list[str] = field(default_factory=list)  # files that could not be used

    @property
    def is_complete(self) -> bool:
        """Whether all cases of all runs are done, and all summaries could be read."""
        return not self.notes and all(run.is_complete for run in self.runs)


# The command line that does the rest of a run, to be copied into a shell.

_FLAG = "--continue"
_ALIASES = (_FLAG, "--resume")
_OPTIONS = ("--num-parts", "--part-id", "--summary")


def rest_command(arguments: Sequence[str], num_parts: int, part_id: int, *, of_part: int, folder: str) -> str:
    """Return the command that does what is left of a part.

    Args:
        arguments: of the command that was run, `infer` first.
        num_parts: number of parts.
        part_id: the part that the command is to do, from 0.
        of_part: the part that `arguments` did; the summary of another part gets its name from this one's.
        folder: where relative paths among the arguments begin; the command goes there first, unless it is the current folder.
    """
    kept, summary = _without_options(arguments)
    parts = ("--num-parts", str(num_parts), "--part-id", str(part_id)) if num_parts > 1 else ()
    named = ("--summary", summary if part_id == of_part else summary_of_part(summary, of_part, part_id)) if summary else ()
    command = " ".join(map(quote, ("crfrefine", *kept, _FLAG, *parts, *named)))
    return go_there(folder, command)


def go_there(folder: str, command: str) -> str:
    """Return the command with one before it that goes to a folder, unless that is the current one."""
    return command if _is_here(folder) else f"cd {quote(folder)} && {command}"


def summary_of_part(summary: str, of_part: int, part_id: int) -> str:
    """Return a name for the summary of a part like that of another part: `summary_3.json` like `summary_0.json`."""
    path = PurePath(summary)
    numbers = [*re.finditer(rf"(?<![0-9])0*{of_part}(?![0-9])", path.name)]
    if not numbers:
        return str(path.with_name(f"{path.stem}_{part_id}{path.suffix}"))
    start, end = numbers[-1].span()
    digits = end - start if path.name[start] == "0" else 0  # as many as before, if there are zeros in front
    return str(path.with_name(f"{path.name[:start]}{part_id:0{digits}d}{path.name[end:]}"))


def quote(word: str) -> str:
    """Return a word as a shell reads it; characters that do not print become escapes as in Bash: $'…'."""
    if word.isprintable():
        return shlex.quote(word)
    letters = (chr(byte) if 0x20 <= byte < 0x7F and chr(byte) not in "\\'" else f"\\x{byte:02x}" for byte in os.fsencode(word))
    return f"$'{''.join(letters)}'"


def _without_options(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Return the arguments without parts, `--continue` and the summary; and the summary's name, or ""."""
    kept: list[str] = []
    summary = ""
    words = iter(arguments)
    for word in words:
        name, is_joined, value = word.partition("=")
        if word in _ALIASES:
            continue
        if name not in _OPTIONS:
            kept.append(word)
            continue
        value = value if is_joined else next(words, "")
        if name == "--summary":
            summary = value
    return kept, summary


def _is_here(folder: str) -> bool:
    try:
        return not folder or Path(folder).samefile(os.curdir)
    except OSError:
        return False
