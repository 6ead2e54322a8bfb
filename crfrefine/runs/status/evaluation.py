"""What is left of an evaluation, as its `summary.json` tells, for `crfrefine status`."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crfrefine.errors import InputError
from crfrefine.io.json import read_json, require_usable
from crfrefine.runs.infer.summary_reading import MOST_BYTES
from crfrefine.runs.status.cases import DONE, FAILED, MISSING, CaseStatus
from crfrefine.runs.status.report import PartStatus, RunStatus
from crfrefine.runs.status.rest_command import go_there, quote

_KEYS = {"settings", "cases", "failures", "left_out"}


def evaluation_status(path: Path) -> RunStatus | None:
    """Return which cases an evaluation has measured, which failed, and which lack a file; None if the file is no summary of one.

    Args:
        path: a `summary.json`.
    """
    try:
        content = read_json(path, MOST_BYTES)
        require_usable(content, "")
        if not isinstance(content, dict) or not content.keys() >= _KEYS:
            return None
        cases = _cases(content, path)
        command = _command(content["settings"])
    except (InputError, ValueError, TypeError, KeyError, AttributeError):
        return None
    counts = Counter(case.state for case in cases)
    left = command if counts[DONE] < len(cases) else None
    notes = []
    if counts[MISSING]:
        notes.append("missing cases lack a file: add it first")
    return RunStatus(os.path.realpath(path.parent), cases, [PartStatus(0, counts, "ended", path, left)], notes)


def _cases(content: Mapping[str, Any], path: Path) -> list[CaseStatus]:
    errors: dict[str, str] = {}
    for failure in content["failures"]:
        method = f"{failure['method']}: " if failure["method"] else ""
        errors.setdefault(str(failure["case"]), f"{method}{failure['error']}")
    cases = []
    for values in content["cases"]:
        case_id = str(values["case"])
        state = FAILED if case_id in errors or values["status"] == FAILED else DONE
        cases.append(CaseStatus(case_id, 0, state, path, errors.get(case_id)))
    cases += [CaseStatus(str(values["case"]), 0, MISSING, path, "; ".join(values["reasons"])) for values in content["left_out"]]
    return sorted(cases, key=lambda case: case.case_id)


def _command(settings: Mapping[str, Any]) -> str | None:
    """Return the command that measures again what failed, and what has come since; None if it was not started from a command line."""
    words = shlex.split(settings["command_line"] or "")
    if not words:
        return None
    if not {"--continue", "--resume"} & set(words):
        words[2:2] = ["--continue"]  # Behind a "--" it would be a folder.
    return go_there(str(settings.get("working_folder") or ""), " ".join(map(quote, words)))
