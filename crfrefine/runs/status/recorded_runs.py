"""A run as `status` needs it: its summary must say which cases it has, and where its relative paths begin."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from crfrefine.errors import InputError
from crfrefine.runs.infer.summary_reading import RecordedRun


@dataclass
class FoundRun:
    """A run in a summary.

    Attributes:
        run: the run.
        path: the summary.
        output_folder: where its results are now: a later run into the same folder may have found it under another name.
    """

    run: RecordedRun
    path: Path
    output_folder: str

    @property
    def started(self) -> str:
        """When it began, UTC."""
        return str(self.run.head["started"])

    @property
    def order(self) -> tuple[str, int]:
        """What tells earlier runs from later ones: the second in which they began, then the time of the last record."""
        return self.started, self.path.stat().st_mtime_ns

    @property
    def folder(self) -> str:
        """Where its relative paths begin."""
        return str(self.run.head["working_folder"])

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        """What runs have in common whose summaries belong together: the output folder and the inputs."""
        return self.output_folder, tuple(map(str, self.run.head["inputs"]))


def require_cases(run: RecordedRun, path: Path) -> None:
    """Raise InputError if a run does not say which cases it has."""
    head = run.head
    if not {"all_cases", "inputs", "command", "output_folder", "working_folder", "started"} <= head.keys():
        raise InputError(
            f"{path}: does not say which cases the run has: it is of an earlier version of crfrefine\n"
            "  Run `infer --continue` again: what is done is skipped and recorded."
        )
    texts = [head["output_folder"], head["working_folder"], *head["inputs"], *head["command"]] if _are_lists(head) else [None]
    if not all(map(_can_be_a_name, texts)) or _time(head["started"]) is None:
        raise InputError(
            f"{path}: expected a summary of `infer`: all_cases, inputs, command, folders and started are not as it writes them"
        )


def _are_lists(head: Mapping[str, Any]) -> bool:
    cases = head["all_cases"]
    usable = isinstance(cases, dict) and all(map(_can_be_a_name, cases.values()))
    return usable and isinstance(head["inputs"], list) and isinstance(head["command"], list)


def _can_be_a_name(text: object) -> bool:
    """Return whether a system can be given a text as the name of a file, or as a word of a command."""
    try:
        return isinstance(text, str) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _time(text: object) -> datetime | None:
    """Return a time of a summary; None if it is none, or without its time zone."""
    try:
        time = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return time if time.tzinfo is not None else None
